"""Exact match and F1 of one answer, by SQuAD v1.1's official rules.

Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", and its
evaluation script for v1.1. Scores are percentages; the best of all gold answers counts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lowercase a text, and remove ASCII punctuation, English articles and extra white space."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Give 100.0 if the normalized prediction equals any normalized gold answer, else 0.0."""
    given = normalize(prediction)
    return 100.0 * any(given == normalize(answer) for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Word-overlap F1 of one prediction, in percent.

    Args:
        prediction: Generated answer, any text.
        answers: Gold answers, at least one.

    Returns:
        F1 with the best gold answer, 0.0 to 100.0; 0.0 if both texts are empty after normalization,
        as in the official script.
    """
    return max(_word_f1(prediction, answer) for answer in answers)


def _word_f1(prediction: str, answer: str) -> float:
    given, gold = normalize(prediction).split(), normalize(answer).split()
    shared = sum((Counter(given) & Counter(gold)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(given), shared / len(gold)
    return 100.0 * 2 * precision * recall / (precision + recall)
