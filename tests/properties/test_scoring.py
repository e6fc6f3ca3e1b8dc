"""The scorer's invariants, on any texts."""

import warnings
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import HALVES, texts
from torchmetrics.functional.text import squad

from lora_or_full.evaluation import scoring
from lora_or_full.evaluation.metrics import exact_match as match_metric
from lora_or_full.evaluation.metrics import f1 as f1_metric

exact_match = partial(match_metric.exact_match, scoring="squad")
f1 = partial(f1_metric.f1, scoring="squad")
normalize = partial(scoring.normalize, scoring="squad")

ANY = texts() | st.text(st.characters(), max_size=20) | st.sampled_from(HALVES)
GOLDS = st.lists(ANY, min_size=1, max_size=4)


@st.composite
def answered(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A prediction and its gold answers: equal, nearly equal, or different."""
    references = draw(GOLDS)
    near = draw(st.sampled_from(("{}", "The {}.", " {}\n", "{} {}", "{}, in a mill"))).replace(
        "{}", draw(st.sampled_from(references))
    )
    return draw(st.sampled_from((near, draw(ANY)))), references


@given(answered())
@example(("", [""]))
@example(("the", ["A!", "x"]))
def test_scores_keep_their_invariants(pair: tuple[str, list[str]]) -> None:
    given_text, references = pair
    match, overlap = exact_match(given_text, references), f1(given_text, references)
    assert match in (0.0, 100.0)
    assert 0.0 <= overlap <= 100.0
    words = normalize(given_text).split()
    if match and words:
        assert overlap == 100.0
    if overlap == 100.0:
        assert any(
            sorted(words) == sorted(normalize(reference).split()) for reference in references
        )
    if not words:
        assert overlap == 0.0
    # The order of gold answers, and repeated ones, change nothing.
    for same in (references[::-1], references * 2, sorted(references)):
        assert (exact_match(given_text, same), f1(given_text, same)) == (match, overlap)
    # The best reference counts, each by itself; a further one never harms.
    assert match == max(exact_match(given_text, [reference]) for reference in references)
    assert overlap == max(f1(given_text, [reference]) for reference in references)
    for reference in references:
        assert f1(given_text, [reference]) == pytest.approx(f1(reference, [given_text]))
        assert exact_match(given_text, [reference]) == exact_match(reference, [given_text])
        assert exact_match(reference, references) == 100.0
    # What the rules leave out of account changes nothing.
    assert f1(f" The {given_text} ", references) == overlap


@given(ANY)
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert once == " ".join(once.split())
    assert not set(once) & set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@given(answered())
def test_scores_are_torchmetrics_where_that_is_defined(pair: tuple[str, list[str]]) -> None:
    given_text, references = pair
    match, overlap = exact_match(given_text, references), f1(given_text, references)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = squad(
            [{"prediction_text": given_text, "id": "1"}],
            [{"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "1"}],
        )
    assert match == theirs["exact_match"].item()
    # Empty against empty is 100 there, and 0 by the official script.
    if normalize(given_text) or all(map(normalize, references)):
        assert overlap == pytest.approx(theirs["f1"].item(), abs=1e-4)
