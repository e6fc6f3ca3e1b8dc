"""A context that is read once: the same answers as whole prompts, and alternatives."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from lora_or_full.data.prompt import Prompt, PromptTokens, encode, window
from lora_or_full.errors import UserError
from lora_or_full.generation.context_session import ContextSession
from lora_or_full.generation.decoding import greedy, stop_ids
from lora_or_full.modeling.loading import load_model

CONTEXT = "In 1200, Ada built the bridge of Oslo. Bruno left Quito in 1310. " * 2
QUESTIONS = ("Who built the bridge?", "Where?", "When did Bruno leave Quito, and why so early?")
LENGTHS = (240, 60)  # the second leaves no room for the whole context


def prompt_of(tokenizer: PreTrainedTokenizerBase, question: str, length: int) -> PromptTokens:
    [parts] = Prompt(tokenizer).tokens([(CONTEXT, question)])
    room = length - len(parts.prefix) - len(parts.question)
    return parts._replace(context=parts.context[window(len(parts.context), room)])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "kind", ["gpt2_folder", "llama_folder", "grouped_llama_folder", "windowed_folder"]
)
def test_answers_equal_those_of_whole_prompts(
    kind: str, length: int, tokenizer: PreTrainedTokenizerBase, request: pytest.FixtureRequest
) -> None:
    model = load_model(request.getfixturevalue(kind), "tiny", {})
    stops = stop_ids(tokenizer)
    prompts = [prompt_of(tokenizer, question, length) for question in QUESTIONS]
    expected = greedy(model, tokenizer, prompts, stops, 12, None)
    session = ContextSession(model, Prompt(tokenizer), CONTEXT, length)
    for question, answer, prompt in zip(QUESTIONS, expected, prompts, strict=True):
        given = session.ask(question, stops, 12, 0)
        assert [(a.text, a.ended) for a in given] == [(answer.text, answer.ended)]
        assert given[0].log_probability == pytest.approx(answer.log_probability, rel=1e-4)
        assert session.read == len(prompt.context)
    assert (session.read < session.tokens) == (length == LENGTHS[1])


def test_earlier_questions_change_nothing(
    gpt2_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, stops = load_model(gpt2_folder, "tiny", {}), stop_ids(tokenizer)
    session = ContextSession(model, Prompt(tokenizer), CONTEXT, 240)
    first = session.ask(QUESTIONS[0], stops, 12, 3)
    session.ask(QUESTIONS[2], stops, 12, 2)
    assert session.ask(QUESTIONS[0], stops, 12, 3) == first


def test_alternatives_begin_with_the_next_likely_tokens_and_continue_greedily(
    gpt2_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, stops = load_model(gpt2_folder, "tiny", {}), stop_ids(tokenizer)
    prompt = prompt_of(tokenizer, QUESTIONS[0], 240).prompt

    def log_probabilities(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([prompt + ids])).logits[0, -1].log_softmax(-1)

    expected = []
    for first in log_probabilities([]).topk(4).indices.tolist():
        ids, sure = [first], log_probabilities([])[first].item()
        while ids[-1] not in stops and len(ids) < 6:
            scores = log_probabilities(ids)
            sure += scores.max().item()
            ids.append(int(scores.argmax()))
        expected.append((ids, sure))
    replies = ContextSession(model, Prompt(tokenizer), CONTEXT, 240).ask(QUESTIONS[0], stops, 6, 3)
    greedy_one, *others = expected
    by_probability = [greedy_one, *sorted(others, key=lambda pair: -pair[1])]
    found = {reply.text: reply.log_probability for reply in replies}
    for ids, sure in by_probability:
        text = tokenizer.decode(ids, skip_special_tokens=True).lstrip(" ").split("\n")[0].strip()
        assert found[text] >= sure - 1e-3 * abs(sure)
    assert replies[0].log_probability == pytest.approx(greedy_one[1], rel=1e-4)
    rest = [reply.log_probability for reply in replies[1:]]
    assert rest == sorted(rest, reverse=True)
    assert sum(math.exp(reply.log_probability) for reply in replies) <= 1


@pytest.mark.parametrize(
    ("question", "message"),
    [("  ", "empty"), ("why " * 300, "tokens"), ("\udc80", "half a character")],
)
def test_an_invalid_question_is_refused(
    question: str, message: str, gpt2_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    session = ContextSession(load_model(gpt2_folder, "tiny", {}), Prompt(tokenizer), CONTEXT, 200)
    with pytest.raises(UserError, match=message):
        session.ask(question, [0], 4, 0)


@pytest.mark.slow
def test_after_a_read_context_the_first_token_takes_less_than_a_quarter(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """GPT-2 of full size, in float32, 500 tokens."""
    model, stops = GPT2LMHeadModel(GPT2Config()).eval(), stop_ids(tokenizer)
    context = CONTEXT
    while len(encode(tokenizer, [context])[0]) < 510:
        context += "Ada and Bruno. "
    session = ContextSession(model, Prompt(tokenizer), context, 900)
    assert 500 <= session.tokens < 520

    def seconds(first_token: Callable[[], object]) -> float:
        took = []
        for _ in range(5):
            began = time.perf_counter()
            first_token()
            took.append(time.perf_counter() - began)
        return min(took)

    warm = seconds(lambda: session.ask(QUESTIONS[0], stops, 1, 0))
    cold = seconds(
        lambda: ContextSession(model, Prompt(tokenizer), context, 900).ask(
            QUESTIONS[0], stops, 1, 0
        )
    )
    assert warm < cold / 4
