"""Predictions (scored answers), and the scores of a test set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lora_or_full.evaluation.intervals import mean_interval, share_interval
from lora_or_full.evaluation.metrics.exact_match import exact_match
from lora_or_full.evaluation.metrics.f1 import f1
from lora_or_full.runs.schema import METRICS, Prediction


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer."""

    text: str  # up to the first newline
    log_probability: float  # natural logarithm, the end token included
    ended: bool  # by itself
    reference_log_probability: float | None = None  # of the gold answer, if one was given


def prediction(row: Mapping[str, Any], answer: Answer | None, scoring: str) -> Prediction:
    """Score an answer.

    Args:
        row: The question: id, title, paragraph, question, answers, context_cut.
        answer: None if the prompt was too long; it scores zero.
        scoring: The rules of the scores (`scoring.normalize`).
    """
    text = answer.text if answer else ""
    return {
        "id": row["id"],
        "title": row["title"],
        "paragraph": row["paragraph"],
        "question": row["question"],
        "answers": row["answers"],
        "prediction": text,
        "log_probability": answer.log_probability if answer else None,
        "ended": answer is not None and answer.ended,
        "context_cut": row["context_cut"],
        "exact_match": exact_match(text, row["answers"], scoring),
        "f1": f1(text, row["answers"], scoring),
    }


def scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Average EM and F1 (percent), with 95 % intervals over paragraphs."""
    paragraphs = [p["paragraph"] for p in predictions]
    matches, overlaps = ([p[metric] for p in predictions] for metric in METRICS)
    return {
        "questions": len(predictions),
        "exact_match": fmean(matches),
        "exact_match_interval": list(share_interval(matches, paragraphs)),
        "f1": fmean(overlaps),
        "f1_interval": list(mean_interval(overlaps, paragraphs)),
    }
