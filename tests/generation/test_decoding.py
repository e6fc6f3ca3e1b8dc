"""Greedy answers: together as alone, equal to transformers' generate, ended where answers end."""

import random
from pathlib import Path
from typing import Any

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
from lora_or_full.generation import decoding
from lora_or_full.generation.decoding import greedy, stop_ids, text_of
from lora_or_full.generation.kv_cache import shares_context
from lora_or_full.modeling.loading import load_model

KINDS = ["gpt2_folder", "llama_folder", "grouped_llama_folder"]
WAYS = [None, 1, 60, 1000]  # rows; none shares; some share; all that can do


def prompts() -> list[PromptTokens]:
    """Prompts over three contexts in mixed order, two of them shared, one of them empty."""
    rng = random.Random(2)

    def ids(size: int) -> list[int]:
        return [rng.randrange(1, 300) for _ in range(size)]

    contexts = {"a": ids(25), "b": [], "c": ids(6), "d": ids(40)}
    return [PromptTokens([7, 8], contexts[name], ids(rng.randrange(1, 9))) for name in "acbadaca"]


@pytest.fixture(params=KINDS)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Any]:
    """A model as a run has it, and the same as plain transformers loads it."""
    folder = request.getfixturevalue(request.param)
    return load_model(folder, "tiny", {}), AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def ids_for_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers hold their token ids: a text does not tell all."""
    monkeypatch.setattr(decoding, "text_of", lambda tokenizer, ids: list(ids))


def generated(
    model: Any, prompt: PromptTokens, stops: list[int], tokens: int
) -> tuple[list[int], float, bool]:
    """What transformers' generate says to a prompt alone: ids, log-probability, and if it ended."""
    output = model.generate(
        torch.tensor([prompt.prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=stops,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    ids = output.sequences[0, len(prompt.prompt) :].tolist()
    scores = torch.cat(output.logits).log_softmax(-1)
    return ids, scores[range(len(ids)), ids].sum().item(), ids[-1] in stops


@pytest.fixture(params=WAYS)
def packed_length(request: pytest.FixtureRequest) -> int | None:
    return request.param


def some_stops(model: Any) -> list[int]:
    """Tokens that end some answers early, some late and others not."""
    answers = [generated(model, prompt, [0], 12)[0] for prompt in prompts()]
    return [0, answers[0][0], answers[1][3], answers[4][6]]


@pytest.mark.usefixtures("ids_for_texts")
def test_greedy_equals_generate_of_transformers(
    packed_length: int | None,
    models: tuple[PreTrainedModel, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    own, plain = models
    stops = some_stops(plain)
    expected = [generated(plain, prompt, stops, 12) for prompt in prompts()]
    assert len({len(ids) for ids, _, _ in expected}) > 2
    assert {ended for _, _, ended in expected} == {True, False}
    answers = greedy(own, tokenizer, prompts(), stops, 12, packed_length)
    assert [(a.text, a.ended) for a in answers] == [(ids, end) for ids, _, end in expected]
    assert [a.log_probability for a in answers] == pytest.approx(
        [value for _, value, _ in expected], rel=1e-4
    )


@pytest.mark.usefixtures("ids_for_texts")
def test_an_answer_depends_on_its_own_prompt_alone(
    packed_length: int | None,
    models: tuple[PreTrainedModel, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    own, plain = models
    stops = some_stops(plain)
    together = greedy(own, tokenizer, prompts(), stops, 12, packed_length)
    alone = [greedy(own, tokenizer, [p], stops, 12, packed_length)[0] for p in prompts()]
    turned = greedy(own, tokenizer, prompts()[::-1], stops, 12, packed_length)[::-1]
    for answers in (alone, turned):
        assert [(a.text, a.ended) for a in answers] == [(a.text, a.ended) for a in together]
        assert [a.log_probability for a in answers] == pytest.approx(
            [a.log_probability for a in together], rel=1e-4
        )


@pytest.mark.usefixtures("ids_for_texts")
def test_golds_have_the_probability_of_a_pass_of_their_own_and_change_no_answer(
    packed_length: int | None,
    models: tuple[PreTrainedModel, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    own, plain = models
    rng = random.Random(3)
    golds = [[rng.randrange(1, 300) for _ in range(n % 5)] for n in range(len(prompts()))]
    expected = []
    for prompt, gold in zip(prompts(), golds, strict=True):
        ids, first = torch.tensor([prompt.prompt + gold]), len(prompt.prompt) - 1
        with torch.no_grad():
            scores = plain(input_ids=ids).logits[0].log_softmax(-1)
        expected.append(scores[range(first, first + len(gold)), gold].sum().item())
    without = greedy(own, tokenizer, prompts(), some_stops(plain), 12, packed_length)
    answers = greedy(own, tokenizer, prompts(), some_stops(plain), 12, packed_length, golds=golds)
    assert [a.text for a in answers] == [a.text for a in without]
    assert [a.log_probability for a in answers] == pytest.approx(
        [a.log_probability for a in without], rel=1e-4
    )
    assert [a.gold_log_probability for a in answers] == pytest.approx(expected, rel=1e-4)
    assert {a.gold_log_probability for a in without} == {None}


@pytest.mark.usefixtures("ids_for_texts")
def test_a_shared_context_is_read_once_and_an_ended_answer_no_further(
    models: tuple[PreTrainedModel, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    own, plain = models
    read: list[int] = []
    own.get_input_embeddings().register_forward_hook(lambda _, ids, __: read.append(ids[0].numel()))
    stops = some_stops(plain)
    answers = greedy(own, tokenizer, prompts(), stops, 12, 1000)
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
    own = load_model(windowed_folder, "tiny", {})
    plain = AutoModelForCausalLM.from_pretrained(windowed_folder)
    assert shares_context(own, 4)
    assert not shares_context(own, 60)
    stops = some_stops(plain)
    answers = greedy(own, tokenizer, prompts(), stops, 12, None)
    expected = [generated(plain, prompt, stops, 12)[0] for prompt in prompts()]
    assert [answer.text for answer in answers] == expected
    shared = greedy(own, tokenizer, prompts(), stops, 12, 1000)
    assert [answer.text for answer in shared] != expected  # it is right not to


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
    ("said", "text"),
    [(" Oslo\nQuestion", "Oslo"), ("\nOslo", ""), (" 3 May 1814<|endoftext|>", "3 May 1814")],
)
def test_an_answer_is_what_stands_before_the_newline(
    said: str, text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert text_of(tokenizer, tokenizer(said)["input_ids"]) == text


def test_spaces_before_punctuation_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    assert text_of(tokenizer, tokenizer(" a , b ' s")["input_ids"]) == "a , b ' s"
