"""Rows: each context stored once, each row whole, and the same from the cache as when made."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from lora_or_full.data import squad, tokenized
from lora_or_full.data.prompt import Prompt, encode
from lora_or_full.data.squad import Question
from lora_or_full.data.tokenized import TokenizedQuestions

Made = Callable[[int, bool], TokenizedQuestions]


@pytest.fixture
def questions(tmp_path: Path, squad_file: Callable[..., Path]) -> list[Question]:
    """Three articles of two paragraphs of four questions."""
    entries = squad.read_files([squad_file(tmp_path / "all.json", 3, 2, 4)])
    return squad.check(entries, "refuse", "refuse")[0]


@pytest.fixture
def made(questions: list[Question], tokenizer: PreTrainedTokenizerBase) -> Made:
    """`made(length, training)`: the rows of `questions`."""
    return lambda length, training: tokenized.make(questions, Prompt(tokenizer), length, training)


def test_contexts_are_stored_once_and_rows_name_them(made: Made, questions: list[Question]) -> None:
    table = made(10_000, True)
    assert len(table) == len(questions) == 24
    assert list(table.contexts["context"]) == list(dict.fromkeys(q.context for q in questions))
    assert len(table.contexts) == 6
    assert not {"context", "context_ids"} & set(table.questions.column_names)
    for question, row, number in zip(questions, table, table.column("paragraph"), strict=True):
        assert row["paragraph"] == number
        assert row["context"] == table.contexts[number]["context"] == question.context
        for field in ("id", "title", "question", "answers"):
            assert row[field] == getattr(question, field)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("length", [60, 80, 10_000])
def test_token_counts_are_those_of_the_row_and_within_the_length(
    length: int, training: bool, made: Made, tokenizer: PreTrainedTokenizerBase
) -> None:
    table = made(length, training)
    counts = zip(table.column("prompt_tokens"), table.column("answer_tokens"), strict=True)
    for row, (prompt_tokens, answer_tokens) in zip(table, counts, strict=True):
        assert prompt_tokens == len(tokenized.prompt_of(row).prompt)
        assert answer_tokens == len(row["answer_ids"])
        assert (row["prompt_tokens"], row["answer_tokens"]) == (prompt_tokens, answer_tokens)
        whole = encode(tokenizer, [f" {row['context']}"])[0]
        used = prompt_tokens + answer_tokens * training
        if row["context_cut"]:
            assert used <= length if training else used == length
            assert len(row["context_ids"]) < len(whole)
        else:
            assert used <= length
            assert row["context_ids"] == whole
    assert any(table.column("context_cut")) == (length < 10_000)


def test_contexts_are_cut_around_the_answer_in_training_and_at_the_end_else(
    made: Made, tokenizer: PreTrainedTokenizerBase
) -> None:
    moved = 0
    for row, other in zip(made(80, True), made(80, False), strict=True):
        whole = encode(tokenizer, [f" {row['context']}"])[0]
        assert other["context_ids"] == whole[: len(other["context_ids"])]
        assert row["answers"][0] in tokenizer.decode(row["context_ids"])
        moved += row["context_ids"] != whole[: len(row["context_ids"])]
    assert moved > 0


def test_questions_over_a_long_context_share_as_few_windows_as_hold_their_answers(
    made: Made, tokenizer: PreTrainedTokenizerBase
) -> None:
    windows: dict[int, list[tuple[int, ...]]] = {}
    for row in made(80, True):
        if row["context_cut"]:
            assert row["answers"][0] in tokenizer.decode(row["context_ids"])
            windows.setdefault(row["paragraph"], []).append(tuple(row["context_ids"]))
    assert sum(len(own) - len(set(own)) for own in windows.values()) > 5  # of 24 questions
    assert (
        tokenized._windows(100, [50, 48, 50], [(10, 12), (52, 56), (20, 22)]) == [slice(9, 57)] * 3
    )
    apart = tokenized._windows(100, [50, 48, 50], [(10, 12), (70, 71), (20, 22)])
    assert apart == [slice(0, 50), slice(46, 94), slice(0, 50)]


def test_cached_rows_are_those_that_were_made(made: Made, tmp_path: Path) -> None:
    place, facts = tmp_path / "cache" / "place", {"count": 3}
    built = made(80, True)
    first, first_facts = tokenized.cached(place, lambda: (built, facts))

    def again() -> tuple[TokenizedQuestions, dict[str, int]]:
        raise AssertionError("made again")

    for table, known in ((first, first_facts), tokenized.cached(place, again)):
        assert list(table) == list(built)
        assert json.dumps(known) == json.dumps(facts)
        for name in built.questions.column_names:
            assert table.column(name) == built.column(name)
        assert list(table.contexts) == list(built.contexts)
    assert [path.name for path in place.parent.iterdir()] == ["place"]


@pytest.mark.parametrize("damage", ["bytes", "end", "gone"])
@pytest.mark.parametrize("name", ["questions/*.arrow", "facts.json", "SHA256SUMS"])
def test_damaged_rows_are_made_anew_and_it_is_said(
    name: str, damage: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, built = tmp_path / "cache" / "place", made(80, True)
    tokenized.cached(place, lambda: (built, {}))
    [file] = place.glob(name)
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "end" else content[:-9] + b"x" + content[-8:])
    table, _ = tokenized.cached(place, lambda: (built, {}))
    assert list(table) == list(built)
    assert f"{place} is damaged; it is rebuilt" in capsys.readouterr().err
    tokenized.cached(place, lambda: pytest.fail("made again"))


def test_rows_that_find_no_room_leave_nothing_behind(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenized.store, "write_checksums", full)
    built = made(80, True)
    with pytest.raises(OSError, match="No space"):
        tokenized.cached(tmp_path / "cache" / "place", lambda: (built, {}))
    assert list((tmp_path / "cache").iterdir()) == []
