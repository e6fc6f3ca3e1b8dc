"""Predictions (scored answers), and the scores of a test set."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

from lora_or_full.config.schema import Config
from lora_or_full.evaluation.metrics import metric
from lora_or_full.runs.schema import Prediction


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer."""

    text: str  # up to the first newline
    log_probability: float  # natural logarithm, the end token included
    ended: bool  # by itself
    reference_log_probability: float | None = None  # of the gold answer, if one was given


def prediction(row: Mapping[str, Any], answer: Answer | None, config: Config) -> Prediction:
    """Score an answer.

    Args:
        row: The question: id, title, paragraph, question, answers, context_cut.
        answer: None if the prompt was too long; it scores zero.
        config: Its `metrics` are computed by the rules of its `scoring`.
    """
    text, answers = answer.text if answer else "", row["answers"]
    scored = {name: metric(name).score(text, answers, config.scoring) for name in config.metrics}
    return cast(
        Prediction,
        {
            "id": row["id"],
            "title": row["title"],
            "paragraph": row["paragraph"],
            "question": row["question"],
            "answers": answers,
            "prediction": text,
            "log_probability": answer.log_probability if answer else None,
            "ended": answer is not None and answer.ended,
            "context_cut": row["context_cut"],
            **scored,
        },
    )


def values(predictions: Iterable[Prediction], name: str) -> list[float]:
    """Give a metric of each prediction, percent."""
    return [p[name] for p in predictions]  # type: ignore[literal-required]


def scores(predictions: Sequence[Prediction], metrics: Sequence[str]) -> dict[str, Any]:
    """Average the metrics (percent), with 95 % intervals over paragraphs."""
    paragraphs = [p["paragraph"] for p in predictions]
    found: dict[str, Any] = {"questions": len(predictions)}
    for name in metrics:
        own = values(predictions, name)
        found[name] = fmean(own)
        found[f"{name}_interval"] = list(metric(name).interval(own, paragraphs))
    return found
