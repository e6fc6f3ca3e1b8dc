"""Classes of wrong answers, counts by group, calibration, and risk against coverage."""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from statistics import fmean

from lora_or_full.evaluation.scoring import SQUAD, normalize
from lora_or_full.runs.schema import Prediction

EXTRA, PART = "extra words around a gold answer", "part of a gold answer"
SPAN, ELSEWHERE = "wrong span of the context", "not in the context"
EMPTY, ENDLESS, CUT = "empty", "never ended", "context was cut"
CLASSES = (EXTRA, PART, SPAN, ELSEWHERE, EMPTY, ENDLESS, CUT)
QUESTION_WORDS = ("what", "who", "when", "where", "which", "why", "how")
OTHER = "other"
FORMS = {"whom": "who", "whose": "who", "whos": "who", "whats": "what", "wheres": "where"}
PREPOSITIONS = (
    "about", "after", "at", "before", "by", "during", "for", "from", "in", "into", "of", "on",
    "since", "to", "under", "until", "with", "within",
)  # fmt: skip
ANSWER_WORDS = ("1", "2", "3 to 5", "6 or more")
CONTEXT_WORDS = ("under 50", "under 100", "under 150", "under 200", "200 or more")
GROUPS = ("", *sorted((*QUESTION_WORDS, OTHER)), *ANSWER_WORDS, *CONTEXT_WORDS)  # in order
BINS = 10  # of probability, for the calibration
STEPS = 20  # of coverage


def failure(prediction: Prediction, context: str, scoring: str) -> str | None:
    """Classify a wrong answer by the first class that fits; None for an exact match.

    Words are compared as the score compares them, by the rules of `scoring`.
    """
    if prediction["exact_match"]:
        return None
    said = normalize(prediction["prediction"], scoring)
    references = [normalize(text, scoring) for text in prediction["answers"]]
    if not said:
        return EMPTY
    if not prediction["ended"]:
        return ENDLESS
    if any(_within(words, said) for words in references):
        return EXTRA
    if any(_within(said, words) for words in references):
        return PART
    if prediction["context_cut"]:
        return CUT
    return SPAN if _within(said, normalize(context, scoring)) else ELSEWHERE


def _within(part: str, whole: str) -> bool:
    """Whether a normalized text has the words of another one, in a row."""
    return f" {part} " in f" {whole} "


def question_word(question: str) -> str:
    """Give the question word, or 'other'.

    It is the first one that begins the question or follows a preposition ("in which"), else the
    last: one in the middle mostly begins a clause ("the town where … is called what").
    """
    words = [FORMS.get(word, word) for word in normalize(question, SQUAD).split()]
    asking = [n for n, word in enumerate(words) if word in QUESTION_WORDS]
    leading = [n for n in asking if n == 0 or words[n - 1] in PREPOSITIONS]
    return words[(leading[:1] or asking[-1:])[0]] if asking else OTHER


def answer_words(prediction: Prediction, scoring: str) -> str:
    """Group by the number of words of the shortest gold answer."""
    words = min(_words(text, scoring) for text in prediction["answers"])
    return ANSWER_WORDS[bisect_left((1, 2, 5), words)]


def context_words(context: str, scoring: str) -> str:
    """Group by the number of words of the context."""
    return CONTEXT_WORDS[bisect_right((50, 100, 150, 200), _words(context, scoring))]


def _words(text: str, scoring: str) -> int:
    """The number of words; by MLQA's rules those that are scored, since spaces may be missing."""
    return len((text if scoring == SQUAD else normalize(text, scoring)).split())


@dataclass(frozen=True, slots=True)
class Share:
    """A group of questions."""

    group: str
    questions: int  # of a run
    exact_match: float  # mean, percent
    f1: float  # mean, percent
    classes: dict[str, float]  # wrong answers per run, by class


def shares(
    groups: Sequence[str],
    runs: Sequence[Sequence[Prediction]],
    classes: Sequence[Sequence[str | None]],
) -> list[Share]:
    """Score each group of questions.

    Args:
        groups: Group of each question, of GROUPS.
        runs: Predictions of each run, in the order of the questions.
        classes: Their classes (`failure`).
    """
    found = []
    for group in sorted(set(groups), key=GROUPS.index):
        own = [number for number, name in enumerate(groups) if name == group]
        answers = [run[number] for run in runs for number in own]
        counts = Counter(run[number] for run in classes for number in own)
        of_class = {name: counts[name] / len(runs) for name in CLASSES}
        exact_match, f1 = fmean(p["exact_match"] for p in answers), fmean(p["f1"] for p in answers)
        found.append(Share(group, len(own), exact_match, f1, of_class))
    return found


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers whose probability lies in one tenth: mean probability and EM (percent)."""

    answers: int
    probability: float
    exact_match: float


def calibration(predictions: Iterable[Prediction]) -> tuple[list[Bin], float]:
    """Give EM by probability, and the expected calibration error (percent; Guo et al., 2017).

    The probability of an answer is the product of its tokens'. A question whose prompt was too long
    has none, and does not count.
    """
    inside: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for p in predictions:
        if p["log_probability"] is not None:
            probability = math.exp(min(0.0, p["log_probability"]))
            inside[min(BINS - 1, int(BINS * probability))].append((probability, p["exact_match"]))
    bins = [
        Bin(len(own), 100 * fmean(p for p, _ in own), fmean(match for _, match in own))
        for own in inside
        if own
    ]
    apart = sum(b.answers * abs(b.probability - b.exact_match) for b in bins)
    return bins, apart / max(1, sum(b.answers for b in bins))


def risk_coverage(predictions: Sequence[Prediction]) -> tuple[list[float], float]:
    """Give EM of the most confident answers, and the area under the risk-coverage curve.

    Answers of equal probability each count as their mean. Unanswered questions come last.

    Returns:
        EM (percent) of the most confident twentieth of the answers, of two twentieths, up to all;
        and the area (percent): the mean share of wrong answers among the most confident ones, over
        all their numbers (Geifman et al., 2019).
    """
    right: list[float] = []
    for _, same in groupby(sorted(predictions, key=_confidence, reverse=True), _confidence):
        matches = [p["exact_match"] for p in same]  # each 0 or 100
        right += [fmean(matches)] * len(matches)
    share = [total / count for count, total in enumerate(accumulate(right), 1)]
    ends = [math.ceil(len(share) * step / STEPS) for step in range(1, STEPS + 1)]
    return [share[end - 1] for end in ends], 100 - fmean(share)


def _confidence(prediction: Prediction) -> float:
    value = prediction["log_probability"]
    return -math.inf if value is None else value
