"""Score finished runs on other questions: python src/evaluate_run.py RUN [RUN ...] DATA

DATA is a .json file in SQuAD's format, or .parquet with the same columns. It is read, checked and
scored as a run's own test set, and recorded in RUN/evaluations/<name>/. The report of the runs then
shows all their test sets.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lora_or_full.errors import UserError, command
from lora_or_full.runs import provenance, store

if TYPE_CHECKING:
    from lora_or_full.data.squad import Question
    from lora_or_full.generation.predictor import Predictor

NAME = re.compile(r"[\w-]+")


@command()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument(
        "--name", help="of this test set in the report; that of the file's if left out"
    )
    parser.add_argument(
        "--model", help="folder or hub id of the base model, where it is not the one that RUN names"
    )
    parser.add_argument(
        "--unanswerable", choices=("refuse", "drop"), default="refuse",
        help="questions without an answer (refuse)",
    )  # fmt: skip
    parser.add_argument(
        "--misaligned", choices=("refuse", "repair"), default="refuse",
        help="answers that are not at their answer_start (refuse)",
    )  # fmt: skip
    args = parser.parse_args()
    name = args.name or re.sub(r"[^\w-]+", "_", args.data.stem)
    if not NAME.fullmatch(name):
        raise UserError(f"--name={name}: must be a name of letters, digits, - and _.")
    from lora_or_full.data import squad  # seconds

    questions, counts = squad.check(
        squad.read_files([args.data]), args.unanswerable, args.misaligned
    )
    if not questions:
        raise UserError(f"{args.data} holds no question with an answer.")
    table = Table("run", "questions", "EM", "F1", title=name, title_justify="left")
    for place in args.runs:
        results = evaluate(place, name, questions, counts, args.model)
        scores = results["test"]
        table.add_row(
            place.name, f"{scores['questions']:,}",
            *(
                f"{scores[metric]:.1f} [{low:.1f}, {high:.1f}]"
                for metric in ("exact_match", "f1")
                for low, high in (scores[f"{metric}_interval"],)
            ),
        )  # fmt: skip
        if results["data"]["trained_on"]:
            count = results["data"]["trained_on"]
            print(f"Note: {place} has seen {count:,} of these questions.", file=sys.stderr)
    Console().print(table)
    print("python src/report.py " + " ".join(map(str, args.runs)) + "  # shows all test sets")


def evaluate(
    place: Path,
    name: str,
    questions: "list[Question]",
    counts: dict[str, int],
    base: str | None,
) -> dict[str, Any]:
    """Score the run in `place` on `questions`; record and give what results.json then holds.

    Raises:
        UserError: the run can't be loaded, `name` is that of another test set of it, or the record
            can't be written.
    """
    from lora_or_full.data.squad import fingerprint
    from lora_or_full.evaluation.predictions import scores
    from lora_or_full.generation.finished_run import load, results_of
    from lora_or_full.modeling.precision import device_name

    results_of(place)  # a run, and none made elsewhere, whose record this is to join
    folder, of_questions = place / "evaluations" / name, fingerprint(questions)
    if (folder / "results.json").is_file() and _fingerprint(folder) != of_questions:
        raise UserError(f"{folder} holds the scores on other questions: choose another --name.")
    run, began = load(place, base), time.monotonic()
    assert run.results is not None
    rows, contexts = predictions_of(run, questions)
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
            "trained_on": seen(run.results["config"], questions),
        },
        "test": scores(rows),
        "seconds": time.monotonic() - began,
        "environment": provenance.environment(device_name(run.model.device), provenance.commit()),
    }
    texts = {str(number): text for number, text in enumerate(contexts)}
    try:
        store.write_json(folder / "contexts.json", texts)
        store.write_lines(folder / "predictions.jsonl", rows)
        store.write_json(folder / "results.json", results)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}.") from None
    return results


def predictions_of(
    run: "Predictor", questions: "list[Question]"
) -> tuple[list[dict[str, Any]], list[str]]:
    """What `run` answers to `questions`, scored, by their ids; and the contexts that it names by
    number."""
    from lora_or_full.evaluation.predictions import prediction

    given = run.answers([(q.context, q.question) for q in questions])
    contexts = list(dict.fromkeys(q.context for q in questions))
    numbers = {context: number for number, context in enumerate(contexts)}
    rows = [
        prediction(
            {
                "id": q.id, "title": q.title, "paragraph": numbers[q.context],
                "question": q.question, "answers": q.answers, "context_cut": one.context_cut,
            },
            one.answer,
        )
        for q, one in zip(questions, given, strict=True)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["id"]), contexts


def _fingerprint(folder: Path) -> str | None:
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return str(results["data"]["test"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def seen(config: dict[str, Any], questions: "list[Question]") -> int | None:
    """How many of `questions` a run was trained on or chosen by; None if its data can't be had."""
    from lora_or_full.data.splits import Splits

    try:
        cache = Path(config["cache_dir"])
        splits, _ = Splits(**config["data"], seed=config["seed"], cache_dir=cache).read()
    except (UserError, TypeError):  # or a record of other keys than today's
        return None
    known = {(q.context, q.question) for name in ("train", "validation") for q in splits[name]}
    return sum((q.context, q.question) in known for q in questions)


if __name__ == "__main__":
    main()
