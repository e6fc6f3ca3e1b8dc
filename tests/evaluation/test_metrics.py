"""Scores by hand, and against torchmetrics."""

import random
from functools import partial

import pytest
from torchmetrics.functional.text import squad

from lora_or_full.evaluation import scoring
from lora_or_full.evaluation.metrics import exact_match as match_metric
from lora_or_full.evaluation.metrics import f1 as f1_metric
from lora_or_full.evaluation.metrics.rouge_l import rouge_l

exact_match = partial(match_metric.exact_match, scoring="squad")
f1 = partial(f1_metric.f1, scoring="squad")
normalize = partial(scoring.normalize, scoring="squad")


@pytest.mark.parametrize(
    ("prediction", "answers", "match", "overlap"),
    [
        ("Denver Broncos", ["Denver Broncos"], 100.0, 100.0),
        ("the denver broncos!", ["Denver Broncos"], 100.0, 100.0),
        ("Broncos", ["Denver Broncos"], 0.0, 200 / 3),  # precision 1, recall 1/2
        ("Broncos of Denver", ["Denver Broncos"], 0.0, 80.0),  # 2/3 and 1
        ("Carolina", ["Denver Broncos"], 0.0, 0.0),
        ("in 1885", ["1885", "in the year 1885"], 0.0, 80.0),  # 2/3 and 2 of 3: the second wins
        ("1885", ["1886", "1885"], 100.0, 100.0),
        ("1885", ["1885", "1886"], 100.0, 100.0),
        ("no no no", ["no"], 0.0, 50.0),  # a word counts as often as both have it: 1/3 and 1
        ("no", ["no no no"], 0.0, 50.0),
        ("no no yes", ["no yes yes"], 0.0, 200 / 3),  # one no and one yes
        ("São Paulo", ["são paulo"], 100.0, 100.0),
        ("Sao Paulo", ["São Paulo"], 0.0, 50.0),
        ("cafe\u0301", ["café"], 0.0, 0.0),  # the script does not compose characters
        ("東京", ["東京"], 100.0, 100.0),
        ("東京 駅", ["東京駅"], 0.0, 0.0),
        ("", ["Denver"], 0.0, 0.0),
        ("the", ["Denver"], 0.0, 0.0),
        ("Denver", ["the"], 0.0, 0.0),
        ("", ["", "Denver"], 100.0, 0.0),
        ("the", ["A!"], 100.0, 0.0),  # both empty after normalization: equal, yet no shared word
    ],
)
def test_scores_by_hand(prediction: str, answers: list[str], match: float, overlap: float) -> None:
    assert exact_match(prediction, answers) == match
    assert f1(prediction, answers) == pytest.approx(overlap, abs=1e-9)


def test_scores_equal_those_of_torchmetrics() -> None:
    rng = random.Random(0)
    words = "The a an north South-west river, 1,204 u.s. U.S. école 東京 it's its (old) old".split()

    def text() -> str:
        while True:
            made = rng.choice([" ", "  "]).join(rng.choices(words, k=rng.randrange(1, 6)))
            if normalize(made):
                return made

    pairs = [(text(), [text() for _ in range(rng.randrange(1, 4))]) for _ in range(400)]
    # A third of the predictions are right, some but for an article or punctuation.
    pairs = [
        (rng.choice([gold[-1], f"the {gold[0]}."]) if n % 3 == 0 else given, gold)
        for n, (given, gold) in enumerate(pairs)
    ]
    for given, gold in pairs:
        theirs = torchmetrics_scores([(given, gold)])
        assert exact_match(given, gold) == theirs[0]
        assert f1(given, gold) == pytest.approx(theirs[1], abs=1e-4)
    exact, overlap = torchmetrics_scores(pairs)
    ours = [exact_match(*pair) for pair in pairs], [f1(*pair) for pair in pairs]
    assert sum(ours[0]) / len(pairs) == pytest.approx(exact, abs=1e-4)
    assert sum(ours[1]) / len(pairs) == pytest.approx(overlap, abs=1e-4)
    assert 30 < exact < overlap < 90  # the pairs are worth comparing


def test_an_empty_prediction_scores_as_in_torchmetrics_unless_the_gold_is_empty_too() -> None:
    for pair in [("", ["Denver"]), ("the", ["Denver"]), ("Denver", ["the"])]:
        assert (exact_match(*pair), f1(*pair)) == torchmetrics_scores([pair]) == (0.0, 0.0)


def test_empty_against_empty_is_the_one_difference_to_torchmetrics() -> None:
    for pair in [("", [""]), ("the", ["a"]), ("!", ["the"])]:
        assert torchmetrics_scores([pair]) == (100.0, 100.0)
        # The official script for v1.1 divides nothing by nothing into 0.
        assert (exact_match(*pair), f1(*pair)) == (100.0, 0.0)


def torchmetrics_scores(pairs: list[tuple[str, list[str]]]) -> tuple[float, float]:
    given = [{"prediction_text": text, "id": str(n)} for n, (text, _) in enumerate(pairs)]
    gold = [
        {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": str(n)}
        for n, (_, texts) in enumerate(pairs)
    ]
    scores = squad(given, gold)
    return scores["exact_match"].item(), scores["f1"].item()


def test_rouge_l_has_the_words_of_its_own_script_or_of_the_language() -> None:
    assert rouge_l("the cat sat", ["x", "a cat sat down"], "squad") == pytest.approx(400 / 7)
    assert rouge_l("The cat", ["a cat"], "squad") == pytest.approx(50)  # articles count
    assert rouge_l("北京大学", ["北京"], "squad") == 0.0
    assert rouge_l("北京大学", ["北京"], "mlqa-zh") == pytest.approx(200 / 3)
    assert rouge_l("", ["x"], "squad") == 0.0
