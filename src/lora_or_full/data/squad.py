"""Questions from files in SQuAD v1.1's format: its JSON, or parquet with the hub's columns."""

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from pyarrow.parquet import ParquetFile

from lora_or_full.errors import UserError, first_line, listed

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, but no tokenizer can read it


@dataclass(frozen=True, slots=True)
class Question:
    """A question over a paragraph. No text has white space at its ends.

    `starts` are the offsets of `answers` in `context`, in characters.
    """

    id: str
    title: str
    context: str
    question: str
    answers: list[str]
    starts: list[int]


@dataclass(frozen=True, slots=True)
class Entry:
    """A question as a file has it, and `where` it stands there."""

    where: str
    id: Any
    title: Any
    context: Any
    question: Any
    answers: Any
    starts: Any


def read_files(paths: Iterable[Path]) -> list[Entry]:
    """All questions of some files, each .json in SQuAD's format or .parquet.

    Raises:
        UserError: a file is missing, or not of these formats.
    """
    entries: list[Entry] = []
    for path in paths:
        if not os.path.isfile(path):  # a Path raises on names that are too long
            raise UserError(f"There is no file {path}. Check the data's name (data.path).")
        if path.suffix == ".json":
            entries += _json_entries(path)
        elif path.suffix == ".parquet":
            entries += _table_entries(_parquet(path), path.name)
        else:
            raise UserError(f"{path}: a data file ends in .json (SQuAD's format) or .parquet.")
    return entries


def read_folder(folder: Path) -> dict[str, list[Entry]]:
    """The splits of a data set in the hub's layout.

    Raises:
        UserError: the folder holds none, or not one with SQuAD's columns.
    """
    try:
        # Without its cache, which takes a file of the same time as before for the same file.
        with tempfile.TemporaryDirectory() as cache:
            splits = load_dataset(str(folder), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # of many kinds: what a folder holds is read by many libraries
        raise UserError(
            f"{folder} is not a data set in the hub's layout ({_reason(error)}). "
            "For files in SQuAD's JSON format name the files: data.path=[train.json,more.json]"
        ) from None
    assert isinstance(splits, DatasetDict)
    return {str(name): list(_table_entries(table, str(name))) for name, table in splits.items()}


def check(
    entries: list[Entry], unanswerable: str, misaligned: str
) -> tuple[list[Question], dict[str, int]]:
    """The questions of `entries`, and how many were dropped or repaired.

    `unanswerable`: 'refuse' or 'drop' questions without an answer (SQuAD v2.0), or 'keep' them,
    with none.
    `misaligned`: 'refuse' answers that don't stand at their offset, or 'repair' the offset by
    search; an answer that stands nowhere keeps its text and gets the offset -1.

    Raises:
        UserError: a field is missing or of the wrong type, an id occurs twice, or what is refused.
    """
    questions: list[Question] = []
    seen: Counter[str] = Counter()
    counts = {"unanswerable_dropped": 0, "answers_repaired": 0, "answers_not_in_context": 0}
    wrong: list[str] = []
    without_answer: list[str] = []
    for entry in entries:
        _check_types(entry)
        seen[entry.id] += 1
        if not entry.answers:
            without_answer.append(entry.where)
            if unanswerable != "keep":
                continue
        context = entry.context.strip()
        shift = len(entry.context) - len(entry.context.lstrip())
        answers, starts = [], []
        for text, start in zip(entry.answers, entry.starts, strict=True):
            if not 0 <= start <= len(entry.context) or not entry.context.startswith(text, start):
                found = _nearest(entry.context, text, start)
                wrong.append(f"{entry.where}: {text!r} is not at {start}")
                counts["answers_repaired" if found >= 0 else "answers_not_in_context"] += 1
                start = found
            answers.append(text.strip())
            starts.append(start + len(text) - len(text.lstrip()) - shift if start >= 0 else -1)
        questions.append(
            Question(entry.id, entry.title, context, entry.question.strip(), answers, starts)
        )
    if twice := [name for name, count in seen.items() if count > 1]:
        raise UserError(f"{len(twice)} question ids occur more than once, the first: {twice[0]!r}.")
    if without_answer and unanswerable == "refuse":
        raise UserError(
            f"{len(without_answer)} of {len(entries)} questions have no answer (SQuAD v2.0?), the "
            f"first: {without_answer[0]}. data.unanswerable=drop leaves them out."
        )
    if wrong and misaligned == "refuse":
        raise UserError(
            f"{len(wrong)} answers do not stand where answer_start says, the first: {wrong[0]}. "
            "data.misaligned=repair looks for them in the context."
        )
    counts["unanswerable_dropped"] = len(without_answer) if unanswerable == "drop" else 0
    return questions, counts


def fingerprint(questions: Iterable[Question]) -> str:
    """A hash of all that `questions` hold, in their order."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(json.dumps([getattr(q, field) for field in q.__slots__]).encode())
    return digest.hexdigest()[:16]


def _json_entries(path: Path) -> Iterator[Entry]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: UTF-8, JSON, huge numbers
        raise UserError(f"{path} can't be read as JSON: {first_line(error)}") from None
    for i, article in enumerate(_field(content, "data", list, f"{path.name}: ")):
        at = f"{path.name}: data[{i}]"
        title = _field(article, "title", str, at + ".")
        for j, paragraph in enumerate(_field(article, "paragraphs", list, at + ".")):
            spot = f"{at}.paragraphs[{j}]"
            context = _field(paragraph, "context", str, spot + ".")
            for k, qa in enumerate(_field(paragraph, "qas", list, spot + ".")):
                where = f"{spot}.qas[{k}]"
                answers = _field(qa, "answers", list, where + ".")
                yield Entry(
                    where,
                    _field(qa, "id", str, where + "."),
                    title,
                    context,
                    _field(qa, "question", str, where + "."),
                    [
                        _field(a, "text", str, f"{where}.answers[{n}].")
                        for n, a in enumerate(answers)
                    ],
                    [
                        _field(a, "answer_start", int, f"{where}.answers[{n}].")
                        for n, a in enumerate(answers)
                    ],
                )


def _field(holder: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(holder, dict) or name not in holder:
        has = (
            f"it has {listed(holder) or 'nothing'}"
            if isinstance(holder, dict)
            else (f"what stands there is a {type(holder).__name__}")
        )
        raise UserError(f"Not SQuAD's format: {where}{name} is missing ({has}).")
    value = holder[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(
            f"Not SQuAD's format: {where}{name} is a {type(value).__name__}, not a {kind.__name__}."
        )
    return value


def _parquet(path: Path) -> Dataset:
    try:
        with ParquetFile(path) as file:  # not by `datasets`, which refuses one without rows
            return Dataset(file.read())
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise UserError(f"{path} can't be read as parquet: {_reason(error)}") from None


def _table_entries(table: Dataset, name: str) -> Iterator[Entry]:
    columns = ["id", "title", "context", "question", "answers"]
    if missing := [column for column in columns if column not in table.column_names]:
        raise UserError(
            f"Not SQuAD's format: {name} has no column {', '.join(missing)} "
            f"(it has {listed(table.column_names)})."
        )
    for n, row in enumerate(_rows(table.select_columns(columns), name)):
        where = f"{name}[{n}]"
        answers = row["answers"]
        if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
            raise UserError(f"Not SQuAD's format: {where}.answers has no text and answer_start.")
        texts, starts = answers["text"], answers["answer_start"]
        yield Entry(where, row["id"], row["title"], row["context"], row["question"], texts, starts)


def _rows(table: Dataset, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from table
    except Exception as error:  # text that is no UTF-8, or a date that Python doesn't know
        raise UserError(
            f"Not SQuAD's format: {name} holds a value that can't be read: {_reason(error)}"
        ) from None


def _check_types(entry: Entry) -> None:
    for name in ("id", "title", "context", "question"):
        value = getattr(entry, name)
        if not isinstance(value, str):
            raise UserError(
                f"Not SQuAD's format: {entry.where}.{name} is a {type(value).__name__}, not a str."
            )
        if half := HALF_CHARACTER.search(value):
            raise UserError(f"{entry.where}.{name} holds {half[0]!r}, which is no character.")
    for name, value in (("text", entry.answers), ("answer_start", entry.starts)):
        if not isinstance(value, list):
            raise UserError(
                f"Not SQuAD's format: {entry.where}.answers.{name} is a {type(value).__name__}, "
                "not a list."
            )
    if len(entry.answers) != len(entry.starts):
        raise UserError(
            f"Not SQuAD's format: {entry.where}.answers has {len(entry.answers)} texts but "
            f"{len(entry.starts)} offsets."
        )
    for text, start in zip(entry.answers, entry.starts, strict=True):
        if not isinstance(text, str) or not text.strip() or HALF_CHARACTER.search(text):
            raise UserError(f"Not SQuAD's format: {entry.where}.answers holds {text!r} as a text.")
        if not isinstance(start, int) or isinstance(start, bool):
            raise UserError(
                f"Not SQuAD's format: {entry.where}.answers holds {start!r} as an answer_start."
            )


def _nearest(context: str, text: str, start: int) -> int:
    """The offset of the `text` in `context` that is nearest to `start`; -1 if there is none."""
    before = context.rfind(text, 0, max(0, start) + len(text))
    after = context.find(text, max(0, start))
    found = [offset for offset in (before, after) if offset >= 0]
    return min(found, key=lambda offset: abs(offset - start)) if found else -1


def _reason(error: Exception) -> str:
    return first_line(error.__cause__ or error)  # `datasets` says least, its cause more
