"""The same questions from each format and shape, and offsets that count something else."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configs import make_splits

from lora_or_full.data import squad
from lora_or_full.errors import UserError

SquadWriter = Callable[..., Path]
ROWS = [
    {"id": f"q{n}", "title": f"Town {n}", "context": f'🎉 "Oslo" {n}, of old,\nwas built by Ada.',
     "question": "Who?", "answers": {"text": ["Ada"], "answer_start": [-1]}}
    for n in range(4)
]  # fmt: skip
for _row in ROWS:
    _row["answers"]["answer_start"] = [_row["context"].index("Ada")]


def written(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def columns(row: dict[str, Any]) -> dict[str, Any]:
    answers = row["answers"]
    own = {"answer_text": answers["text"][0], "answer_start": answers["answer_start"][0]}
    return {name: row[name] for name in row if name != "answers"} | own


def read(path: Path, **choices: str) -> tuple[list[squad.Question], dict[str, int]]:
    return squad.check(
        squad.read_files([path]), choices.get("unanswerable", "refuse"),
        choices.get("misaligned", "refuse"),
    )  # fmt: skip


def test_every_format_and_shape_gives_the_same_questions(tmp_path: Path) -> None:
    contents = {
        "rows.json": json.dumps(ROWS),
        "data.json": json.dumps({"data": ROWS}),
        "lines.jsonl": "\n".join(map(json.dumps, ROWS)),
        "lines.json": "\n".join(map(json.dumps, ROWS)),
        "text.json": json.dumps([row | {"answers": "Ada"} for row in ROWS]),
    }
    files = [written(tmp_path / "a.csv", list(map(columns, ROWS)))]
    files.append(written(tmp_path / "b.csv", list(map(columns, ROWS)), ";"))
    files.append(written(tmp_path / "c.tsv", list(map(columns, ROWS)), "\t"))
    files.append(written(tmp_path / "d.csv", [
        row | {"answers": f"{{'text': array(['Ada'], dtype=object), 'answer_start': "
                          f"array([{row['answers']['answer_start'][0]}], dtype=int32)}}"}
        for row in ROWS
    ]))  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_text(content, "utf-8")
        files.append(tmp_path / name)
    first = read(files[0])[0]
    assert [q.id for q in first] == ["q0", "q1", "q2", "q3"]
    for file in files:
        assert read(file)[0] == first, file.name


@pytest.mark.parametrize("text", ['title,context\n"T,c\n', "context,question\nc,q,r\n"])
def test_a_table_that_would_lose_rows_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(UserError, match=r"f\.csv, line 2 (can't be read as CSV|has 3 cells)"):
        read(tmp_path / "f.csv")


@pytest.mark.parametrize(
    ("more", "unit"),
    [(1, "UTF-16 units"), (3, "UTF-8 bytes"), (2, "UTF-16 units with lost carriage returns")],
)
def test_offsets_in_another_unit_are_recognized_by_file(
    more: int, unit: str, tmp_path: Path
) -> None:
    rows = [columns(row) for row in ROWS]
    rows = [row | {"answer_start": row["answer_start"] + more} for row in rows]
    file = written(tmp_path / "f.csv", rows)
    with pytest.raises(UserError, match=f"4 answers are not.*repair.*count {unit} in f.csv"):
        read(file)
    questions, counts = read(file, misaligned="repair")
    assert {q.starts[0] for q in questions} == {ROWS[0]["context"].index("Ada")}
    assert counts[f"offsets_in_{unit}".replace(" ", "_")] == 4


@pytest.mark.parametrize(
    ("change", "count", "words"),
    [
        ({"question": " "}, "blank_dropped", "are blank"),
        ({"context": "\n"}, "blank_dropped", "blank context"),
        ({"is_impossible": True}, "impossible_dropped", "an answer and is_impossible"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "unanswerable_dropped", "no answer"),
    ],
)
def test_what_can_not_be_answered_is_refused_or_dropped(
    change: dict[str, Any], count: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "f.json"
    file.write_text(json.dumps([ROWS[0] | change, ROWS[1]]))
    with pytest.raises(UserError, match=f"^1 of 2 questions .*{words}.*data.unanswerable=drop"):
        read(file)
    questions, counts = read(file, unanswerable="drop")
    assert [q.id for q in questions] == ["q1"]
    assert counts[count] == 1


def test_the_test_sets_questions_are_not_trained_on_under_other_ids_and_titles(
    tmp_path: Path,
) -> None:
    pool, test = tmp_path / "pool.json", tmp_path / "test.json"
    pool.write_text(json.dumps(ROWS))
    copied = ROWS[0] | {"id": 1, "title": "other", "question": "WHO?\n"}
    asked_else = ROWS[1] | {"id": "q2", "title": "another", "question": "When?"}
    test.write_text(json.dumps([copied, asked_else]))
    given = {"test_path": str(test), "validation_articles": 0.3}
    with pytest.raises(UserError, match="^1 questions of the test set .*'q0'.*data.overlap=drop"):
        make_splits(pool, tmp_path, **given).read()
    read = make_splits(pool, tmp_path, overlap="drop", **given).read()
    assert [q.id for q in read.splits["test"]] == ["1", "q2"]  # as its file has them
    trained = {q.id for name in ("train", "validation") for q in read.splits[name]}
    assert trained == {"q1", "q2 (2)", "q3"}
    assert read.counts["overlap_dropped"] == read.counts["ids_renamed"] == 1
    assert read.counts["contexts_shared_with_test"] == 1


def test_articles_that_share_a_paragraph_are_held_out_together(tmp_path: Path) -> None:
    each = [
        ROWS[n // 3] | {"id": f"{n}", "title": f"{n}", "question": f"Who? {n}"} for n in range(12)
    ]
    (tmp_path / "f.json").write_text(json.dumps(each))
    for split_seed in range(5):
        read = make_splits(tmp_path / "f.json", tmp_path, split_seed=split_seed).read()
        contexts = [{q.context for q in questions} for questions in read.splits.values()]
        assert list(map(len, contexts)) == [2, 1, 1]
        assert len(set.union(*contexts)) == 4
        assert read.counts["articles_joined"] == 8
