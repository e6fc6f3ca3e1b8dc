"""Compare decoding methods with the same weights: greedy, beam search, the most probable span.

python bench/decoding.py RUN --output=decoding.csv

RUN is a finished run of this project; its validation questions are answered. Greedy decoding and
beam search may generate any text; the span search finds the most probable span of the context,
exactly. --output gets a row per question: score and log-probability of each method's answer, and
whether the greedy answer is a span of the context.
"""

import argparse
import csv
import itertools
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchmetrics.functional.classification import binary_auroc

from lora_or_full.data.prompt import Prompt
from lora_or_full.data.splits import Splits
from lora_or_full.data.squad import Question, fingerprint
from lora_or_full.errors import UserError, command_line_errors
from lora_or_full.evaluation.metrics.exact_match import exact_match
from lora_or_full.evaluation.metrics.f1 import f1
from lora_or_full.evaluation.scoring import SQUAD
from lora_or_full.evaluation.spans import spans
from lora_or_full.generation.decoding import text_of
from lora_or_full.generation.kv_cache import PaddedCache
from lora_or_full.generation.predictor import Predictor, load, quiet_transformers
from lora_or_full.modeling.precision import autocast_for
from lora_or_full.report.stats.paired import paragraph_bootstrap
from lora_or_full.runs.reader import finished_record

BEAM = 5
WORD = re.compile(r"\w+|[^\w\s]")  # spans begin with a word or a sign
CHARACTERS = 8  # of a token, an upper bound of the average: longer spans are not searched
METHODS = "greedy", "beam", "beam_per_token", "span", "span_if_not_in_context"

Trie = dict[int, Any]  # next token -> the trie of what may follow it


@dataclass(frozen=True)
class Hypothesis:
    """The beginning of an answer, or a finished one.

    Attributes:
        ids: Its tokens.
        log_probability: Natural logarithm; with the end if it is finished.
        trie: What may follow; None for any token.
        row: Row of the cache that holds all its tokens but the last.
        finished: Whether it has ended.
    """

    ids: tuple[int, ...]
    log_probability: float
    trie: Trie | None
    row: int
    finished: bool = False


class Rows:
    """Rows that grow after the same prompt, and the tokens that end them."""

    def __init__(self, backend: PaddedCache, stops: Sequence[int]) -> None:
        self.backend, self.stops = backend, stops

    def copy(self) -> "Rows":
        return Rows(self.backend.copy(), self.stops)

    def step(self, growing: Sequence[Hypothesis]) -> torch.Tensor:
        """Make each hypothesis (B) a row with its last token, and give the `scores` after it."""
        device = self.backend.model.device
        self.backend.select(torch.tensor([one.row for one in growing], device=device))
        tokens = torch.tensor([one.ids[-1:] for one in growing], device=device)  # (B, 1)
        return self.scores(self.backend.append(tokens))

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, vocabulary), where the first stop stands for any of them."""
        scores = logits.float().log_softmax(-1)
        ends = scores[:, self.stops].logsumexp(-1)
        scores[:, self.stops] = float("-inf")
        scores[:, self.stops[0]] = ends
        return scores


def beam(rows: Rows, scores: torch.Tensor, max_new_tokens: int, width: int) -> list[Hypothesis]:
    """Search with a beam; a width of one is greedy decoding.

    Args:
        rows: One row, the prompt.
        scores: Of the first token (1, vocabulary).
        max_new_tokens: Largest number of tokens of an answer.
        width: Hypotheses to keep.

    Returns:
        The hypotheses, the most probable first.
    """
    pool = [Hypothesis((), 0.0, None, 0)]
    for left in reversed(range(max_new_tokens)):
        growing = [one for one in pool if not one.finished]
        pool = [one for one in pool if one.finished]
        for row, one in enumerate(growing):
            best = scores[row].topk(width).indices.tolist()
            pool += extensions(one, row, scores[row], best, rows.stops[0])
        pool = sorted(pool, key=lambda one: -one.log_probability)[:width]
        growing = [one for one in pool if not one.finished]
        if not growing or not left:
            break
        scores = rows.step(growing)
    return pool


def most_probable_span(
    rows: Rows, scores: torch.Tensor, trie: Trie, known: Hypothesis | None
) -> Hypothesis:
    """Find the most probable finished path of a trie, exactly (branch and bound).

    A path is at most as probable as its beginning. So only beginnings are extended that are more
    probable than the best finished path so far, first the one that is greedy within the trie.

    Args:
        rows: One row, the prompt.
        scores: Of the first token (1, vocabulary).
        trie: The spans.
        known: A finished path, if one is known.
    """
    greedy = known or search_trie(rows.copy(), scores, trie, None, 1)
    return search_trie(rows, scores, trie, greedy, None)


def search_trie(
    rows: Rows, scores: torch.Tensor, trie: Trie, best: Hypothesis | None, width: int | None
) -> Hypothesis:
    """Find the best finished path of a trie.

    Args:
        rows: One row, the prompt.
        scores: Of the first token (1, vocabulary).
        trie: The paths.
        best: A finished path to improve on.
        width: Beginnings to extend at once; None for all that can lead to a better path.
    """
    growing = [Hypothesis((), 0.0, trie, 0)]
    while growing:
        found: list[Hypothesis] = []
        for row, one in enumerate(growing):
            assert one.trie is not None
            may_end = [rows.stops[0]] if one.ids or not one.trie else []
            found += extensions(one, row, scores[row], [*one.trie, *may_end], rows.stops[0])
        finished = [one for one in [*found, best] if one and one.finished]
        best = max(finished, key=lambda one: one.log_probability, default=None)
        bound = best.log_probability if best else float("-inf")
        growing = [one for one in found if not one.finished and one.log_probability > bound]
        growing = sorted(growing, key=lambda one: -one.log_probability)[:width]
        if growing:
            scores = rows.step(growing)
    assert best is not None
    return best


def extensions(
    one: Hypothesis, row: int, scores: torch.Tensor, tokens: list[int], end: int
) -> Iterator[Hypothesis]:
    """Extend a hypothesis by each of some tokens; `end` finishes it."""
    for token, score in zip(tokens, scores[tokens].tolist(), strict=True):
        value = one.log_probability + score
        if token == end:
            yield Hypothesis(one.ids, value, one.trie, row, finished=True)
        else:
            below = None if one.trie is None else one.trie[token]
            yield Hypothesis((*one.ids, token), value, below, row)


def span_trie(prompt: Prompt, context: str, longest: int) -> Trie:
    """Spans of a context within a line, of at most `longest` tokens, tokenized as answers."""
    characters = CHARACTERS * longest
    starts = [match.start() for match in WORD.finditer(context)]
    texts = [context[start : start + characters].split("\n")[0] for start in starts]
    trie: Trie = {}
    for text, (*ids, _) in zip(texts, prompt.answers(texts), strict=True):
        cut = len(text) == characters  # perhaps in the middle of a token
        below = trie
        for token in ids[: len(ids) - cut][:longest]:
            below = below.setdefault(token, {})
    return trie


def per_token(one: Hypothesis) -> float:
    """Log-probability divided by the number of tokens, the end included."""
    return one.log_probability / (len(one.ids) + one.finished)


def contains(trie: Trie, ids: Sequence[int]) -> bool:
    """Whether token ids are a path of a trie."""
    for token in ids:
        if token not in trie:
            return False
        trie = trie[token]
    return bool(ids)


def read(
    run: Predictor, questions: Sequence[Question]
) -> Iterator[tuple[Question, Rows, torch.Tensor, Trie]]:
    """Read questions, adjacent ones of a context over one reading of it.

    Yields:
        The question, its row, the scores after it (1, vocabulary), and the spans of its context.
    """
    for context, group in itertools.groupby(questions, key=lambda q: q.context):
        session = run.read(context)
        trie = span_trie(run.prompt, context, run.config.max_new_tokens - 1)
        for question in group:
            backend, logits = session.continuation(question.question)
            rows = Rows(backend, run.stops)
            yield question, rows, rows.scores(logits), trie


def answered(run: Predictor, questions: Sequence[Question]) -> tuple[list[dict[str, Any]], str]:
    """Answer and score questions by each of METHODS.

    Returns:
        A row of --output per question, and how long each method took, as a sentence.
    """
    table: list[dict[str, Any]] = []
    seconds = np.zeros(3)
    paragraphs: dict[str, int] = {}
    console = Console(stderr=True)
    asked = track(
        read(run, questions), run.label, len(questions), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    for question, rows, scores, trie in asked:
        times = [time.perf_counter()]
        (greedy,) = beam(rows.copy(), scores, run.config.max_new_tokens, 1)
        times.append(time.perf_counter())
        several = beam(rows.copy(), scores, run.config.max_new_tokens, BEAM)
        times.append(time.perf_counter())
        known = greedy if greedy.finished and contains(trie, greedy.ids) else None
        span = most_probable_span(rows.copy(), scores, trie, known)
        times.append(time.perf_counter())
        seconds += np.diff(times)
        text = text_of(run.tokenizer, greedy.ids)
        in_context = bool(spans(text, question.context))
        found = {
            "greedy": greedy,
            "beam": several[0],
            "beam_per_token": max(several, key=per_token),
            "span": span,
            "span_if_not_in_context": greedy if in_context else span,
        }
        row: dict[str, Any] = {
            "paragraph": paragraphs.setdefault(question.context, len(paragraphs)),
            "greedy_in_context": int(in_context),
        }
        for method in METHODS:
            answer = text_of(run.tokenizer, found[method].ids)
            row[f"{method}_exact_match"] = exact_match(answer, question.answers, SQUAD)
            row[f"{method}_f1"] = round(f1(answer, question.answers, SQUAD), 2)
            row[f"{method}_log_probability"] = round(found[method].log_probability, 4)
        table.append(row)
    took = (
        f"Seconds after the prompts: greedy {seconds[0]:.0f}, beam {seconds[1]:.0f}, "
        f"span {seconds[2]:.0f} (after the greedy answer)."
    )
    return table, took


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Summarize each method.

    Scores, their difference from greedy with a 95 % interval over paragraphs, and how well the
    answer's probability separates exact matches from other answers (AUROC).
    """
    table = Table("", "EM", "from greedy", "F1", "from greedy", "AUROC")
    paragraphs = [row["paragraph"] for row in rows]
    for method in METHODS:
        cells = []
        for metric in ("exact_match", "f1"):
            own = np.array([row[f"{method}_{metric}"] for row in rows])
            greedy = np.array([row[f"greedy_{metric}"] for row in rows])
            of = paragraph_bootstrap((own - greedy)[None], paragraphs)
            interval = "" if of.interval is None else "[{:+.1f}, {:+.1f}]".format(*of.interval)
            cells += [f"{own.mean():.1f}", f"{of.mean:+.1f} {interval}"]
        sure = torch.tensor([math.exp(row[f"{method}_log_probability"]) for row in rows])
        right = torch.tensor([row[f"{method}_exact_match"] > 0 for row in rows]).int()
        both = 0 < right.sum() < len(right)  # else there is nothing to separate
        table.add_row(method, *cells, f"{binary_auroc(sure, right):.3f}" if both else "")
    return table


@command_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("decoding.csv"))
    args = parser.parse_args()
    quiet_transformers()
    record = finished_record(args.run)
    config = record.config
    splits = Splits(config.data, config.seed, Path(config.cache_dir)).read().splits
    questions = splits["validation"]
    if fingerprint(questions) != record.data.validation.fingerprint:
        raise UserError(f"{config.data.path}: the questions are not those of {args.run}.")
    run = load(args.run, None)
    with autocast_for(run.config.trainer.precision, run.model.device):
        rows, took = answered(run, sorted(questions, key=lambda q: (q.context, q.id)))
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    share = sum(row["greedy_in_context"] for row in rows) / len(rows)
    Console().print(table_of(rows))
    print(f"{share:.1%} of the greedy answers are spans of their context. {took}")


if __name__ == "__main__":
    main()
