"""bench/decoding.py: each method finds what it is defined to find."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import decoding
import pytest
import torch
from decoding import Trie, beam, most_probable_span, read, span_trie

from lora_or_full.data.squad import Question
from lora_or_full.generation.decoding import text_of
from lora_or_full.generation.predictor import Predictor, load


@pytest.fixture(scope="module")
def run(finished_runs: dict[str, Path]) -> Predictor:
    return load(finished_runs["full"], None)


QUESTIONS = [
    Question("a", "t", "In 1200, Ada built the bridge of Oslo.", "Who?", ["Ada"], [9]),
    Question("b", "t", "In 1200, Ada built the bridge of Oslo.", "When was it?", ["1200"], [3]),
    Question("c", "t", "Oslo, Turin\nand Ada Ada.", "What is named?", ["Turin"], [6]),
]


def paths(trie: Trie, before: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    for token, below in trie.items():
        yield (*before, token)
        yield from paths(below, (*before, token))


@torch.no_grad()
def log_probability(run: Predictor, question: Question, ids: tuple[int, ...]) -> float:
    """Of `ids` and any end after them, in a separate pass over prompt and answer."""
    [parts] = run.prompt.tokens([(question.context, question.question)])
    given = parts.prompt
    logits = run.model(input_ids=torch.tensor([[*given, *ids]])).logits[0, len(given) - 1 :]
    scores = logits.log_softmax(-1)
    said = sum(scores[n, token].item() for n, token in enumerate(ids))
    return said + scores[-1, run.stops].logsumexp(-1).item()


def test_the_span_is_the_most_probable_of_all_scored_one_by_one(run: Predictor) -> None:
    for question, rows, scores, trie in read(run, QUESTIONS):
        all_spans = list(paths(trie))
        each = {ids: log_probability(run, question, ids) for ids in all_spans}
        best = max(all_spans, key=each.__getitem__)
        worst = min(all_spans, key=each.__getitem__)
        for known in (None, best, worst):
            start = known and decoding.Hypothesis(known, each[known], {}, 0, finished=True)
            found = most_probable_span(rows.copy(), scores, trie, start)
            assert found.ids == best
            assert found.log_probability == pytest.approx(each[best], abs=1e-4)


def test_spans_begin_with_words_or_signs_and_stay_within_a_line(run: Predictor) -> None:
    trie = span_trie(run.prompt, "Oslo, Turin\nand Ada", 12)
    texts = {text_of(run.tokenizer, ids) for ids in paths(trie)}
    assert {"Oslo", "Oslo,", ",", "Turin", "and", "Ada"} <= texts
    assert not any("Turin" in text and "and" in text for text in texts)
    assert max(map(len, paths(span_trie(run.prompt, "Oslo, Turin", 3)))) == 3


def test_a_beam_of_one_is_greedy_and_a_wider_one_is_no_less_probable(run: Predictor) -> None:
    for (_, rows, scores, _), (_, answer) in zip(
        read(run, QUESTIONS), run.answers(QUESTIONS), strict=True
    ):
        (greedy,) = beam(rows.copy(), scores, run.config.max_new_tokens, 1)
        assert answer is not None
        assert text_of(run.tokenizer, greedy.ids) == answer.text
        assert greedy.finished == answer.ended
        several = beam(rows.copy(), scores, run.config.max_new_tokens, 5)
        assert len({one.ids for one in several}) == len(several) == 5
        assert several[0].log_probability >= greedy.log_probability - 1e-4
        # Of one token all can be tried.
        first, *_ = beam(rows.copy(), scores, 1, 2)
        assert first.log_probability == pytest.approx(scores.max().item())


def test_the_command_writes_a_row_for_each_validation_question(
    finished_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "decoding.csv"
    run = finished_runs["full"]
    monkeypatch.setattr("sys.argv", ["decoding.py", str(run), f"--output={output}"])
    decoding.main()
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    results = json.loads((run / "results.json").read_text())
    best = results["epochs"][results["best_epoch"] - 1]
    assert len(rows) == results["data"]["validation"]["questions"]
    for metric in ("exact_match", "f1"):
        mean = sum(float(row[f"greedy_{metric}"]) for row in rows) / len(rows)
        assert mean == pytest.approx(best[metric], abs=0.01)
