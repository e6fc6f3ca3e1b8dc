"""The built-in data set: rebuilt from its seed, correct, and without leaks between splits."""

import json
import re
from collections import Counter
from pathlib import Path

import make_data
import pytest

from lora_or_full.data import squad
from lora_or_full.data.squad import Question

DATA = Path(__file__).parents[2] / "assets" / "data"


def questions(name: str) -> list[Question]:
    found, counts = squad.check(squad.read_files([DATA / f"{name}.json"]), "refuse", "refuse")
    assert not any(counts.values())
    return found


@pytest.fixture(scope="module")
def train() -> list[Question]:
    return questions("train")


@pytest.fixture(scope="module")
def dev() -> list[Question]:
    return questions("dev")


def test_the_script_writes_what_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["make_data.py", "--output", str(tmp_path)])
    make_data.main()
    for name in ("train.json", "dev.json"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_without_questions_the_rest_is_the_same(
    train: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["make_data.py", "--without-questions", "--output", str(tmp_path)]
    )
    make_data.main()
    found, _ = squad.check(squad.read_files([tmp_path / "train.json"]), "refuse", "refuse")
    assert {question.question for question in found} == {"?"}
    assert [(q.id, q.context, q.answers) for q in found] == [
        (q.id, q.context, q.answers) for q in train
    ]


def test_there_are_enough_questions_five_per_paragraph(
    train: list[Question], dev: list[Question]
) -> None:
    assert len(train) >= 2600
    assert len(dev) >= 500
    assert len({question.title for question in train}) >= 100
    for split in (train, dev):
        assert set(Counter(question.context for question in split).values()) == {5}


def test_dev_shares_no_article_and_no_name_with_train(
    train: list[Question], dev: list[Question]
) -> None:
    assert not {q.title for q in train} & {q.title for q in dev}
    assert not {q.context for q in train} & {q.context for q in dev}

    def names(split: list[Question]) -> set[str]:
        """Words that made-up names consist of: capitals that are not at a sentence's start."""
        return {word for q in split for word in re.findall(r"(?<=[^.] )[^\W\d_]\w+", q.context)
                if word[0].isupper()}  # fmt: skip

    shared = names(train) & names(dev)
    asked = {word for q in dev for word in re.findall(r"\w+", q.answers[0]) if word[0].isupper()}
    # What is left are ordinary words of titles and companies ("House", "Songs", "May").
    assert len(asked & shared) < 0.1 * len(asked)


def test_some_questions_of_dev_are_phrased_as_none_of_train(
    train: list[Question], dev: list[Question]
) -> None:
    def shape(question: Question) -> str:
        return re.sub(r"\b[A-ZÀ-ž]\S*", "_", question.question[1:])

    known = {shape(question) for question in train}
    new = [question for question in dev if shape(question) not in known]
    assert 0.1 < len(new) / len(dev) < 0.9


def test_answers_are_of_many_kinds_and_at_any_position(train: list[Question]) -> None:
    places = [q.starts[0] / len(q.context) for q in train]
    for tenth in range(10):
        assert sum(tenth / 10 <= place < (tenth + 1) / 10 for place in places) > 0.03 * len(train)
    texts = [q.answers[0] for q in train]
    assert sum(bool(re.search(r"[^\x00-\x7f]", text)) for text in texts) > 0.1 * len(texts)
    assert sum(text[0].isdigit() for text in texts) > 0.1 * len(texts)
    assert sum(text[0].isupper() for text in texts) > 0.1 * len(texts)
    assert sum("€" in text for text in texts) > 10


def test_no_answer_is_known_without_the_paragraph(
    train: list[Question], dev: list[Question]
) -> None:
    """The most frequent training answers of each question's first two words hit few of dev."""
    by_start: dict[str, Counter[str]] = {}
    for q in train:
        by_start.setdefault(" ".join(q.question.split()[:2]), Counter())[q.answers[0]] += 1
    hits = 0
    for q in dev:
        seen = by_start.get(" ".join(q.question.split()[:2]))
        hits += bool(seen) and seen.most_common(1)[0][0] in q.answers
    assert hits / len(dev) < 0.02


def test_dev_has_several_gold_answers_where_they_are_equally_right(dev: list[Question]) -> None:
    several = [question for question in dev if len(question.answers) > 1]
    assert several
    for question in several:
        shorter, longer = sorted(question.answers, key=len)
        assert longer.startswith(shorter)


def test_files_are_json_as_squad_has_it() -> None:
    content = json.loads((DATA / "dev.json").read_text(encoding="utf-8"))
    assert content["version"] == "1.1"
