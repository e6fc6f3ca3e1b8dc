"""Greedy answers: those of transformers' generate to each prompt alone, and where they end."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_or_full.data.prompt import PromptTokens
from lora_or_full.evaluation.predictions import Answer
from lora_or_full.generation import decoding
from lora_or_full.generation.decoding import greedy, stop_ids, text_of
from lora_or_full.generation.sharing import shares_context
from lora_or_full.modeling import packed_rows
from lora_or_full.modeling.loading import load_model

KINDS = ["gpt2_folder", "llama_folder", "grouped_llama_folder"]
# Padded rows; blocks in which no, some and all questions of a context share it.
PACKED_LENGTHS = [None, 1, 60, 1000]
Expected = tuple[list[int], float, bool]  # ids, log-probability, whether it ended


def prompts() -> list[PromptTokens]:
    """Prompts over three contexts in mixed order, two of them shared, one of them empty."""
    rng = random.Random(2)

    def ids(size: int) -> list[int]:
        return [rng.randrange(1, 300) for _ in range(size)]

    contexts = {"a": ids(25), "b": [], "c": ids(6), "d": ids(40)}
    return [PromptTokens([7, 8], contexts[name], ids(rng.randrange(1, 9))) for name in "acbadaca"]


@pytest.fixture
def ids_for_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers hold their token ids: different ids may decode to one text."""
    monkeypatch.setattr(decoding, "text_of", lambda tokenizer, ids: list(ids))


def generated(model: Any, prompt: PromptTokens, stops: list[int], tokens: int) -> Expected:
    """The answer of transformers' generate to a prompt alone."""
    output = model.generate(
        torch.tensor([prompt.prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=stops,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    ids = output.sequences[0, len(prompt.prompt) :].tolist()
    scores = torch.cat(output.logits).log_softmax(-1)
    return ids, scores[range(len(ids)), ids].sum().item(), ids[-1] in stops


class Case(NamedTuple):
    """A model as a run loads it, and what transformers' own model answers to `prompts`."""

    model: PreTrainedModel
    plain: Any
    stops: list[int]
    expected: list[Expected]


@pytest.fixture(params=KINDS, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    folder = request.getfixturevalue(request.param)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    answers = [generated(plain, prompt, [0], 12)[0] for prompt in prompts()]
    # With these, some answers end early, some late and others not.
    stops = [0, answers[0][0], answers[1][3], answers[4][6]]
    expected = [generated(plain, prompt, stops, 12) for prompt in prompts()]
    assert len({len(ids) for ids, _, _ in expected}) > 2
    assert {ended for _, _, ended in expected} == {True, False}
    return Case(load_model(folder, "tiny", {}), plain, stops, expected)


def check(answers: list[Answer], expected: list[Expected]) -> None:
    assert [(a.text, a.ended) for a in answers] == [(ids, end) for ids, _, end in expected]
    assert [a.log_probability for a in answers] == pytest.approx(
        [value for _, value, _ in expected], rel=1e-4
    )


@pytest.fixture(params=["by blocks", "in rows"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode as on a CPU, and in rows as on a GPU; rows are short, so that there are several."""
    if request.param == "in rows":
        monkeypatch.setattr(decoding, "ROW_DEVICES", ("cpu",))
        monkeypatch.setattr(packed_rows, "ROW_LENGTH", 80)
        monkeypatch.setattr(packed_rows, "LENGTH_MULTIPLE", 8)


@pytest.mark.usefixtures("ids_for_texts", "layout")
@pytest.mark.parametrize("packed_length", PACKED_LENGTHS)
def test_answers_of_a_batch_equal_those_of_generate_to_each_prompt_alone(
    packed_length: int | None, case: Case, tokenizer: PreTrainedTokenizerBase
) -> None:
    for order in (1, -1):
        answers = greedy(case.model, tokenizer, prompts()[::order], case.stops, 12, packed_length)
        check(answers[::order], case.expected)
        assert {a.reference_log_probability for a in answers} == {None}


@pytest.mark.usefixtures("ids_for_texts", "layout")
@pytest.mark.parametrize("packed_length", PACKED_LENGTHS)
def test_gold_answers_have_the_probability_of_a_separate_pass_and_change_no_answer(
    packed_length: int | None, case: Case, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng = random.Random(3)
    references = [[rng.randrange(1, 300) for _ in range(n % 5)] for n in range(len(prompts()))]
    expected = []
    for prompt, reference in zip(prompts(), references, strict=True):
        ids, first = torch.tensor([prompt.prompt + reference]), len(prompt.prompt) - 1
        with torch.no_grad():
            scores = case.plain(input_ids=ids).logits[0].log_softmax(-1)
        expected.append(scores[range(first, first + len(reference)), reference].sum().item())
    answers = greedy(case.model, tokenizer, prompts(), case.stops, 12, packed_length, references)
    check(answers, case.expected)
    assert [a.reference_log_probability for a in answers] == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("ids_for_texts")
def test_a_shared_context_is_read_once_and_a_finished_answer_no_further(
    case: Case, tokenizer: PreTrainedTokenizerBase
) -> None:
    read: list[int] = []
    hook = case.model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: read.append(ids[0].numel())
    )
    answers = greedy(case.model, tokenizer, prompts(), case.stops, 12, 1000)
    hook.remove()
    whole = sum(len(context) + 2 for context in {tuple(p.context) for p in prompts()})
    whole += sum(len(p.question) for p in prompts())
    assert whole <= read[0] < whole + 4 * 16 < sum(len(p.prompt) for p in prompts())
    lengths = [len(answer.text) for answer in answers]
    assert read[1:] == [sum(size > n for size in lengths) for n in range(1, max(lengths))]


def test_no_prompts_have_no_answers(gpt2_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert greedy(load_model(gpt2_folder, "tiny", {}), tokenizer, [], [0], 12, 1000) == []


@pytest.mark.usefixtures("ids_for_texts")
def test_a_sliding_window_shares_no_context_that_is_longer(
    windowed_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(windowed_folder, "tiny", {})
    plain = AutoModelForCausalLM.from_pretrained(windowed_folder)
    assert shares_context(model, 4)
    assert not shares_context(model, 60)
    expected = [generated(plain, prompt, [0], 12) for prompt in prompts()]
    check(greedy(model, tokenizer, prompts(), [0], 12, None), expected)
    shared = greedy(model, tokenizer, prompts(), [0], 12, 1000)
    assert [answer.text for answer in shared] != [ids for ids, _, _ in expected]


@pytest.mark.usefixtures("ids_for_texts")
def test_a_type_that_takes_no_blocks_shares_no_context(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=300, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2,
            max_position_embeddings=256,
        )
    ).eval()  # fmt: skip
    assert not shares_context(model, 60)
    answers = greedy(model, tokenizer, prompts(), [0], 12, None)
    assert [a.text for a in answers] == [generated(model, p, [0], 12)[0] for p in prompts()]


@pytest.mark.parametrize("packed_length", [None, 1000])
def test_an_answer_ends_at_a_stop_token_and_counts_its_probability(
    packed_length: int | None, gpt2_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(gpt2_folder, "tiny", {})
    prompt = PromptTokens([5], [6], [7])
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([prompt.prompt])).logits[0, -1].log_softmax(-1)
    first = int(scores.argmax())
    [answer] = greedy(model, tokenizer, [prompt], [first], 12, packed_length)
    assert answer.ended
    assert answer.log_probability == pytest.approx(scores[first].item(), rel=1e-5)
    [never] = greedy(model, tokenizer, [prompt], [], 3, packed_length)
    assert not never.ended


def test_end_of_text_and_all_newlines_are_stops(tokenizer: PreTrainedTokenizerBase) -> None:
    stops = stop_ids(tokenizer)
    assert tokenizer.eos_token_id in stops
    newlines = {i for text, i in tokenizer.get_vocab().items() if "Ċ" in text}
    assert newlines
    assert newlines <= set(stops)
    assert len(stops) == len(newlines) + 1


@pytest.mark.parametrize(
    ("output", "text"),
    [(" Oslo\nQuestion", "Oslo"), ("\nOslo", ""), (" 3 May 1814<|endoftext|>", "3 May 1814")],
)
def test_an_answer_ends_before_the_newline(
    output: str, text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert text_of(tokenizer, tokenizer(output)["input_ids"]) == text


def test_spaces_before_punctuation_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    assert text_of(tokenizer, tokenizer(" a , b ' s")["input_ids"]) == "a , b ' s"
