"""Whatever stands in a data file is read right or refused in words, and what is learned from it is
its answers, whole, and nothing else."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from configs import make_splits
from hypothesis import assume, event, example, given
from hypothesis import strategies as st
from layouts import labels_of
from pyarrow import parquet
from strategies import any_json, documents, json_files, met, texts
from transformers import PreTrainedTokenizerBase

from datamodule import sequences
from lora_or_full.data import squad, tokenized
from lora_or_full.data.prompt import IGNORED, Prompt
from lora_or_full.data.splits import NAMES, Read
from lora_or_full.data.squad import Question
from lora_or_full.modeling.packed_rows import PackedRows

COLUMNS = ("id", "title", "context", "question", "answers")
CHOICES = st.fixed_dictionaries({
    "split_by": st.sampled_from(("article", "paragraph", "question")),
    "overlap": st.sampled_from(("refuse", "drop")),
    "draw_by": st.sampled_from(("question", "paragraph")),
    "unanswerable": st.sampled_from(("refuse", "drop", "drop", "drop")),
    "misaligned": st.sampled_from(("refuse", "repair")),
    "train_size": st.none() | st.integers(1, 5),
    "validation_size": st.none() | st.integers(1, 3),
    "test_size": st.none() | st.integers(1, 5),
    "seed": st.integers(0, 3),
})  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def read(path: str | Path, place: Path, **choices: Any) -> Read | None:
    """The split questions of a file; None if it is refused."""
    splits = make_splits(path, place, validation_articles=0.3, test_articles=0.3, **choices)

    def action() -> Read:
        splits.fingerprint()
        return splits.read()

    read, problem = met(action)
    event("refused" if problem else "read")
    return read


def check_splits(read: Read, choices: dict[str, Any]) -> None:
    """What has to hold of questions that are trained and tested on."""
    splits, by_article = read.splits, choices["split_by"] != "paragraph" and not read.notes
    for what in ("title", "context") if by_article else ("context",):
        found = {name: {getattr(q, what) for q in splits[name]} for name in NAMES}
        assert not found["test"] & (found["train"] | found["validation"])
        if read.split_by != "question":
            assert not found["train"] & found["validation"]
    for name, questions in splits.items():
        assert 1 <= len(questions) <= (choices[f"{name}_size"] or len(questions))
    everything = [question for questions in splits.values() for question in questions]
    assert len({question.id for question in everything}) == len(everything)
    for q in everything:
        assert q.answers
        assert len(q.answers) == len(q.starts)
        for answer, start in zip(q.answers, q.starts, strict=True):
            assert answer
            assert start == -1 or q.context.startswith(answer, start)
            if start == -1:
                assert choices["misaligned"] == "repair"
        for text in (q.context, q.question, *q.answers):
            assert text == text.strip()


@given(json_files(), CHOICES)
def test_any_json_file_is_read_right_or_refused_in_words(
    place: Path, content: bytes, choices: dict[str, Any]
) -> None:
    file = place / "f.json"
    file.write_bytes(content)
    if found := read(file, place, **choices):
        check_splits(found, choices)


@st.composite
def tables(draw: st.DrawFn) -> pyarrow.Table:
    """A table with SQuAD's columns, some odd, missing or superfluous, with or without rows."""
    document = draw(documents())
    found = [
        {
            "id": qa["id"], "title": article["title"], "context": paragraph["context"],
            "question": qa["question"],
            "answers": {
                key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")
            },
        }
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ][: draw(st.sampled_from((None, None, None, 0, 1)))]  # fmt: skip
    columns = {name: _array([row[name] for row in found]) for name in COLUMNS}
    for name in draw(st.lists(st.sampled_from(COLUMNS), max_size=2)):
        match draw(st.sampled_from(("gone", "other", "other", "null", "large", "category"))):
            case "gone":
                columns.pop(name, None)
            case "other":
                size = len(found)
                columns[name] = _array(draw(st.lists(any_json(), min_size=size, max_size=size)))
            case "null":
                columns[name] = pyarrow.nulls(len(found))
            case "large" if name != "answers":
                columns[name] = _array([row[name] for row in found]).cast(pyarrow.large_string())
            case "category" if name != "answers" and found:
                columns[name] = _array([row[name] for row in found]).dictionary_encode()
    if draw(st.booleans()):
        columns[draw(texts(2))] = pyarrow.nulls(len(found))
    return pyarrow.table(columns)


def _array(values: list[Any]) -> pyarrow.Array:
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):  # not of one type
        return pyarrow.array([repr(value) for value in values])


def _in_parquet(kind: pyarrow.DataType) -> bool:
    """Whether Parquet has this type: it has no struct of nothing."""
    if pyarrow.types.is_struct(kind) and not kind.num_fields:
        return False
    return all(_in_parquet(kind.field(number).type) for number in range(kind.num_fields))


@given(tables(), CHOICES, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3))
def test_any_parquet_file_is_read_right_or_refused_in_words(
    place: Path, table: pyarrow.Table, choices: dict[str, Any], bytes_changed: list[Any]
) -> None:
    file = place / "f.parquet"
    assume(all(map(_in_parquet, table.schema.types)))
    parquet.write_table(table, file)
    if bytes_changed:
        content = bytearray(file.read_bytes())
        for at, byte in bytes_changed:
            content[round(at * (len(content) - 1))] = byte
        file.write_bytes(content)
    if found := read(file, place, **choices):
        check_splits(found, choices)


@given(
    texts(6) | st.sampled_from(("x", "é", "🎉", "a/")).map(lambda text: text * 300),
    st.sampled_from(("", ".json", ".parquet", "/", ".JSON")),
    st.sampled_from(("", "~", "~nobody/", "./", "/", "../")),
)
@example("nobody-of-this-name/f", ".json", "~")
def test_a_name_of_no_file_is_refused_in_words(
    place: Path, name: str, ending: str, start: str
) -> None:
    path = start + name + ending
    assume(path and "\0" not in path)
    assume(not os.path.exists(os.path.expanduser(path)))
    assert read(path, place) is None


@st.composite
def questions(draw: st.DrawFn) -> list[Question]:
    """The questions of a good file; of some the first answer stands nowhere."""
    found = []
    for article in draw(documents())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = qa["answers"] or draw(st.sampled_from((
                    [], [{"text": "nowhere to be found", "answer_start": 0}],
                )))  # fmt: skip
                found.append(squad.Entry(
                    qa["id"], article["title"], paragraph["context"], qa["question"],
                    [answer["text"] for answer in answers],
                    [answer["answer_start"] for answer in answers], "here",
                ))  # fmt: skip
    return squad.check(found, "drop", "repair")[0]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@given(questions(), st.integers(20, 250))
def test_a_context_is_a_window_that_holds_the_answer_in_training(
    tokenizer: PreTrainedTokenizerBase, given_questions: list[Question], length: int
) -> None:
    by_id = {q.id: q for q in given_questions}
    for training in (True, False):
        table = tokenized.make(given_questions, Prompt(tokenizer), length, training)
        if not training:
            assert [row["id"] for row in table] == [q.id for q in given_questions]
        for row in table:
            q = by_id[row["id"]]
            whole = tokenizer(
                f" {q.context}", add_special_tokens=False,
                split_special_tokens=True, return_offsets_mapping=True,
            )  # fmt: skip
            ids, kept = whole["input_ids"], row["context_ids"]
            size = len(kept)
            starts = [n for n in range(len(ids) - size + 1) if ids[n : n + size] == kept]
            assert starts
            assert row["context_cut"] == (size < len(ids))
            used = len(tokenized.prompt_of(row).prompt)
            assert row["prompt_tokens"] == used
            if training:
                assert used + len(row["answer_ids"]) <= length
            else:
                assert kept == ids[:size]
                assert used <= length or size == 0
            if training and q.starts[0] >= 0:
                first, stop = q.starts[0] + 1, q.starts[0] + 1 + len(q.answers[0])
                places = whole["offset_mapping"]
                gold = [n for n, (a, b) in enumerate(places) if a < stop and b > first]
                if len(gold) <= size:
                    assert q.answers[0] in decoded(tokenizer, kept)
                    assert any(n <= gold[0] and gold[-1] < n + size for n in starts)


@given(questions(), st.integers(20, 250), st.booleans(), st.none() | st.integers(1, 300))
def test_exactly_the_answers_and_their_ends_carry_loss(
    tokenizer: PreTrainedTokenizerBase,
    given_questions: list[Question],
    length: int,
    mask_prompt: bool,
    packed_length: int | None,
) -> None:
    end = tokenizer.eos_token_id
    table = tokenized.make(given_questions, Prompt(tokenizer), length, training=True)
    assume(len(table) > 0)
    parts = list(map(tokenized.prompt_of, table))
    answers = [row["answer_ids"] for row in table]
    laid_out = sequences(parts, answers, mask_prompt, packed_length if mask_prompt else None)
    assert not isinstance(laid_out, PackedRows)
    found: list[list[int]] = []
    for ids, labels in zip(laid_out.input_ids.tolist(), labels_of(laid_out).tolist(), strict=True):
        before = IGNORED
        for token, label in zip(ids, labels, strict=True):
            assert label in (IGNORED, token)
            if label != IGNORED:
                if before == IGNORED:
                    found.append([])
                found[-1].append(label)
            before = label
    if not mask_prompt:  # all but the first token of each row
        assert found == [(p.prompt + a)[1:] for p, a in zip(parts, answers, strict=True)]
        return
    assert Counter(map(tuple, found)) == Counter(map(tuple, answers))
    assert all(run[-1] == end and end not in run[:-1] for run in found)
    by_id = {q.id: q for q in given_questions}
    said = Counter(decoded(tokenizer, run[:-1]) for run in found)
    assert said == Counter(f" {squad.one_line(by_id[row['id']].answers[0])}" for row in table)
