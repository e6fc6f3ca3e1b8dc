"""Score finished runs on another test set: lora-or-full evaluate RUN [RUN ...] DATA

DATA is a .json file in SQuAD's format, or .parquet with the same columns. The runs answer it as
they answered their own test set; the scores go to RUN/evaluations/<name>/. The report of the runs
then compares all their test sets.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lora_or_full.cli.arguments import add_base_model, existing_folder
from lora_or_full.config.schema import Config
from lora_or_full.errors import UserError
from lora_or_full.evaluation.metrics import labels
from lora_or_full.evaluation.predictions import Prediction, prediction, scores
from lora_or_full.evaluation.scoring import warn_of_script
from lora_or_full.runs import provenance, store
from lora_or_full.runs.reader import finished_record, read_record
from lora_or_full.runs.schema import EvaluationRecord

if TYPE_CHECKING:  # torch takes seconds, which a wrong command line need not wait for
    from lora_or_full.data.squad import Question
    from lora_or_full.generation.predictor import Predictor

NAME = re.compile(r"[\w-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("runs", type=existing_folder, nargs="+", metavar="RUN")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--name", help="name of this test set in the report (the file's)")
    add_base_model(parser)
    for option, other, what in (
        ("--unanswerable", "drop", "questions without an answer"),
        ("--misaligned", "repair", "answers that are not at their answer_start"),
    ):
        choices, default = ("refuse", other), "refuse"
        parser.add_argument(option, choices=choices, default=default, help=f"{what} (refuse)")


def run(args: argparse.Namespace) -> None:
    """Score each run, and print a table."""
    name = args.name or re.sub(r"[^\w-]+", "_", args.data.stem)
    if not NAME.fullmatch(name):
        raise UserError(f"--name={name}: must be a name of letters, digits, - and _.")
    from lora_or_full.data import squad

    entries = squad.read_files([args.data])
    questions, counts = squad.check(entries, args.unanswerable, args.misaligned)
    if not questions:
        raise UserError(f"{args.data} holds no question with an answer.")
    found: dict[str, dict[str, Any]] = {}
    for folder in args.runs:
        results = evaluate(folder, name, questions, counts, args.model)
        found[folder.name] = results["test"]
        if count := results["data"]["trained_on"]:
            print(f"Note: {folder} was trained on {count:,} of these questions.", file=sys.stderr)
    _print_scores(name, found)
    print(f"lora-or-full report {' '.join(map(str, args.runs))}  # compares all test sets")


def evaluate(
    folder: Path, name: str, questions: "list[Question]", counts: dict[str, int], base: str | None
) -> dict[str, Any]:
    """Score a run on the test set `name`, and record the scores.

    Args:
        folder: The run's folder.
        name: Name of the test set.
        questions: Its questions.
        counts: Questions of the file that were repaired or dropped.
        base: Hub id or folder of the base model; None for the one that the run names.

    Returns:
        The content of evaluations/<name>/results.json.

    Raises:
        UserError: The run can't be loaded, has scores on other questions under this name, or the
            record can't be written.
    """
    from lora_or_full.data.squad import fingerprint
    from lora_or_full.generation.predictor import load
    from lora_or_full.modeling.precision import device_name

    config = finished_record(folder).config  # of runs only: other models have no record to extend
    output, of_questions = folder / "evaluations" / name, fingerprint(questions)
    if (output / store.RESULTS).is_file() and _recorded_fingerprint(output) != of_questions:
        raise UserError(f"{output} holds the scores on other questions: choose another --name.")
    warn_of_script((text for q in questions for text in q.answers), config.scoring)
    predictor, began = load(folder, base), time.monotonic()
    rows = predictions_of(predictor, questions)
    contexts = list(dict.fromkeys(q.context for q in questions))  # by the number of a paragraph
    results = {
        "name": name,
        "data": {
            "test": {
                "questions": len(rows),
                "paragraphs": len(contexts),
                "articles": len({q.title for q in questions}),
                "truncated": sum(row["context_cut"] for row in rows),
                "fingerprint": of_questions,
                "in_all_files": counts,
            },
            "trained_on": seen(config, questions),
        },
        "test": scores(rows, config.metrics),
        "seconds": time.monotonic() - began,
        "environment": provenance.environment(
            device_name(predictor.model.device), provenance.commit()
        ),
    }
    texts = {str(number): text for number, text in enumerate(contexts)}
    try:
        store.write_json(output / "contexts.json", texts)
        store.write_lines(output / "predictions.jsonl", rows)
        store.write_json(output / store.RESULTS, results)
    except OSError as error:
        raise UserError(f"{output} can't be written: {error.strerror}.") from None
    return results


def predictions_of(predictor: "Predictor", questions: "list[Question]") -> list[Prediction]:
    """Answer and score questions; the predictions come by id."""
    answered = predictor.answers(questions)
    scored = [prediction(row, answer, predictor.config) for row, answer in answered]
    return sorted(scored, key=lambda row: row["id"])


def seen(config: Config, questions: "list[Question]") -> int | None:
    """Count the questions of a run's training or validation set; None if its data is gone."""
    from lora_or_full.data.splits import Splits

    try:
        splits, _ = Splits(config.data, config.seed, Path(config.cache_dir)).read()
    except UserError:
        return None
    known = {(q.context, q.question) for name in ("train", "validation") for q in splits[name]}
    return sum((q.context, q.question) in known for q in questions)


def _print_scores(title: str, found: dict[str, dict[str, Any]]) -> None:
    """Print a row for the scores of each model by its name."""
    names = [name for test in found.values() for name in test if f"{name}_interval" in test]
    metrics = labels(names)
    table = Table("run", "questions", *metrics.values(), title=title, title_justify="left")
    for model, test in found.items():
        cells = [
            "{:.1f} [{:.1f}, {:.1f}]".format(test[name], *test[f"{name}_interval"])
            if name in test
            else ""
            for name in metrics
        ]
        table.add_row(model, f"{test['questions']:,}", *cells)
    Console().print(table)


def _recorded_fingerprint(folder: Path) -> str | None:
    try:
        return read_record(folder, EvaluationRecord).data.test.fingerprint
    except UserError:
        return None
