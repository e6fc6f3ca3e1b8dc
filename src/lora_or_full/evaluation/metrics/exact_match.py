"""Exact match, as the script of SQuAD v1.1 has it."""

from collections.abc import Sequence

from lora_or_full.evaluation.intervals import share_interval
from lora_or_full.evaluation.metrics import Metric
from lora_or_full.evaluation.scoring import normalize


def exact_match(prediction: str, answers: Sequence[str], scoring: str) -> float:
    """Give 100.0 if the normalized prediction equals any normalized gold answer, else 0.0."""
    given = normalize(prediction, scoring)
    return 100.0 * any(given == normalize(answer, scoring) for answer in answers)


METRIC = Metric("EM", exact_match, share_interval)
