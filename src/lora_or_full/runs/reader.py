"""Reads what a finished run has left: its record, its answers, and the contexts of these."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from lora_or_full.errors import UserError, first_line
from lora_or_full.runs import store
from lora_or_full.runs.schema import EvaluationRecord, Prediction, RunRecord, Text

Record = TypeVar("Record", RunRecord, EvaluationRecord)
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
    file = folder / store.RESULTS
    return _checked(file, lambda: kind.model_validate(_json(file)))


def read_answers(folder: Path) -> Answers:
    """Read predictions.jsonl and contexts.json.

    Raises:
        UserError: A file is missing, unreadable, or not as a run writes it.
    """
    file = folder / "predictions.jsonl"
    predictions = _checked(file, lambda: _PREDICTIONS.validate_python(_lines(file)))
    contexts_file = folder / "contexts.json"
    contexts = _checked(contexts_file, lambda: _CONTEXTS.validate_python(_json(contexts_file)))
    if not predictions:
        raise UserError(f"{file} holds no answer.")
    if len({p["id"] for p in predictions}) < len(predictions):
        raise UserError(f"{file} has a question twice.")
    if any(str(p["paragraph"]) not in contexts for p in predictions):
        raise UserError(f"{contexts_file} lacks a paragraph of {file.name}.")
    return Answers(sorted(predictions, key=lambda p: p["id"]), contexts)


def check_scores(folder: Path, record: RunRecord | EvaluationRecord, answers: Answers) -> None:
    """Refuse a record whose scores are not those of its answers: one of its files is damaged.

    Raises:
        UserError: They differ.
    """
    count = len(answers.predictions)
    found = {
        "exact_match": sum(p["exact_match"] for p in answers.predictions) / count,
        "f1": sum(p["f1"] for p in answers.predictions) / count,
    }
    recorded = {"exact_match": record.test.exact_match, "f1": record.test.f1}
    for metric, value in found.items():
        if abs(value - recorded[metric]) > SAME_MEAN:
            raise UserError(
                f"{folder}: predictions.jsonl does not give the {metric} of its record."
            )


def _checked(file: Path, read: Any) -> Any:
    """The result of reading a file, or a refusal that names its problems."""
    try:
        return read()
    except ValidationError as error:
        raise UserError(f"{file} is not as a run writes it: {_problems(error.errors())}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file} can't be read ({reason}).") from None


def _problems(errors: Sequence[Any]) -> str:
    shown = [
        f"{'.'.join(map(str, one['loc'])) or 'record'}: {one['msg']}"
        for one in errors[:MOST_PROBLEMS]
    ]
    more = len(errors) - MOST_PROBLEMS
    return "; ".join(shown) + (f" and {more} more" if more > 0 else "")


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _lines(file: Path) -> list[Any]:
    # Not splitlines, which also splits at characters that a text may hold.
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
