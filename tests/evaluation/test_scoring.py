"""The words of answers, by SQuAD's rules and by MLQA's for languages of several scripts."""

import pytest

from lora_or_full.evaluation.metrics.exact_match import exact_match
from lora_or_full.evaluation.metrics.f1 import f1
from lora_or_full.evaluation.scoring import normalize, rules, warn_of_script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("  many \t\n spaces\u00a0here ", "many spaces here"),
        ("U.S.A.", "usa"),
        ("the-end", "theend"),  # punctuation goes first: no article is left
        ("Theodor and Anna", "theodor and anna"),
        ("“quoted” – dash", "“quoted” – dash"),  # only ASCII punctuation goes
        ("ÉCOLE", "école"),
        ("a an the", ""),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalization_by_the_rules_of_squad(text: str, expected: str) -> None:
    assert normalize(text, "squad") == expected


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "The “Eiffel” Tower – 1889!", "eiffel tower 1889"),
        ("en", "$5 + 3", "5 3"),  # ASCII's signs go too, which Unicode has as symbols
        ("en", "€5", "€5"),
        ("es", "¿Los Reyes de la mancha?", "reyes de mancha"),
        ("de", "Der Bau des „Turms“", "bau turms"),
        ("de", "Derby", "derby"),
        ("vi", "Những con mèo của Nam", "con mèo nam"),
        ("vi", "làng", "làng"),  # no article inside a word
        ("hi", "ताज महल।", "ताज महल"),
        ("ar", "القاهرة، مصر؟", "قاهرة مصر"),
        ("ar", "العالم", "ع م"),  # as the script has it: inside words too
        ("zh", "北京大学(Peking University)。", "北 京 大 学 peking university"),
        ("zh", "约 3.5 万", "约 35 万"),
        ("ja", "東京タワー・333メートル", "東 京 タ ワ ー 333 メ ー ト ル"),
        ("th", "กรุงเทพ 2325", "ก ร ุ ง เ ท พ 2325"),
        ("fa", "«تهران»، پایتخت ایران؟", "تهران پایتخت ایران"),
        ("fa", "سال", "سال"),  # not an Arabic article
        ("ru", "Москва — столица", "москва столица"),
    ],
)
def test_normalization_by_the_rules_of_mlqa(language: str, text: str, expected: str) -> None:
    assert normalize(text, f"mlqa-{language}") == expected


def test_where_characters_are_words_f1_tells_a_near_answer_from_a_wrong_one() -> None:
    near, gold = "北京大学", ["北京"]
    assert f1(near, gold, "squad") == exact_match(near, gold, "squad") == 0.0
    assert f1(near, gold, "mlqa-zh") == pytest.approx(200 / 3)  # 2 of 4, 2 of 2
    assert exact_match("「北京」", gold, "mlqa-zh") == 100.0
    assert exact_match("«تهران»", ["تهران"], "squad") == 0.0
    assert exact_match("«تهران»", ["تهران"], "mlqa-fa") == 100.0
    assert f1("el gato negro", ["un gato"], "mlqa-es") == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("gold", "scoring", "suggested"),
    [
        ("北京", "squad", "mlqa-zh"),
        ("東京タワー", "squad", "mlqa-ja"),
        ("กรุงเทพ", "squad", "mlqa-th"),
        ("القاهرة", "squad", "mlqa-ar"),
        ("ताज महल", "squad", "mlqa-hi"),
        ("กรุงเทพ", "mlqa-zh", "mlqa-th"),  # a language of another script
        ("北京", "mlqa-zh", None),
        ("東京タワー", "mlqa-ja", None),
        ("القاهرة", "mlqa-ar", None),
        ("São Paulo", "squad", None),
        ("Москва", "squad", None),
    ],
)
def test_gold_answers_that_the_rules_do_not_suit_are_warned_about(
    gold: str, scoring: str, suggested: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_script([gold, "1889", gold], scoring)
    err = capsys.readouterr().err
    if suggested is None:
        assert not err
    else:
        assert "does not suit 2 of 3 gold answers" in err
        assert f"scoring={suggested} " in err
        assert err.count("\n") == 1
    warn_of_script([gold, *map(str, range(20))], scoring)  # a few words of another script
    assert not capsys.readouterr().err


def test_the_rules_have_a_name_in_words() -> None:
    assert rules("squad") == "SQuAD v1.1's rules"
    assert rules("mlqa-zh") == "MLQA's rules for the language zh"
