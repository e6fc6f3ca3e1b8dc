"""Files in SQuAD's format: the same questions from each kind, and every fault named."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, Features, List, Value
from pyarrow import parquet

from lora_or_full.data import squad
from lora_or_full.data.squad import Entry, Question
from lora_or_full.errors import UserError

SquadWriter = Callable[..., Path]
FEATURES = Features(
    {
        **{name: Value("string") for name in ("id", "title", "context", "question")},
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)
README = """---
configs:
- config_name: plain_text
  default: true
  data_files:
  - split: train
    path: plain_text/train-*
  - split: validation
    path: plain_text/validation-*
---
"""
WHERE = r"f\.json: data\[0\]\.paragraphs\[0\]\.qas\[0\]"


def questions(
    entries: list[Entry], unanswerable: str = "refuse", misaligned: str = "refuse"
) -> list[Question]:
    return squad.check(entries, unanswerable, misaligned)[0]


def rows_of(json_file: Path) -> list[dict[str, Any]]:
    return [
        {
            "id": qa["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {
                "text": [answer["text"] for answer in qa["answers"]],
                "answer_start": [answer["answer_start"] for answer in qa["answers"]],
            },
        }
        for article in json.loads(json_file.read_text("utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    return path


def document(**fields: Any) -> dict[str, Any]:
    """One question over 'a b c', with fields of it replaced; None takes one away."""
    qa = {"id": "1", "question": "q?", "answers": [{"text": "b", "answer_start": 2}]} | fields
    qa = {name: value for name, value in qa.items() if value is not None}
    return {"data": [{"title": "t", "paragraphs": [{"context": "a b c", "qas": [qa]}]}]}


def read(folder: Path, content: Any) -> list[Entry]:
    path = folder / "f.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return squad.read_files([path])


def entry(**fields: Any) -> Entry:
    return replace(Entry("1", "t", "a b c b", "q?", ["b"], [2], "here"), **fields)


# The same questions from each kind of file


def test_json_parquet_and_folder_give_the_same_questions(
    squad_file: SquadWriter, tmp_path: Path
) -> None:
    files = [squad_file(tmp_path / f"{n}.json", seed=n) for n in range(2)]
    folder = tmp_path / "hub"
    for name, file in zip(("train", "validation"), files, strict=True):
        write_parquet(folder / f"plain_text/{name}-00000-of-00001.parquet", rows_of(file))
    (folder / "README.md").write_text(README)
    splits = squad.read_folder(folder)
    assert list(splits) == ["train", "validation"]
    for (name, entries), file in zip(splits.items(), files, strict=True):
        from_json = questions(squad.read_files([file]))
        assert len(from_json) == 4 * 2 * 3
        assert questions(entries) == from_json
        table = folder / f"plain_text/{name}-00000-of-00001.parquet"
        assert questions(squad.read_files([table])) == from_json


def test_fields_are_those_of_the_file(squad_file: SquadWriter, tmp_path: Path) -> None:
    file = squad_file(tmp_path / "f.json")
    for question, row in zip(questions(squad.read_files([file])), rows_of(file), strict=True):
        assert [question.id, question.title] == [row["id"], row["title"]]
        assert [question.context, question.question] == [row["context"], row["question"]]
        assert question.answers == row["answers"]["text"]
        assert question.starts == row["answers"]["answer_start"]
    assert len(question.answers) == 3  # several golds are kept, in order


def test_several_files_are_read_in_order(squad_file: SquadWriter, tmp_path: Path) -> None:
    first, second = (squad_file(tmp_path / f"{n}.json", seed=n) for n in range(2))
    table = write_parquet(tmp_path / "t.parquet", rows_of(second))
    both = questions(squad.read_files([first, table]))
    apart = questions(squad.read_files([first])) + questions(squad.read_files([second]))
    assert both == apart


def test_parquet_is_read_by_its_name_alone(tmp_path: Path) -> None:
    rows = rows_of_text(tmp_path, "one"), rows_of_text(tmp_path, "two")
    file = write_parquet(tmp_path / "a[1]*=b.parquet", rows[0])  # not a pattern
    write_parquet(tmp_path / "a1x=b.parquet", rows[1])
    assert [e.question for e in squad.read_files([file])] == ["one"]


def test_a_file_that_changed_within_its_time_stamp_is_read_anew(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "hub/train.parquet", rows_of_text(tmp_path, "one"))
    time = file.stat().st_mtime_ns
    assert squad.read_files([file])[0].question == "one"
    assert squad.read_folder(file.parent)["train"][0].question == "one"
    write_parquet(file, rows_of_text(tmp_path, "two"))
    os.utime(file, ns=(time, time))
    assert squad.read_files([file])[0].question == "two"
    assert squad.read_folder(file.parent)["train"][0].question == "two"


def rows_of_text(folder: Path, question: str) -> list[dict[str, Any]]:
    file = folder / "rows.json"
    file.write_text(json.dumps(document(question=question)))
    return rows_of(file)


# White space and offsets


def test_outer_white_space_goes_and_the_offsets_follow() -> None:
    context = " \n\u2003In 1999 Ada came. \n"
    given = entry(
        context=context,
        question="\tWho?\n",
        answers=["Ada", " 1999 ", "\u2003In", "came. \n"],
        starts=[context.index("Ada"), context.index(" 1999"), 2, context.index("came")],
    )
    (question,) = questions([given])
    assert question.context == "In 1999 Ada came."
    assert question.question == "Who?"
    assert question.answers == ["Ada", "1999", "In", "came."]
    assert question.starts == [8, 3, 0, 12]


def test_offsets_count_characters_not_bytes() -> None:
    (question,) = questions([entry(context="🎉é e\u0301 b", answers=["b"], starts=[6])])
    assert question.context[question.starts[0] :] == "b"


def test_each_answer_stands_at_its_offset(squad_file: SquadWriter, tmp_path: Path) -> None:
    for question in questions(squad.read_files([squad_file(tmp_path / "f.json", seed=5)])):
        for answer, start in zip(question.answers, question.starts, strict=True):
            assert question.context.startswith(answer, start)


# Answers that are elsewhere


@pytest.mark.parametrize("start", [-1, 0, 1, 3, 4, 5, 7, 8, 10**30, -(10**30)])
def test_misaligned_answers_are_refused_with_their_number_and_the_first(start: int) -> None:
    given = [
        entry(),
        entry(id="2", where="there", starts=[start]),
        entry(id="3", answers=["b", "x"], starts=[2, 0]),
    ]
    with pytest.raises(UserError, match=rf"^2 answers .*: there: 'b' is not at {start}\..*repair"):
        questions(given)


@pytest.mark.parametrize(
    ("start", "found"), [(0, 2), (3, 2), (5, 6), (7, 6), (-3, 2), (99, 6), (10**30, 6), (4, 2)]
)
def test_repair_takes_the_nearest_place(start: int, found: int) -> None:
    given, counts = squad.check([entry(starts=[start])], "refuse", "repair")
    assert given[0].starts == [found]
    assert counts == {
        "unanswerable_dropped": 0,
        "answers_repaired": 1,
        "answers_not_in_context": 0,
    }


def test_repair_finds_a_place_that_the_offset_points_into() -> None:
    given = questions(
        [entry(context="in 1999 or 1999", answers=["1999"], starts=[5])], misaligned="repair"
    )
    assert given[0].starts == [3]


def test_repair_shifts_by_stripped_white_space_too() -> None:
    given = questions([entry(context="  a b c", answers=[" b"], starts=[0])], misaligned="repair")
    assert given[0].starts == [2]


def test_repair_keeps_an_answer_that_stands_nowhere() -> None:
    misplaced = entry(answers=["b", "B ", "x"], starts=[2, 2, 0])
    given, counts = squad.check([misplaced], "refuse", "repair")
    assert given[0].answers == ["b", "B", "x"]
    assert given[0].starts == [2, -1, -1]
    assert counts["answers_repaired"] == 0
    assert counts["answers_not_in_context"] == 2


def test_aligned_answers_are_not_counted_as_repaired() -> None:
    _, counts = squad.check([entry()], "refuse", "repair")
    assert set(counts.values()) == {0}


# Questions without an answer


def test_unanswerable_questions_are_refused_with_their_number_and_the_first() -> None:
    empty: dict[str, Any] = {"answers": [], "starts": []}
    given = [entry(), entry(id="2", where="there", **empty), entry(id="3", **empty)]
    with pytest.raises(UserError, match="^2 of 3 questions .*: there\\. data.unanswerable=drop"):
        questions(given)


def test_unanswerable_questions_are_dropped_and_counted(tmp_path: Path) -> None:
    content = document()
    qas = content["data"][0]["paragraphs"][0]["qas"]
    qas.append({"id": "2", "question": "?", "answers": [], "is_impossible": True})
    given, counts = squad.check(read(tmp_path, content), "drop", "refuse")
    assert [question.id for question in given] == ["1"]
    assert counts["unanswerable_dropped"] == 1


# What is not SQuAD's format


@pytest.mark.parametrize("second", [{}, {"answers": [], "starts": []}])
def test_ids_that_occur_twice_are_refused(second: dict[str, Any]) -> None:
    given = [entry(id="7"), entry(id="7", **second), entry(id="8")]
    with pytest.raises(UserError, match="^1 question ids occur more than once, the first: '7'"):
        questions(given, unanswerable="drop")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "f.json can't be read as JSON"),
        (" \n", "f.json can't be read as JSON"),
        ("{", "f.json can't be read as JSON"),
        ('{"data": []}\n[', "f.json, line 2 can't be read as JSON"),
        ("[" * 100_000, "f.json can't be read as JSON"),
        ('{"data": ' + "1" * 5000 + "}", "f.json can't be read as JSON"),  # Python's limit
        (b"\xff\xfe{\x00}\x00", r"is not in UTF-8 \(line 1; is it UTF-16\?\)\. Save it as UTF-8"),
        ("{}".encode("utf-16-le"), r"line 1; is it UTF-16"),
        ('{"data":\n "ä"}'.encode("cp1252"), r"line 2; is it Windows-1252\?\)\. Save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "f.json is no text: unpack it"),
        ("null", r"f.json is a NoneType, not an object"),
        ("3", r"f.json is a int, not an object"),
        ("{}", r"f.json has no data \(it has nothing\)"),
        ('{"version": "1"}', r"f.json has no data \(it has version\)"),
        ('{"data": {}}', r"f.json: data is a dict, not a list"),
        ('{"data": ["x"]}', r"f.json: data\[0\] is a str, not an object"),
        ('{"data": [{"title": "t"}]}', r"data\[0\] has no context or paragraphs \(it has title\)"),
        (
            '{"data": [{"title": "t", "paragraphs": []}, {"title": "t", "paragraphs": [{}]}]}',
            r"data\[1\]\.paragraphs\[0\] has no context or paragraphs \(it has nothing\)",
        ),
        (
            '{"data": [{"title": "t", "paragraphs": [{"context": "c"}]}]}',
            r"data\[0\]\.paragraphs\[0\] has no question or qas \(it has context\)",
        ),
        (
            '{"data": [{"title": ["t"], "paragraphs": [{"context": "c", "qas": '
            '[{"question": "q"}]}]}]}',
            r"data\[0\]\.title is a list, not a str",
        ),
        (
            '{"data": [{"title": "t", "paragraphs": [{"context": ["c"], "qas": '
            '[{"question": "q"}]}]}]}',
            r"data\[0\]\.paragraphs\[0\]\.context is a list, not a str",
        ),
        (
            '{"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [null]}]}]}',
            rf"{WHERE} is a NoneType, not an object",
        ),
        (document(question=None), rf"{WHERE} has no question \(it has id, answers\)"),
        (document(id=True), rf"{WHERE}\.id is a bool, not a str"),
        (document(question=["q"]), rf"{WHERE}\.question is a list, not a str"),
        (document(answers=True), rf"{WHERE}\.answers is a bool, not a list"),
        (document(answers=[True]), rf"{WHERE}\.answers\[0\]\.text is a bool, not a str"),
        (document(answers=[["b"]]), rf"{WHERE}\.answers\[0\] is a list, not an object"),
        (document(answers={"start": 2}), rf"{WHERE}\.answers has no text \(it has start\)"),
        (document(answers=[{"answer_start": 2}]), rf"{WHERE}\.answers\[0\]\.text is missing"),
        (document(answers=[{"text": ["b"]}]), r"text is a list, not a str"),
        (document(answers=[{"text": "b", "answer_start": True}]), r"answer_start is a bool"),
        (document(answers=[{"text": "b", "answer_start": "two"}]), r"answer_start is a str"),
        (document(answers=[{"text": "b", "answer_start": 2.5}]), r"answer_start is a float"),
        (document(is_impossible="maybe"), r"is_impossible is a str, not a bool"),
        (document(question="\ud83c"), rf"{WHERE}\.question holds .*no character"),
        (document(id="\udfff"), rf"{WHERE}\.id holds .*no character"),
        (
            document(answers=[{"text": "\ud83c", "answer_start": 2}]),
            rf"{WHERE}\.answers\[0\]\.text holds",
        ),
    ],
)
def test_a_faulty_json_file_is_refused_with_the_place_of_the_fault(
    content: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        questions(read(tmp_path, content))


def test_emoji_escaped_as_two_halves_are_characters(tmp_path: Path) -> None:
    assert "\\ud83c" in json.dumps(document(question="🎉?")).lower()
    assert questions(read(tmp_path, document(question="🎉?")))[0].question == "🎉?"


def test_a_json_file_without_questions_gives_none(tmp_path: Path) -> None:
    assert questions(read(tmp_path, '{"data": []}')) == []


@pytest.mark.parametrize("name", ["missing.json", "missing.parquet", "folder.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=f"There is no file .*{name}"):
        squad.read_files([tmp_path / name])


def test_other_file_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f.xlsx").write_text("id,title")
    with pytest.raises(UserError, match=r"f\.xlsx: a data file ends in \.json, \.jsonl"):
        squad.read_files([tmp_path / "f.xlsx"])


LISTS = pyarrow.struct(
    [
        ("text", pyarrow.list_(pyarrow.string())),
        ("answer_start", pyarrow.list_(pyarrow.int32())),
    ]
)


def answers(text: Any, start: Any) -> pyarrow.Array:
    return pyarrow.array([{"text": text, "answer_start": start}])


def typed(row: Any) -> pyarrow.Array:
    return pyarrow.array([row], LISTS)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("id", [True], r"\.id is a bool, not a str"),
        ("context", [b"a b c"], r"\.context is a bytes, not a str"),
        ("context", pyarrow.array([None], pyarrow.string()), r"\.context is missing \(it has id"),
        ("question", [["q"]], r"\.question is a list, not a str"),
        ("answers", [[[2]]], r"\.answers\[0\] is a list, not an object"),
        ("answers", [{"start": ["b"]}], r"\.answers has no text \(it has start\)"),
        ("answers", typed({"text": [None], "answer_start": [2]}), r"\.answers\[0\] is a NoneType"),
        ("answers", answers([["b"]], [2]), r"\.answers\[0\] is a list, not an object"),
        ("answers", answers(["b"], [2.5]), r"\.answers\[0\]\.answer_start is a float, not a int"),
        ("answers", answers(["b"], [True]), r"\.answers\[0\]\.answer_start is a bool, not a int"),
        ("answers", answers(["b"], ["x"]), r"\.answers\[0\]\.answer_start is a str, not a int"),
        ("answers", answers(["b", "b"], [2]), r"\.answers has 2 texts but 1 offsets"),
    ],
)
def test_a_faulty_parquet_file_is_refused_with_the_place_of_the_fault(
    column: str, values: Any, message: str, tmp_path: Path
) -> None:
    columns: dict[str, Any] = {"id": ["1"], "title": ["t"], "context": ["a b c"]}
    columns |= {"question": ["q"], "answers": answers(["b"], [2])}
    path = tmp_path / "f.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert len(questions(squad.read_files([path]))) == 1
    parquet.write_table(pyarrow.table(columns | {column: values}), path)
    with pytest.raises(UserError, match=rf"f\.parquet\[0\]{message}"):
        questions(squad.read_files([path]))


@pytest.mark.parametrize("column", ["id", "title", "context", "question"])
def test_parquet_text_that_is_not_utf8_is_refused(column: str, tmp_path: Path) -> None:
    columns: dict[str, Any] = {"id": ["1"], "title": ["t"], "context": ["a b c"]}
    columns |= {"question": ["q"], "answers": answers(["b"], [2])}
    columns[column] = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, pyarrow.array([b"\xff"], pyarrow.binary()).buffers()
    )
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    for read_it in (
        lambda: squad.read_files([tmp_path / "train.parquet"]),
        lambda: squad.read_folder(tmp_path),
    ):
        with pytest.raises(
            UserError, match=r"train(\.parquet)? holds a value that can't be read: '"
        ):
            read_it()


def test_a_parquet_date_beyond_pythons_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    columns: dict[str, Any] = {"id": ["1"], "context": ["a b c"], "question": ["q"]}
    columns |= {"title": pyarrow.array([2**31 - 1], pyarrow.date32())}
    parquet.write_table(pyarrow.table(columns | {"answers": answers(["b"], [2])}), path)
    with pytest.raises(UserError, match=r"f\.parquet holds a value that can't be read: days="):
        squad.read_files([path])


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    parquet.write_table(pyarrow.table({"id": ["1"], "context": ["c"]}), path)
    with pytest.raises(
        UserError, match=r"f\.parquet\[0\] has no question or qas \(it has id, context\)"
    ):
        squad.read_files([path])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet" * 100])
def test_what_is_not_parquet_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"f\.parquet can't be read as parquet: \w"):
        squad.read_files([path])


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "f.parquet", rows_of_text(tmp_path, "one"))
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"\xff" * 60 + content[80:])
    with pytest.raises(UserError, match=r"f\.parquet can't be read as parquet: \w"):
        questions(squad.read_files([path]))


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"README.md": README},
        {"README.md": "---\nconfigs: [a: b: c\n---\n"},
        {"README.md": "---\nconfigs:\n- 3\n---\n"},
        {"train.json": ""},
        {"train.json": "{"},
        {"notes.txt": "hello"},
        {"train.csv": "id,title\n1,2\n"},
        {"train.parquet": "no parquet"},
        {"train.tar": "no tar"},
        {"train.zip": "no zip"},
        {"train.csv": "id\n1\n", "dataset_infos.json": "[]"},
        {"hub.py": "an old script"},
    ],
)
def test_a_folder_that_is_no_data_set_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(
        UserError, match=r"hub is not a data set in the hub's layout|train\[0\] has no"
    ):
        squad.read_folder(folder)
