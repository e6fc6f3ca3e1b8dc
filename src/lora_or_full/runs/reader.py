"""Reads what a finished run has left: its record, its answers, and the contexts of these."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from lora_or_full.errors import UserError, first_line
from lora_or_full.runs import store
from lora_or_full.runs.schema import EvaluationRecord, Prediction, RunRecord, Text

Record = TypeVar("Record", RunRecord, EvaluationRecord)
T = TypeVar("T")
MOST_PROBLEMS = 3  # that are named
SAME_MEAN = 1e-6  # percentage points between recorded and recomputed scores
_PREDICTIONS = TypeAdapter(list[Prediction])
_CONTEXTS = TypeAdapter(dict[str, Text])


class Answers(NamedTuple):
    """The answers of a run to its test questions, by id, and the contexts that they name."""

    predictions: list[Prediction]
    contexts: dict[str, str]


def read_record(folder: Path, kind: type[Record]) -> Record:
    """Read results.json.

    Args:
        folder: Folder of a run or of an evaluation.
        kind: RunRecord or EvaluationRecord.

    Raises:
        UserError: The file is missing, unreadable, or not as a run writes it.
    """
    return _read(folder / store.RESULTS, lambda text: kind.model_validate(json.loads(text)))


def read_answers(folder: Path) -> Answers:
    """Read predictions.jsonl and contexts.json.

    Raises:
        UserError: A file is missing, unreadable, or not as a run writes it.
    """
    file, contexts_file = folder / "predictions.jsonl", folder / "contexts.json"
    # Not splitlines, which also splits at characters that a text may hold.
    predictions = _read(
        file,
        lambda text: _PREDICTIONS.validate_python(
            [json.loads(line) for line in text.split("\n") if line]
        ),
    )
    contexts = _read(contexts_file, lambda text: _CONTEXTS.validate_python(json.loads(text)))
    if not predictions:
        raise UserError(f"{file} holds no answer.")
    if len({p["id"] for p in predictions}) < len(predictions):
        raise UserError(f"{file} has a question twice.")
    if any(str(p["paragraph"]) not in contexts for p in predictions):
        raise UserError(f"{contexts_file} lacks a paragraph of {file.name}.")
    return Answers(sorted(predictions, key=lambda p: p["id"]), contexts)


def check_scores(
    folder: Path, record: RunRecord | EvaluationRecord, predictions: Sequence[Prediction]
) -> None:
    """Refuse a record whose scores are not those of its answers: one of its files is damaged.

    Raises:
        UserError: They differ.
    """
    for metric, recorded, values in (
        ("exact_match", record.test.exact_match, [p["exact_match"] for p in predictions]),
        ("f1", record.test.f1, [p["f1"] for p in predictions]),
    ):
        if abs(sum(values) / len(values) - recorded) > SAME_MEAN:
            raise UserError(
                f"{folder}: predictions.jsonl does not give the {metric} of its record."
            )


def _read(file: Path, parse: Callable[[str], T]) -> T:
    """The content of a file, or a refusal that names its problems."""
    try:
        return parse(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        errors: Sequence[Any] = error.errors()
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'record'}: {one['msg']}"
            for one in errors[:MOST_PROBLEMS]
        ]
        more = len(errors) - MOST_PROBLEMS
        also = f" and {more} more" if more > 0 else ""
        raise UserError(f"{file} is not as a run writes it: {'; '.join(problems)}{also}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file} can't be read ({reason}).") from None
