"""What is recorded of an answer, and the scores of all."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_or_full.evaluation.intervals import mean, mean_interval, share_interval
from lora_or_full.evaluation.squad_metric import exact_match, f1
from lora_or_full.generation.decoding import Answer

Prediction = dict[str, Any]


def prediction(row: Mapping[str, Any], answer: Answer | None) -> Prediction:
    """What is recorded of a question; without an `answer` it was not asked, and scores nothing."""
    text = answer.text if answer else ""
    return {
        "id": row["id"],
        "title": row["title"],
        "paragraph": row["paragraph"],
        "question": row["question"],
        "answers": row["answers"],
        "prediction": text,
        "log_probability": answer and answer.log_probability,
        "ended": answer is not None and answer.ended,
        "context_cut": row["context_cut"],
        "exact_match": exact_match(text, row["answers"]),
        "f1": f1(text, row["answers"]),
    }


def scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """EM and F1 (percent) with 95 % intervals over paragraphs."""
    paragraphs = [prediction["paragraph"] for prediction in predictions]
    matches = [prediction["exact_match"] for prediction in predictions]
    overlaps = [prediction["f1"] for prediction in predictions]
    return {
        "questions": len(predictions),
        "exact_match": mean(matches),
        "exact_match_interval": list(share_interval(matches, paragraphs)),
        "f1": mean(overlaps),
        "f1_interval": list(mean_interval(overlaps, paragraphs)),
    }
