"""Reads a finished run: its record, its answers with their contexts, and where its weights are."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar, cast

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


def read_record(folder: Path, kind: type[Record]) -> Record:
    """Read the results.json of a run or of an evaluation.

    Raises:
        UserError: The file is missing, unreadable, or not as a run writes it.
    """
    return _read(folder / store.RESULTS, kind.model_validate)


def finished_record(folder: Path) -> RunRecord:
    """Read the record of a finished run.

    Raises:
        UserError: The run is not finished, or its record can't be read.
    """
    if not (folder / store.RESULTS).is_file():
        raise not_a_run(folder, "results.json (`ask` takes other adapters and models too)")
    return read_record(folder, RunRecord)


def weights_folder(folder: Path, record: RunRecord) -> Path:
    """Give the folder of the weights that a run has trained.

    Raises:
        UserError: It is missing or damaged.
    """
    weights = folder / record.exported
    if not weights.is_dir():
        raise UserError(f"{folder} has no {weights.name}/, which its run has written: copy it too.")
    if damaged := store.damaged_files(folder, among=f"{weights.name}/"):
        raise UserError(
            f"Damaged in {folder}: {', '.join(damaged)}. To train again: "
            f"python src/run.py resume='{folder}'"
        )
    return weights


def read_answers(folder: Path) -> tuple[list[Prediction], dict[str, str]]:
    """Read the answers of a run, sorted by id, and the contexts whose numbers they name.

    Raises:
        UserError: A file is missing, unreadable, or not as a run writes it.
    """
    file, contexts_file = folder / "predictions.jsonl", folder / "contexts.json"
    predictions = _read(file, _PREDICTIONS.validate_python, _json_lines)
    contexts = _read(contexts_file, _CONTEXTS.validate_python)
    if not predictions:
        raise UserError(f"{file} holds no answer.")
    if len({p["id"] for p in predictions}) < len(predictions):
        raise UserError(f"{file} has a question twice.")
    if any(str(p["paragraph"]) not in contexts for p in predictions):
        raise UserError(f"{contexts_file} lacks a paragraph of {file.name}.")
    return sorted(predictions, key=lambda p: p["id"]), contexts


def check_scores(
    folder: Path, record: RunRecord | EvaluationRecord, predictions: Sequence[Prediction]
) -> None:
    """Refuse a record whose scores are not those of its answers: one of its files is damaged.

    Raises:
        UserError: They differ.
    """
    for metric in record.test.metrics:
        values = [cast(float, p.get(metric, math.nan)) for p in predictions]
        if not abs(fmean(values) - getattr(record.test, metric)) <= SAME_MEAN:
            problem = f"predictions.jsonl does not give the {metric} of its record."
            raise UserError(f"{folder}: {problem}")


def not_a_run(folder: Path, wanted: str) -> UserError:
    """Say why a folder is no finished run, which lacks the `wanted` files, and how to get one."""
    if not folder.is_dir():
        return UserError(f"There is no folder {folder}.")
    if not any((folder / name).is_file() for name in ("config.yaml", "status.json")):
        inside = [file.parent.name for file in sorted(folder.glob("*/results.json"))]
        of_these = f" Name one of the runs in it: {', '.join(inside)}." if inside else ""
        return UserError(f"{folder} is no run: it has no {wanted}.{of_these}")
    status = store.status(folder)
    state = status.get("state", "not finished")
    if state == "failed":
        return UserError(
            f"{folder} is a run that failed ({status.get('error', 'no reason is recorded')}): it "
            "has no weights. Run it again."
        )
    return UserError(
        f"{folder} is a run that is not finished ({state}). If it is not running any more, "
        f"python src/run.py resume='{folder}' resumes it."
    )


def _json_lines(text: str) -> list[Any]:
    # Not splitlines, which also splits at characters that a text may hold.
    return [json.loads(line) for line in text.split("\n") if line]


def _read(file: Path, validate: Callable[[Any], T], parse: Callable[[str], Any] = json.loads) -> T:
    """The content of a file, or a refusal that names its problems."""
    try:
        return validate(parse(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'record'}: {one['msg']}" for one in error.errors()
        ]
        more = len(problems) - MOST_PROBLEMS
        named = "; ".join(problems[:MOST_PROBLEMS]) + (f" and {more} more" if more > 0 else "")
        raise UserError(f"{file} is not as a run writes it: {named}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file} can't be read ({reason}).") from None
