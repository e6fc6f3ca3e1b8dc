"""Spans: the most probable ones of all, as trying each of them alone finds them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qa import prompt, search
from qa.decoding import text_of
from qa.model import load_model
from qa.prompt import Parts

CONTEXTS = (
    "In 1912, Ada built the mill of Oslo. The mill in Riga was opened by Ada.",
    "Hana (a bridge) left\nQuito in 1950; Hana built it.",
    "",
)
ASKED = ((0, "Who built the mill?"), (1, "Where?"), (0, "When?"), (2, "Why?"), (0, "Who?"))
STOPS = [0, 7, 9]


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[Parts]:
    """Questions over three contexts, of which one is empty."""
    head = prompt.head_ids(tokenizer)
    texts = [(prompt.context_text(CONTEXTS[c]), prompt.question_text(q)) for c, q in ASKED]
    return [Parts(head, *prompt.encode(tokenizer, pair)) for pair in texts]


def probability(model: Any, parts: Parts, ids: list[int]) -> float:
    """The log-probability of an answer and of any end behind it, by a plain model."""
    before = parts.prompt
    with torch.no_grad():
        scores = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
    of_ids = scores[range(len(before) - 1, len(before) + len(ids) - 1), ids].sum()
    return (of_ids + scores[-1, STOPS].logsumexp(-1)).item()


def candidates(
    tokenizer: PreTrainedTokenizerBase, context: str, longest: int
) -> set[tuple[int, ...]]:
    """All spans that begin with a word or sign, cut behind any of their tokens."""
    found = set()
    for line in context.split("\n"):
        for start in range(len(line)):
            inside = start and line[start - 1].isalnum() and line[start].isalnum()
            if not line[start].isspace() and not inside:
                ids = prompt.encode(tokenizer, [f" {line[start:]}"])[0]
                found |= {tuple(ids[:size]) for size in range(1, min(len(ids), longest) + 1)}
    return found


@pytest.mark.parametrize("kind", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("packed_length", [1, 1000])
def test_the_spans_are_the_most_probable_of_all(
    kind: str,
    packed_length: int,
    prompts: list[Parts],
    tokenizer: PreTrainedTokenizerBase,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "LIMIT", 1000)
    folder: Path = request.getfixturevalue(kind)
    own, plain = load_model(folder, "tiny", {}), AutoModelForCausalLM.from_pretrained(folder)
    found = search.most_probable_spans(own, tokenizer, prompts, STOPS, 5, packed_length, count=6)
    [nothing] = found[3]  # its context is empty
    assert nothing.text == ""
    assert nothing.log_probability == pytest.approx(probability(plain, prompts[3], []), abs=1e-4)
    for (context, _), parts, answers in zip(ASKED, prompts, found, strict=True):
        if not CONTEXTS[context]:
            continue
        every = {
            ids: probability(plain, parts, list(ids))
            for ids in candidates(tokenizer, CONTEXTS[context], 4)
        }
        best = sorted(every.values(), reverse=True)[: len(answers)]
        assert [a.log_probability for a in answers] == pytest.approx(best, abs=1e-4)
        for answer in answers:
            assert answer.text in CONTEXTS[context]
            alike = [v for ids, v in every.items() if text_of(tokenizer, ids) == answer.text]
            assert min(abs(v - answer.log_probability) for v in alike) < 1e-4
            assert answer.ended
    assert [len(answers) for answers in found] == [6, 6, 6, 1, 6]


def test_together_as_alone(
    gpt2_folder: Path, prompts: list[Parts], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(gpt2_folder, "tiny", {})
    together = search.most_probable_spans(model, tokenizer, prompts, STOPS, 8, 1000)
    for parts, answers in zip(prompts, together, strict=True):
        [alone] = search.most_probable_spans(model, tokenizer, [parts], STOPS, 8, 1000)
        assert [a.text for a in answers] == [a.text for a in alone]
        for one, other in zip(answers, alone, strict=True):
            assert math.isclose(one.log_probability, other.log_probability, abs_tol=1e-4)
