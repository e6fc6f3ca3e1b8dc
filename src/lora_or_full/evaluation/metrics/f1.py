"""F1 of the words that an answer and a gold answer share, as the script of SQuAD v1.1 has it."""

from collections import Counter
from collections.abc import Sequence

from lora_or_full.evaluation.metrics import Metric
from lora_or_full.evaluation.scoring import normalize


def f1(prediction: str, answers: Sequence[str], scoring: str) -> float:
    """Word-overlap F1 of one prediction, in percent.

    Args:
        prediction: Generated answer, any text.
        answers: Gold answers, at least one.
        scoring: The rules that tell words, such as 'squad'.

    Returns:
        F1 with the best gold answer, 0.0 to 100.0; 0.0 if both texts are empty after normalization,
        as in the official script.
    """
    given = normalize(prediction, scoring).split()
    return max(_word_f1(given, normalize(answer, scoring).split()) for answer in answers)


def _word_f1(given: Sequence[str], gold: Sequence[str]) -> float:
    shared = sum((Counter(given) & Counter(gold)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(given), shared / len(gold)
    return 100.0 * 2 * precision * recall / (precision + recall)


METRIC = Metric("F1", f1)
