"""Greedy answers: batched as alone, equal to transformers' generate, ended where answers end."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qa.decoding import greedy, stop_ids, text_of
from qa.model import load_model

PROMPTS = [[5, 6, 7], [9] * 40, [11, 200, 31, 44, 12], [300]]


@pytest.mark.parametrize("kind", ["gpt2_folder", "llama_folder"])
def test_a_batch_answers_as_each_alone(
    kind: str, request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(request.getfixturevalue(kind), "tiny", {}, None).eval()
    together = greedy(model, tokenizer, PROMPTS, [0], 12)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        [alone] = greedy(model, tokenizer, [prompt], [0], 12)
        assert alone.text == answer.text
        assert alone.ended == answer.ended
        assert alone.log_probability == pytest.approx(answer.log_probability, rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2_folder", "llama_folder"])
def test_greedy_equals_generate_of_transformers(
    kind: str, request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder: Path = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, answer in zip(PROMPTS, greedy(model, tokenizer, PROMPTS, [0], 12), strict=True):
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=0,
            pad_token_id=0,
        )  # fmt: skip
        assert answer.text == text_of(tokenizer, ids[0, len(prompt) :].tolist())


def test_an_answer_ends_at_a_stop_token_and_counts_its_probability(
    gpt2_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(gpt2_folder, "tiny", {}, None).eval()
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)
    first = scores.argmax().item()
    [answer] = greedy(model, tokenizer, [PROMPTS[0]], [first], 12)
    assert answer.ended
    assert answer.log_probability == pytest.approx(scores[first].item(), rel=1e-5)
    [never] = greedy(model, tokenizer, [PROMPTS[0]], [], 3)
    assert not never.ended


def test_end_of_text_and_all_newlines_are_stops(tokenizer: PreTrainedTokenizerBase) -> None:
    stops = stop_ids(tokenizer)
    assert tokenizer.eos_token_id in stops
    newlines = {i for text, i in tokenizer.get_vocab().items() if "Ċ" in text}
    assert newlines
    assert newlines <= set(stops)
    assert len(stops) == len(newlines) + 1


@pytest.mark.parametrize(
    ("said", "text"),
    [(" Oslo\nQuestion", "Oslo"), ("\nOslo", ""), (" 3 May 1814<|endoftext|>", "3 May 1814")],
)
def test_an_answer_is_what_stands_before_the_newline(
    said: str, text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert text_of(tokenizer, tokenizer(said)["input_ids"]) == text


def test_spaces_before_punctuation_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    assert text_of(tokenizer, tokenizer(" a , b ' s")["input_ids"]) == "a , b ' s"
