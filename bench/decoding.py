"""Ways to find an answer with the same weights, held against each other.

python bench/decoding.py RUN --output=decoding.csv

RUN is a finished run of this project. Its validation questions are answered greedily, by a beam,
which may say anything, and by the most probable span of the context, found exactly. --output has a
row for each question: what each backend scored and how sure it was, and whether the greedy answer
stands in the context.
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
from transformers import PreTrainedTokenizerBase

from lora_or_full.data import prompt
from lora_or_full.data.splits import Splits
from lora_or_full.data.squad import Question, fingerprint
from lora_or_full.errors import UserError, command_line_errors
from lora_or_full.evaluation.spans import spans
from lora_or_full.evaluation.squad_metric import exact_match, f1
from lora_or_full.generation.context_session import Continuation
from lora_or_full.generation.decoding import text_of
from lora_or_full.generation.predictor import Predictor, load, quiet_transformers
from lora_or_full.modeling.precision import autocast_for
from lora_or_full.report.stats.paired import paragraph_bootstrap
from lora_or_full.runs.reader import finished_record

BEAM = 5
WORD = re.compile(r"\w+|[^\w\s]")  # where spans begin
CHARACTERS = 8  # of a token, at most on average: a longer span is not looked at
WAYS = "greedy", "beam", "beam_per_token", "span", "span_if_not_in_context"

Tree = dict[int, Any]  # the tokens that may come next, and what may come behind each


@dataclass(frozen=True)
class Beginning:
    """Of an answer: its tokens, their log-probability, what may come behind (None: anything), the
    row of the cache that holds all but its last token, and whether it is whole, with its end."""

    ids: tuple[int, ...]
    log_probability: float
    tree: Tree | None
    row: int
    whole: bool = False


class Behind:
    """Rows that grow behind a question, and the tokens that end them."""

    def __init__(self, rows: Continuation, stops: Sequence[int]) -> None:
        self.rows, self.stops = rows, stops

    def copy(self) -> "Behind":
        return Behind(self.rows.copy(), self.stops)

    def step(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """The `scores` behind tokens (B, T) of the kept rows (B)."""
        self.rows.select(torch.tensor(rows, device=self.rows.model.device))
        return self.scores(self.rows.read(torch.tensor(tokens, device=self.rows.model.device)))

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, vocabulary); that of the first stop is of any of them."""
        scores = logits.float().log_softmax(-1)
        ends = scores[:, self.stops].logsumexp(-1)
        scores[:, self.stops] = float("-inf")
        scores[:, self.stops[0]] = ends
        return scores


def beam(behind: Behind, scores: torch.Tensor, max_new_tokens: int, width: int) -> list[Beginning]:
    """The most probable first, of the `width` answers that a beam search keeps; `scores` (1,
    vocabulary) stand behind the question. With a width of one it is greedy."""
    pool = [Beginning((), 0.0, None, 0)]
    for left in reversed(range(max_new_tokens)):
        growing = [one for one in pool if not one.whole]
        pool = [one for one in pool if one.whole]
        for row, one in enumerate(growing):
            pool += longer(one, row, scores[row], scores[row].topk(width).indices.tolist(), behind)
        pool = sorted(pool, key=lambda one: -one.log_probability)[:width]
        growing = [one for one in pool if not one.whole]
        if not growing or not left:
            break
        scores = behind.step([one.row for one in growing], [one.ids[-1:] for one in growing])
    return pool


def most_probable_span(
    behind: Behind, scores: torch.Tensor, tree: Tree, known: Beginning | None
) -> Beginning:
    """The path of `tree` that is the most probable with an end behind it; `known` is a whole one,
    if any is known.

    A path is at most as probable as what it begins with: all beginnings are followed that are more
    probable than the best whole path so far, at first that which is greedy within the tree.
    """
    greedy = known or followed(behind.copy(), scores, tree, None, 1)
    return followed(behind, scores, tree, greedy, None)


def followed(
    behind: Behind, scores: torch.Tensor, tree: Tree, best: Beginning | None, width: int | None
) -> Beginning:
    """The best whole path of `tree` that is found behind so many beginnings side by side (None:
    behind all that may lead to a better one than `best`)."""
    growing = [Beginning((), 0.0, tree, 0)]
    while growing:
        found: list[Beginning] = []
        for row, one in enumerate(growing):
            assert one.tree is not None
            may_end = [behind.stops[0]] if one.ids or not one.tree else []
            found += longer(one, row, scores[row], [*one.tree, *may_end], behind)
        whole = [one for one in [*found, best] if one and one.whole]
        best = max(whole, key=lambda one: one.log_probability, default=None)
        bound = best.log_probability if best else float("-inf")
        growing = [one for one in found if not one.whole and one.log_probability > bound]
        growing = sorted(growing, key=lambda one: -one.log_probability)[:width]
        if growing:
            scores = behind.step([one.row for one in growing], [one.ids[-1:] for one in growing])
    assert best is not None
    return best


def longer(
    one: Beginning, row: int, scores: torch.Tensor, tokens: list[int], behind: Behind
) -> Iterator[Beginning]:
    """`one` with each of `tokens` behind it, of which the first of the stops makes it whole."""
    for token, score in zip(tokens, scores[tokens].tolist(), strict=True):
        value = one.log_probability + score
        if token == behind.stops[0]:
            yield Beginning(one.ids, value, one.tree, row, whole=True)
        else:
            below = None if one.tree is None else one.tree[token]
            yield Beginning((*one.ids, token), value, below, row)


def span_tree(tokenizer: PreTrainedTokenizerBase, context: str, longest: int) -> Tree:
    """The spans of `context` that begin with a word or a sign and lie in a line, of at most
    `longest` tokens, as an answer is tokenized."""
    characters = CHARACTERS * longest
    starts = [match.start() for match in WORD.finditer(context)]
    texts = [context[start : start + characters].split("\n")[0] for start in starts]
    tree: Tree = {}
    for text, ids in zip(
        texts, prompt.encode(tokenizer, [prompt.answer_text(t) for t in texts]), strict=True
    ):
        cut = len(text) == characters  # perhaps in the middle of a token
        below = tree
        for token in ids[: len(ids) - cut][:longest]:
            below = below.setdefault(token, {})
    return tree


def per_token(one: Beginning) -> float:
    return one.log_probability / (len(one.ids) + one.whole)


def holds(tree: Tree, ids: Sequence[int]) -> bool:
    """Whether `ids` are a path of `tree`."""
    for token in ids:
        if token not in tree:
            return False
        tree = tree[token]
    return bool(ids)


def read(
    run: Predictor, questions: Sequence[Question]
) -> Iterator[tuple[Question, Behind, torch.Tensor, Tree]]:
    """Each question, the row and scores (1, vocabulary) behind it, and the spans of its context,
    which is read once for the questions that stand together."""
    for context, group in itertools.groupby(questions, key=lambda q: q.context):
        session = run.read(context)
        tree = span_tree(run.tokenizer, context, run.config.max_new_tokens - 1)
        for question in group:
            rows, logits = session.continuation(question.question)
            behind = Behind(rows, run.stops)
            yield question, behind, behind.scores(logits), tree


def answered(run: Predictor, questions: Sequence[Question]) -> tuple[list[dict[str, Any]], str]:
    """What each of WAYS says to each question, scored; and how long each took, in words."""
    rows: list[dict[str, Any]] = []
    seconds = np.zeros(3)
    paragraphs: dict[str, int] = {}
    console = Console(stderr=True)
    asked = track(
        read(run, questions), run.label, len(questions), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    for question, behind, scores, tree in asked:
        times = [time.perf_counter()]
        (greedy,) = beam(behind.copy(), scores, run.config.max_new_tokens, 1)
        times.append(time.perf_counter())
        several = beam(behind.copy(), scores, run.config.max_new_tokens, BEAM)
        times.append(time.perf_counter())
        known = greedy if greedy.whole and holds(tree, greedy.ids) else None
        span = most_probable_span(behind.copy(), scores, tree, known)
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
        for kind in WAYS:
            said = text_of(run.tokenizer, found[kind].ids)
            row[f"{kind}_exact_match"] = exact_match(said, question.answers)
            row[f"{kind}_f1"] = round(f1(said, question.answers), 2)
            row[f"{kind}_log_probability"] = round(found[kind].log_probability, 4)
        rows.append(row)
    took = (
        f"Seconds behind the prompts: greedy {seconds[0]:.0f}, beam {seconds[1]:.0f}, "
        f"span {seconds[2]:.0f} behind the greedy answer."
    )
    return rows, took


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The scores of each kind of decoding, their difference from greedy with an interval over
    paragraphs, and how well its probability tells exact matches from others (AUROC)."""
    table = Table("", "EM", "from greedy", "F1", "from greedy", "AUROC")
    paragraphs = [row["paragraph"] for row in rows]
    for kind in WAYS:
        cells = []
        for metric in ("exact_match", "f1"):
            own = np.array([row[f"{kind}_{metric}"] for row in rows])
            greedy = np.array([row[f"greedy_{metric}"] for row in rows])
            of = paragraph_bootstrap((own - greedy)[None], paragraphs)
            interval = "" if of.interval is None else "[{:+.1f}, {:+.1f}]".format(*of.interval)
            cells += [f"{own.mean():.1f}", f"{of.mean:+.1f} {interval}"]
        sure = torch.tensor([math.exp(row[f"{kind}_log_probability"]) for row in rows])
        right = torch.tensor([row[f"{kind}_exact_match"] > 0 for row in rows]).int()
        told = 0 < right.sum() < len(right)  # else there is nothing to tell
        table.add_row(kind, *cells, f"{binary_auroc(sure, right):.3f}" if told else "")
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
    splits, _ = Splits(config.data, config.seed, Path(config.cache_dir)).read()
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
    print(f"{share:.1%} of the greedy answers stand in their context. {took}")


if __name__ == "__main__":
    main()
