"""Questions from files in SQuAD v1.1's format: its JSON, or parquet with the hub's columns.

Format: Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text".
"""

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from datasets import Dataset, DatasetDict, load_dataset
from pyarrow.parquet import ParquetFile
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from lora_or_full.errors import UserError, first_line, listed

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, but no tokenizer can read it
COLUMNS = ["id", "title", "context", "question", "answers"]  # of a table
EXPECTED = {"string_type": "a str", "int_type": "a int", "list_type": "a list"}  # by pydantic error


def _whole_characters(text: str) -> str:
    if half := HALF_CHARACTER.search(text):
        raise ValueError(f"holds {half[0]!r}, which is no character")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(f"holds {text!r} as a text")
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
AnswerText = Annotated[Text, AfterValidator(_not_blank)]


class _Format(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Answer(_Format):
    text: AnswerText
    answer_start: int


class _Qa(_Format):
    id: Text
    question: Text
    answers: list[_Answer]


class _Paragraph(_Format):
    context: Text
    qas: list[_Qa]


class _Article(_Format):
    title: Text
    paragraphs: list[_Paragraph]


class _Document(_Format):
    data: list[_Article]


class _Answers(_Format):
    text: list[AnswerText]
    answer_start: list[int]


class _Row(_Format):
    id: Text
    title: Text
    context: Text
    question: Text
    answers: _Answers


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a paragraph. No text has white space at its ends."""

    id: str  # unique in its data set
    title: str  # of the article
    context: str  # the paragraph
    question: str
    answers: list[str]  # gold answers; the first is trained on
    starts: list[int]  # their offsets in `context`, in characters; -1 for one that is not there


@dataclass(frozen=True, slots=True)
class Entry(Question):
    """A question as a file has it, white space included, and its position there."""

    where: str


def read_files(paths: Iterable[Path]) -> list[Entry]:
    """Read all questions of some files, each .json in SQuAD's format or .parquet.

    Raises:
        UserError: A file is missing, or not in these formats.
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
    """Read the splits of a data set in the hub's layout.

    Raises:
        UserError: The folder holds none, or not one with SQuAD's columns.
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
    """Check questions as a whole, and strip white space.

    Args:
        entries: Questions as files have them.
        unanswerable: 'refuse' or 'drop' questions without an answer (SQuAD v2.0), or 'keep' them.
        misaligned: 'refuse' answers that are not at their offset, or 'repair' the offset by search;
            an answer that is not in the context keeps its text and gets the offset -1.

    Returns:
        The questions, and how many were dropped or repaired.

    Raises:
        UserError: An id occurs twice, or what is refused.
    """
    questions: list[Question] = []
    counts = {"unanswerable_dropped": 0, "answers_repaired": 0, "answers_not_in_context": 0}
    wrong: list[str] = []
    without_answer = [entry.where for entry in entries if not entry.answers]
    for entry in entries:
        if not entry.answers and unanswerable != "keep":
            continue
        context, starts = entry.context, []
        shift = len(context) - len(context.lstrip())
        for text, start in zip(entry.answers, entry.starts, strict=True):
            if not 0 <= start <= len(context) or not context.startswith(text, start):
                wrong.append(f"{entry.where}: {text!r} is not at {start}")
                start = _nearest(context, text, start)
                counts["answers_repaired" if start >= 0 else "answers_not_in_context"] += 1
            starts.append(start + len(text) - len(text.lstrip()) - shift if start >= 0 else -1)
        answers = [text.strip() for text in entry.answers]
        texts = (entry.id, entry.title, context.strip(), entry.question.strip())
        questions.append(Question(*texts, answers, starts))
    seen = Counter(entry.id for entry in entries)
    if twice := [name for name, count in seen.items() if count > 1]:
        raise UserError(f"{len(twice)} question ids occur more than once, the first: {twice[0]!r}.")
    if without_answer and unanswerable == "refuse":
        raise UserError(
            f"{len(without_answer)} of {len(entries)} questions have no answer (SQuAD v2.0?), the "
            f"first: {without_answer[0]}. data.unanswerable=drop leaves them out."
        )
    if wrong and misaligned == "refuse":
        raise UserError(
            f"{len(wrong)} answers are not where answer_start says, the first: {wrong[0]}. "
            "data.misaligned=repair looks for them in the context."
        )
    counts["unanswerable_dropped"] = len(without_answer) if unanswerable == "drop" else 0
    return questions, counts


def fingerprint(questions: Iterable[Question]) -> str:
    """Hash all that questions hold, in their order."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(json.dumps([getattr(q, field) for field in q.__slots__]).encode())
    return digest.hexdigest()[:16]


def _json_entries(path: Path) -> Iterator[Entry]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: UTF-8, JSON, huge numbers
        raise UserError(f"{path} can't be read as JSON: {first_line(error)}") from None
    try:
        document = _Document.model_validate(content)
    except ValidationError as error:
        raise _not_squad(f"{path.name}: ", error) from None
    for i, article in enumerate(document.data):
        for j, paragraph in enumerate(article.paragraphs):
            for k, qa in enumerate(paragraph.qas):
                texts = [answer.text for answer in qa.answers]
                starts = [answer.answer_start for answer in qa.answers]
                where = f"{path.name}: data[{i}].paragraphs[{j}].qas[{k}]"
                yield Entry(
                    qa.id, article.title, paragraph.context, qa.question, texts, starts, where
                )


def _not_squad(where: str, error: ValidationError) -> UserError:
    """Say where a file leaves SQuAD's format, and how; of many faults the first."""
    fault = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    path = where + (path.removeprefix(".") if where.endswith(" ") else path)
    value, kind = fault["input"], fault["type"]
    if kind == "missing":
        what = f"is missing (it has {listed(value) or 'nothing'})"
    elif kind == "value_error":
        what = str(fault["ctx"]["error"])
    else:
        wanted = EXPECTED.get(kind, "an object")
        what = f"is a {type(value).__name__}, not {wanted}"
    return UserError(f"Not SQuAD's format: {path.rstrip(' :')} {what}.")


def _parquet(path: Path) -> Dataset:
    try:
        with ParquetFile(path) as file:  # not by `datasets`, which refuses one without rows
            return Dataset(file.read())
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise UserError(f"{path} can't be read as parquet: {_reason(error)}") from None


def _table_entries(table: Dataset, name: str) -> Iterator[Entry]:
    if missing := [column for column in COLUMNS if column not in table.column_names]:
        raise UserError(
            f"Not SQuAD's format: {name} has no column {', '.join(missing)} "
            f"(it has {listed(table.column_names)})."
        )
    for n, values in enumerate(_rows(table.select_columns(COLUMNS), name)):
        where = f"{name}[{n}]"
        answers = values["answers"]
        if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= answers.keys():
            raise UserError(f"Not SQuAD's format: {where}.answers has no text and answer_start.")
        try:
            row = _Row.model_validate(values)
        except ValidationError as error:
            raise _not_squad(where, error) from None
        texts, starts = row.answers.text, row.answers.answer_start
        if len(texts) != len(starts):
            raise UserError(
                f"Not SQuAD's format: {where}.answers has {len(texts)} texts but {len(starts)} "
                "offsets."
            )
        yield Entry(row.id, row.title, row.context, row.question, texts, starts, where)


def _rows(table: Dataset, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from table
    except Exception as error:  # text that is no UTF-8, or a date that Python doesn't know
        raise UserError(
            f"Not SQuAD's format: {name} holds a value that can't be read: {_reason(error)}"
        ) from None


def _nearest(context: str, text: str, start: int) -> int:
    """The offset of `text` in `context` nearest to `start`; -1 if there is none."""
    before = context.rfind(text, 0, max(0, start) + len(text))
    after = context.find(text, max(0, start))
    found = [offset for offset in (before, after) if offset >= 0]
    return min(found, key=lambda offset: abs(offset - start)) if found else -1


def _reason(error: Exception) -> str:
    return first_line(error.__cause__ or error)  # `datasets` says least, its cause more
