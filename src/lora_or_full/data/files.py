"""Data files as plain values: JSON, JSON lines, CSV, parquet, and folders in the hub's layout.

What the values mean is for squad.py to say.
"""

import ast
import csv
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset
from pyarrow.parquet import ParquetFile

from lora_or_full.errors import UserError, first_line, listed

DELIMITERS = ",;\t|"
LONGEST_CELL = 2**31 - 1  # characters of a CSV cell; the module's own limit cuts long contexts


class Value(NamedTuple):
    """A value of a file: a whole JSON document, or a row of a table."""

    where: str  # 'f.json: ' before a document, 'f.csv: line 2' for a row
    number: int | None  # of the row, from 0; None for a document
    content: Any


def read_file(path: Path) -> Iterator[Value]:
    """Read a file of one of SUFFIXES.

    Raises:
        UserError: It is not in the format that its name says, or its text is not UTF-8.
    """
    return READERS[path.suffix.lower()](path)


def read_folder(folder: Path, config: str | None) -> dict[str, Iterator[Value]]:
    """Read the splits of a data set in the hub's layout.

    Args:
        folder: The data set's folder.
        config: Which of its configurations, where it has several.

    Raises:
        UserError: The folder holds no data set, or not this configuration.
    """
    try:
        # Without its cache, which takes a file of the same time as before for the same file.
        with tempfile.TemporaryDirectory() as cache:
            splits = load_dataset(str(folder), config, cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # of many kinds: what a folder holds is read by many libraries
        raise _no_data_set(folder, config, error) from None
    assert isinstance(splits, DatasetDict)
    return {str(name): _rows(table, str(name)) for name, table in splits.items()}


def _no_data_set(folder: Path, config: str | None, error: Exception) -> UserError:
    try:
        names = get_dataset_config_names(str(folder))
    except Exception:  # as above: then it is no data set at all
        names = []
    if config not in names and (config is not None or len(names) > 1) and names:
        return UserError(
            f"data.config={'null' if config is None else config}: the data set in {folder} has the "
            f"configurations {listed(names)}. Choose one: data.config={names[0]}"
        )
    return UserError(
        f"{folder} is not a data set in the hub's layout ({_reason(error)}). "
        "For files name the files: data.path=[train.json,more.csv]"
    )


def _json(path: Path) -> Iterator[Value]:
    """A JSON document, or one in each line, whichever the file's name says."""
    text = _text(path)
    try:
        yield Value(f"{path.name}: ", None, json.loads(text))
        return
    except (ValueError, RecursionError) as error:  # ValueError: JSON, huge numbers
        fault = error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    in_lines = isinstance(fault, json.JSONDecodeError) and fault.msg == "Extra data"
    if not in_lines and path.suffix.lower() == ".json":
        raise UserError(f"{path} can't be read as JSON: {first_line(fault)}")
    for number, (n, line) in enumerate(lines):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {n} can't be read as JSON: {first_line(error)}"
            ) from None
        yield Value(f"{path.name}: line {n}", number, content)


def _csv(path: Path) -> Iterator[Value]:
    """The rows of a table whose first line names the columns."""
    text = _text(path)
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    csv.field_size_limit(LONGEST_CELL)
    # Strict: otherwise a quotation mark that is never closed swallows the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    number, line = 0, 1
    try:
        for cells in reader:
            if cells and not columns:
                columns = [cell.strip().lower() for cell in cells]
                if twice := [name for name in columns if name and columns.count(name) > 1]:
                    raise UserError(f"{path}: two columns are named {twice[0]!r}.")
            elif cells:
                if len(cells) != len(columns):
                    raise UserError(
                        f"{path}, line {line} has {len(cells)} cells, not {len(columns)} as the "
                        f"first line: does one hold {delimiter!r} without quotation marks?"
                    )
                content = {n: _cell(n, cell) for n, cell in zip(columns, cells, strict=True)}
                yield Value(f"{path.name}: line {line}", number, content)
                number += 1
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line} can't be read as CSV: {error}.") from None


def _cell(name: str, cell: str) -> Any:
    """A cell; in the column answers a list or dict, as JSON or pandas spells it, as such."""
    if name != "answers" or not cell.startswith(("{", "[")):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(_PlainLists().visit(ast.parse(cell, mode="eval")))
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            return cell
    items = value if isinstance(value, list) else [value]
    return value if all(isinstance(item, (str, dict)) for item in items) else cell


class _PlainLists(ast.NodeTransformer):
    """Takes numpy's array([...], dtype=...) for its list."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        return node.args[0] if name == "array" and node.args else node


def _parquet(path: Path) -> Iterator[Value]:
    try:
        with ParquetFile(path) as file:  # not by `datasets`, which refuses one without rows
            table = Dataset(file.read())
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise UserError(f"{path} can't be read as parquet: {_reason(error)}") from None
    return _rows(table, path.name)


def _rows(table: Dataset, name: str) -> Iterator[Value]:
    try:
        for number, row in enumerate(table):
            yield Value(f"{name}[{number}]", number, row)
    except Exception as error:  # text that is no UTF-8, or a date that Python doesn't know
        raise UserError(f"{name} holds a value that can't be read: {_reason(error)}") from None


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    try:
        text = raw.decode("utf-8-sig")
        fault = None if "\0" not in text else text.index("\0")
    except UnicodeDecodeError as error:
        fault = error.start
    if fault is None:
        return text
    if raw.startswith((b"\x1f\x8b", b"PK\3\4", b"PAR1")):
        raise UserError(f"{path} is no text: unpack it, or give it the ending of what it is.")
    line = raw.count(b"\n", 0, fault) + 1
    kind = (
        "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw else "Windows-1252"
    )
    raise UserError(
        f"{path} is not in UTF-8 (line {line}; is it {kind}?). Save it as "
        "UTF-8: in a spreadsheet 'CSV UTF-8', in an editor 'Save as', in Python open(..., "
        "encoding='utf-8')."
    )


def _reason(error: Exception) -> str:
    return first_line(error.__cause__ or error)  # `datasets` says least, its cause more


READERS = {
    ".json": _json, ".jsonl": _json, ".ndjson": _json, ".csv": _csv, ".tsv": _csv,
    ".parquet": _parquet,
}  # fmt: skip
SUFFIXES = tuple(READERS)
