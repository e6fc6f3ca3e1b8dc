"""Rows: each context stored once, each row whole, and the same from the cache as when made."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import rows
from qa import prompt, squad
from qa.squad import Question
from rows import Rows

Made = Callable[[int, bool], Rows]


@pytest.fixture
def questions(tmp_path: Path, squad_file: Callable[..., Path]) -> list[Question]:
    """Three articles of two paragraphs of four questions."""
    entries = squad.read_files([squad_file(tmp_path / "all.json", 3, 2, 4)])
    return squad.check(entries, "refuse", "refuse")[0]


@pytest.fixture
def made(questions: list[Question], tokenizer: PreTrainedTokenizerBase) -> Made:
    """`made(length, training)`: the rows of `questions`."""
    head = prompt.head_ids(tokenizer)
    return lambda length, training: rows.make(questions, tokenizer, head, length, training)


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
    table, head = made(length, training), len(prompt.head_ids(tokenizer))
    counts = zip(table.column("prompt_tokens"), table.column("answer_tokens"), strict=True)
    for row, (prompt_tokens, answer_tokens) in zip(table, counts, strict=True):
        assert prompt_tokens == head + len(row["context_ids"]) + len(row["question_ids"])
        assert answer_tokens == len(row["answer_ids"])
        assert (row["prompt_tokens"], row["answer_tokens"]) == (prompt_tokens, answer_tokens)
        whole = prompt.encode(tokenizer, [prompt.context_text(row["context"])])[0]
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
        whole = prompt.encode(tokenizer, [prompt.context_text(row["context"])])[0]
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
    assert rows._windows(100, [50, 48, 50], [(10, 12), (52, 56), (20, 22)]) == [slice(9, 57)] * 3
    apart = rows._windows(100, [50, 48, 50], [(10, 12), (70, 71), (20, 22)])
    assert apart == [slice(0, 50), slice(46, 94), slice(0, 50)]


def test_cached_rows_are_those_that_were_made(made: Made, tmp_path: Path) -> None:
    place, facts = tmp_path / "cache" / "place", {"count": 3}
    built = made(80, True)
    first, first_facts = rows.cached(place, lambda: (built, facts))

    def again() -> tuple[Rows, dict[str, int]]:
        raise AssertionError("made again")

    for table, known in ((first, first_facts), rows.cached(place, again)):
        assert list(table) == list(built)
        assert json.dumps(known) == json.dumps(facts)
        for name in built.questions.column_names:
            assert table.column(name) == built.column(name)
        assert list(table.contexts) == list(built.contexts)
    assert [path.name for path in place.parent.iterdir()] == ["place"]
