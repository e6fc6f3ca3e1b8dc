"""Score models without training: lora-or-full evaluate MODEL [MODEL ...] DATA

MODEL is a finished run, an adapter in PEFT's format, or a model (folder or hub id).
DATA is a file of questions (.json, .jsonl, .csv, .parquet), a data set (folder or hub
id), or a finished run, whose own test questions are taken, and its limits and precision.

The scores of a run go to RUN/evaluations/<name>/, and the report of the runs then compares all
their test sets. Those of another model go to a folder of their own; the report of runs that were
tested on the same questions has a row for it.
"""

import argparse
import os
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lora_or_full.cli.arguments import add_base_model
from lora_or_full.config import compose
from lora_or_full.config.schema import Config, validate
from lora_or_full.errors import UserError
from lora_or_full.evaluation.metrics import labels
from lora_or_full.evaluation.predictions import Prediction, prediction, scores
from lora_or_full.evaluation.scoring import warn_of_script
from lora_or_full.runs import provenance, store
from lora_or_full.runs.reader import finished_record, not_a_run, read_record
from lora_or_full.runs.schema import EvaluationRecord, metric_names

if TYPE_CHECKING:  # torch takes seconds, which a wrong command line need not wait for
    from lora_or_full.data.squad import Question
    from lora_or_full.generation.predictor import Predictor

NAME = re.compile(r"[\w-]+")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class TestSet(NamedTuple):
    """Questions to score on.

    Attributes:
        questions: The questions.
        counts: Questions of the files that were repaired or dropped.
        training: Questions of the training articles; none if only a file is known.
        config: Configuration of the run whose test questions they are, which other models are
            asked by too; None if they are of no run.
    """

    questions: "list[Question]"
    counts: dict[str, int]
    training: "list[Question]"
    config: Config | None


class Examples(NamedTuple):
    """Answered questions that stand before each prompt, and the seed that drew them."""

    questions: "list[Question]"
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--name", help="name of this test set in the report (that of DATA)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER",
        help="folder for the scores of a MODEL that is no run (runs/<model>_<name>)",
    )  # fmt: skip
    add_base_model(parser)
    parser.add_argument(
        "--shots", type=int, default=0, metavar="K",
        help="answered examples before each question (0: zero-shot)",
    )  # fmt: skip
    parser.add_argument(
        "--examples", type=Path, metavar="FILE",
        help="where they are drawn from, if DATA is a file (the training articles of DATA)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="seed that draws the examples (1)")
    parser.add_argument("--scoring", help="rules of EM and F1: squad, mlqa-zh, ... (the run's)")
    parser.add_argument("--metrics", help="such as exact_match,f1,rouge_l (the run's)")
    for option, other, what in (
        ("--unanswerable", "drop", "questions without an answer"),
        ("--misaligned", "repair", "answers that are not at their answer_start"),
    ):
        choices, default = ("refuse", other), "refuse"
        parser.add_argument(option, choices=choices, default=default, help=f"{what} (refuse)")


def run(args: argparse.Namespace) -> None:
    """Score each model, and print a table."""
    drawn = f"_{args.shots}shot_seed{args.seed}" if args.shots else ""
    name = args.name or re.sub(r"[^\w-]+", "_", Path(args.data).stem) + drawn
    if not NAME.fullmatch(name):
        raise UserError(f"--name={name}: must be a name of letters, digits, - and _.")
    changes: dict[str, Any] = {} if args.scoring is None else {"scoring": args.scoring}
    if args.metrics is not None:
        changes["metrics"] = args.metrics.split(",")
    _changed(compose.defaults(), changes)  # refused before anything slow is imported
    others = [model for model in args.models if not _is_run(model)]
    if args.output is not None and len(others) != 1:
        raise UserError("--output is for the scores of one MODEL that is no run.")
    if args.shots < 0:
        raise UserError(f"--shots={args.shots}: must be a whole number from 0.")
    for model in others:
        _model_folder(model)
    test_set = _test_set(args.data, args.unanswerable, args.misaligned)
    examples = Examples(_drawn(test_set, args), args.seed)
    found: dict[str, dict[str, Any]] = {}
    for model in args.models:
        short = os.path.basename(os.path.abspath(model))
        output = Path(model, "evaluations", name)
        if model in others:
            folder = Path(compose.defaults().output_dir, re.sub(r"[^\w.-]+", "_", short))
            output = args.output or folder.with_name(f"{folder.name}_{name}")
        results = evaluate(model, name, output, test_set, examples, args.model, changes)
        found[short] = results["test"]
        if count := results["data"]["trained_on"]:
            print(f"Note: {model} was trained on {count:,} of these questions.", file=sys.stderr)
        test = results["data"]["test"]
        if cut := test["truncated"]:
            print(
                f"Note: {model} read a shortened context for {cut:,} of {test['questions']:,} "
                "questions, since prompts have to fit.",
                file=sys.stderr,
            )
        if model in others:
            print(output)
    _print_scores(name, found)
    if runs := [model for model in args.models if model not in others]:
        print(f"lora-or-full report {' '.join(runs)}  # compares all test sets")
    elif test_set.config is not None:
        print(f"lora-or-full report {args.data} {output}  # the results have a row for it")


def evaluate(
    model: str,
    name: str,
    output: Path,
    test_set: TestSet,
    examples: Examples,
    base: str | None,
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Score a model on the test set `name`, and record the scores.

    Args:
        model: Folder of a finished run, an adapter or a model, or a model's hub id.
        name: Name of the test set.
        output: Folder to write.
        test_set: Its questions.
        examples: What stands before each of them, if anything.
        base: Hub id or folder of the base model; None for the one that the run or adapter names.
        changes: Values of `scoring` and `metrics` that replace those of the configuration.

    Returns:
        What results.json holds.

    Raises:
        UserError: The model can't be loaded, `output` holds scores on other questions, or the
            record can't be written.
    """
    from lora_or_full.data.fingerprints import weights_fingerprint
    from lora_or_full.data.squad import fingerprint
    from lora_or_full.generation.predictor import load
    from lora_or_full.modeling.precision import device_name

    questions, of_questions = test_set.questions, fingerprint(test_set.questions)
    if (output / store.RESULTS).is_file() and _recorded_fingerprint(output) != of_questions:
        raise UserError(f"{output} holds the scores on other questions: choose another --name.")
    began, folder = time.monotonic(), Path(model) if _is_run(model) else _model_folder(model)
    predictor = load(folder, base, test_set.config)
    config = _changed(predictor.config, changes)
    warn_of_script((text for q in questions for text in q.answers), config.scoring)
    predictor = replace(predictor, config=config).with_examples(examples.questions)
    rows = predictions_of(predictor, questions)
    weights = sum(weight.numel() for weight in predictor.model.parameters())
    facts = {"name": model, "fingerprint": weights_fingerprint(folder), "weights": weights}
    contexts = list(dict.fromkeys(q.context for q in questions))  # by the number of a paragraph
    results = {
        "name": name,
        "model": None if predictor.record else facts,
        "shots": len(examples.questions),
        "examples": [q.id for q in examples.questions],
        "seed": examples.seed if examples.questions else None,
        "scoring": config.scoring,
        "precision": config.trainer.precision,
        "max_length": config.max_length,
        "max_new_tokens": config.max_new_tokens,
        "data": {
            "test": {
                "questions": len(rows),
                "paragraphs": len(contexts),
                "articles": len({q.title for q in questions}),
                "truncated": sum(row["context_cut"] for row in rows),
                "fingerprint": of_questions,
                "in_all_files": test_set.counts,
            },
            "trained_on": seen(predictor.record.config, questions) if predictor.record else None,
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
        splits = Splits(config.data, config.seed, Path(config.cache_dir)).read().splits
    except UserError:
        return None
    known = {(q.context, q.question) for name in ("train", "validation") for q in splits[name]}
    return sum((q.context, q.question) in known for q in questions)


def _test_set(data: str, unanswerable: str, misaligned: str) -> TestSet:
    """Read the questions of a file, of a run's test set, or of a data set's."""
    from datasets import disable_progress_bars

    from lora_or_full.data import squad
    from lora_or_full.data.files import SUFFIXES
    from lora_or_full.data.splits import Splits

    disable_progress_bars()
    if Path(data).suffix.lower() in SUFFIXES:
        questions, counts = squad.check(squad.read_files([Path(data)]), unanswerable, misaligned)
        if not questions:
            raise UserError(f"{data} holds no question with an answer.")
        return TestSet(questions, counts, [], None)
    if Path(data, store.RESULTS).is_file() or store.status(Path(data)):
        config: Config | None = finished_record(Path(data)).config
    elif os.path.isdir(data) or HUB_ID.fullmatch(data):
        config = None
    else:
        raise UserError(f"DATA={data}: there is no such file, folder or data set.")
    values = config or compose.defaults()  # all questions of the training articles
    rules = {"unanswerable": unanswerable, "misaligned": misaligned}
    whole = {"path": data, "test_path": None, "test_size": None, **rules}
    changes = {"train_size": None} | ({} if config else whole)
    settings = values.data.model_copy(update=changes)
    read = Splits(settings, values.seed, Path(values.cache_dir)).read()
    return TestSet(read.splits["test"], read.counts, read.splits["train"], config)


def _drawn(test_set: TestSet, args: argparse.Namespace) -> "list[Question]":
    """Draw examples of as many paragraphs, none of which is tested on."""
    from lora_or_full.data import squad

    pool = test_set.training
    if args.examples is not None:
        entries = squad.read_files([args.examples])
        pool, _ = squad.check(entries, args.unanswerable, args.misaligned)
    tested = {q.context for q in test_set.questions}
    paragraphs: dict[str, list[Question]] = {}
    for q in pool:
        if q.context not in tested:
            paragraphs.setdefault(q.context, []).append(q)
    if args.shots and not pool:
        raise UserError(
            f"--shots={args.shots}: {args.data} has test questions alone. --examples=FILE names "
            "answered questions to draw from."
        )
    if args.shots > len(paragraphs):
        raise UserError(
            f"--shots={args.shots}: {args.examples or args.data} has {len(paragraphs):,} "
            "paragraphs that are not tested on, of which each example takes one."
        )
    rng = random.Random(args.seed)
    return [rng.choice(paragraphs[text]) for text in rng.sample(list(paragraphs), args.shots)]


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    return validate(config.to_dict() | changes) if changes else config


def _is_run(model: str) -> bool:
    """Whether it is the folder of a finished run; one that is not finished is refused."""
    folder = Path(model)
    if not os.path.isdir(model) or (folder / "adapter_config.json").is_file():
        return False
    if (folder / "config.json").is_file():
        return False
    if not (folder / store.RESULTS).is_file():
        raise not_a_run(folder, "results.json, adapter_config.json or config.json")
    return True


def _model_folder(model: str) -> Path:
    if os.path.isdir(model):
        return Path(model)
    if not HUB_ID.fullmatch(model):
        raise UserError(f"There is no folder {model}.")
    from lora_or_full.data.hub import folder_of

    try:
        return folder_of(model, "model", Path(compose.defaults().cache_dir))
    except UserError as error:
        raise UserError(f"There is no folder {model}, nor a model from the hub ({error})") from None


def _print_scores(title: str, found: dict[str, dict[str, Any]]) -> None:
    """Print a row for the scores of each model by its name."""
    metrics = labels(name for test in found.values() for name in metric_names(test))
    table = Table("", "questions", *metrics.values(), title=title, title_justify="left")
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
