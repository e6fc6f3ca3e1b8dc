"""Every wrong answer falls into one class, and groups are counted right."""

from typing import Any

import pytest

from lora_or_full.evaluation.metrics.exact_match import exact_match
from lora_or_full.evaluation.metrics.f1 import f1
from lora_or_full.report import failure_classes
from lora_or_full.report.failure_classes import CUT, ELSEWHERE, EMPTY, ENDLESS, EXTRA, PART, SPAN

CONTEXT = "The Denver Broncos beat the Carolina Panthers 24-10 at Levi's Stadium in Santa Clara."


def prediction(text: str, golds: list[str], **more: Any) -> dict[str, Any]:
    return {
        "question": "Who won?", "answers": golds, "prediction": text, "ended": True,
        "context_cut": False, "log_probability": -0.5, "paragraph": 0,
        "exact_match": exact_match(text, golds, "squad"), "f1": f1(text, golds, "squad"),
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("text", "golds", "more", "expected"),
    [
        ("the Denver Broncos", ["Denver Broncos"], {}, None),
        ("", ["Denver Broncos"], {}, EMPTY),
        ("the.", ["Denver Broncos"], {}, EMPTY),  # nothing is left of it to compare
        ("Denver Broncos and so on", ["Denver Broncos"], {"ended": False}, ENDLESS),
        ("Carolina Panthers 24-10", ["Carolina Panthers"], {}, EXTRA),
        ("Broncos", ["no", "Denver Broncos"], {}, PART),
        ("Levi's Stadium", ["Santa Clara"], {}, SPAN),
        ("LEVIS stadium", ["Santa Clara"], {}, SPAN),
        ("Levi's Stadium", ["Santa Clara"], {"context_cut": True}, CUT),
        ("Clara Levi's", ["the game"], {}, ELSEWHERE),
        ("Levi", ["the game"], {}, ELSEWHERE),  # words, not letters
        ("New York", ["the"], {}, ELSEWHERE),  # a gold of which nothing is left is in no answer
    ],
)  # fmt: skip
def test_the_class_of_an_answer(
    text: str, golds: list[str], more: dict[str, Any], expected: str | None
) -> None:
    assert failure_classes.failure(prediction(text, golds, **more), CONTEXT, "squad") == expected


def test_each_wrong_answer_is_counted_once_and_the_mean_is_over_runs() -> None:
    wrong = prediction("Levi's Stadium", ["Santa Clara"])
    right = prediction("Santa Clara", ["Santa Clara"])
    runs = [[wrong, wrong], [wrong, right]]
    classes = [[failure_classes.failure(p, CONTEXT, "squad") for p in run] for run in runs]
    [share] = failure_classes.shares(["", ""], runs, classes)
    found = share.classes
    assert found[SPAN] == 1.5
    assert sum(found.values()) == 1.5
    assert tuple(found) == failure_classes.CLASSES


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Who won?", "who"), ("In WHAT year?", "what"), ("Name it.", "other"), ("", "other"),
        ("To which of whom?", "which"), ("To whom did it go?", "who"), ("Who's there?", "who"),
        ("The town where it stood had what name?", "what"), ("Who saw what?", "who"),
    ],
)  # fmt: skip
def test_the_word_that_asks(question: str, word: str) -> None:
    assert failure_classes.question_word(question) == word


def test_groups_stand_in_the_order_of_their_numbers() -> None:
    groups = ["200 or more", "under 50", "under 200", "under 100", "under 50"]
    run = [{"exact_match": 100.0 * n, "f1": 50.0} for n in (0, 1, 0, 0, 0)]
    found = failure_classes.shares(groups, [run, run], [[None] * 5] * 2)
    assert [s.group for s in found] == ["under 50", "under 100", "under 200", "200 or more"]
    assert (found[0].questions, found[0].exact_match, found[0].f1) == (2, 50.0, 50.0)
    lengths = [
        failure_classes.answer_words({"answers": ["w " * n, "w " * 9]}, "squad")
        for n in (1, 2, 3, 5, 6)
    ]
    assert lengths == ["1", "2", "3 to 5", "3 to 5", "6 or more"]
    assert [failure_classes.context_words("w " * n, "squad") for n in (49, 50, 199, 200)] == [
        "under 50", "under 100", "under 200", "200 or more",
    ]  # fmt: skip


def test_calibration_by_hand() -> None:
    half, sure = -0.6931471805599453, 0.0
    answers = [
        {"log_probability": half, "exact_match": 100.0},
        {"log_probability": half, "exact_match": 0.0},
        {"log_probability": sure, "exact_match": 0.0},
        {"log_probability": sure, "exact_match": 100.0},
        {"log_probability": None, "exact_match": 0.0},  # its prompt was too long
    ]
    bins, error = failure_classes.calibration(answers)
    assert [(b.answers, round(b.probability, 6), b.exact_match) for b in bins] == [
        (2, 50.0, 50.0), (2, 100.0, 50.0),
    ]  # fmt: skip
    assert error == pytest.approx(25.0)


def test_risk_and_coverage_by_hand() -> None:
    answers = [
        {"log_probability": -3.0, "exact_match": 0.0},
        {"log_probability": None, "exact_match": 0.0},  # its prompt was too long: the last
        {"log_probability": -1.0, "exact_match": 100.0},
        {"log_probability": -2.0, "exact_match": 100.0},
        {"log_probability": -2.0, "exact_match": 0.0},  # as sure: their order says nothing
    ]
    curve, area = failure_classes.risk_coverage(answers)
    shares = [100.0, 75.0, 200 / 3, 50.0, 40.0]  # of the surest one, two, ... right
    assert curve == pytest.approx([share for share in shares for _ in range(4)])
    assert area == pytest.approx(100 - sum(shares) / 5)
    assert failure_classes.risk_coverage(answers[::-1]) == (
        pytest.approx(curve),
        pytest.approx(area),
    )
    # Fewer answers than twentieths; and what no order can tell apart.
    assert failure_classes.risk_coverage(answers[:1]) == ([0.0] * 20, 100.0)
    same = [{"log_probability": 0.0, "exact_match": m} for m in (100.0, 0.0, 100.0, 0.0)]
    assert failure_classes.risk_coverage(same) == ([50.0] * 20, 50.0)


def test_answers_in_a_language_without_spaces_are_compared_and_counted_by_characters() -> None:
    wrong = prediction("北京大学", ["北京"])
    assert failure_classes.failure(wrong, "他在北京大学。", "squad") != failure_classes.EXTRA
    assert failure_classes.failure(wrong, "他在北京大学。", "mlqa-zh") == failure_classes.EXTRA
    assert failure_classes.answer_words(wrong, "mlqa-zh") == "2"
    assert failure_classes.context_words("北京" * 30, "mlqa-zh") == "under 100"
