"""ROUGE-L: the longest common subsequence of words (Lin, 2004), by torchmetrics."""

from collections.abc import Sequence
from typing import Any

from lora_or_full.evaluation.metrics import Metric
from lora_or_full.evaluation.scoring import SQUAD, normalize


def rouge_l(prediction: str, answers: Sequence[str], scoring: str) -> float:
    """Give ROUGE-L's F measure with the best gold answer, 0.0 to 100.0.

    Words are those of ROUGE's own script (a to z and digits, articles included), or of the rules of
    `scoring` where these are not SQuAD's.
    """
    from torchmetrics.functional.text import rouge_score  # takes seconds, and torch

    words: dict[str, Any] = {} if scoring == SQUAD else {
        "normalizer": lambda text: normalize(text, scoring), "tokenizer": str.split,
    }  # fmt: skip
    found = rouge_score(prediction, [list(answers)], "best", rouge_keys="rougeL", **words)
    return 100.0 * found["rougeL_fmeasure"].item()


METRIC = Metric("ROUGE-L", rouge_l)
