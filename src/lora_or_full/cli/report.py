"""The report of a study: lora-or-full report RUNS [RUNS ...]

RUNS are folders of runs, of sweeps, or folders that hold them. Writes report.md, report.html (one
file, with its figures), figures/, report.csv (a line a run) and report.json into --output: by
default RUNS/report, or report in the current folder if there are several RUNS.
"""

import argparse
import csv
import io
import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_or_full.errors import UserError
from lora_or_full.runs import store

if TYPE_CHECKING:  # scipy and matplotlib take seconds, which a wrong command line need not wait for
    from lora_or_full.report.render import Section
    from lora_or_full.report.stats.comparison import Comparison
    from lora_or_full.report.study import Arm, Run, Study

FORMULA = ("=", "+", "-", "@")  # how a cell begins that a spreadsheet takes for one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS")
    parser.add_argument(
        "--output", type=Path, help="a folder (RUNS/report; of several RUNS: report)"
    )
    parser.add_argument(
        "--margin", type=float, default=1.0,
        help="percentage points within which two modes count as equivalent (1)",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="LABEL",
        help="label of the arm to compare the others with (full fine-tuning, if there is one)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Write the report, and print its path."""
    # Of several folders none is the one to write into.
    output = args.output or (args.runs[0] if len(args.runs) == 1 else Path()) / "report"
    folder = write(args.runs, output, args.margin, args.against)
    print(f"{folder / 'report.html'}\n{folder / 'report.md'}")


def write(runs: list[Path], folder: Path, margin: float, against: str | None = None) -> Path:
    """Write the report into a folder, and give the folder.

    Args:
        runs: Folders of runs, of sweeps, or that hold them.
        folder: Folder to write.
        margin: Margin of equivalence, percentage points.
        against: Label of the arm to compare the others with; None for full fine-tuning.

    Raises:
        UserError: There is no finished run, or an argument is wrong.
    """
    if missing := [path for path in runs if not os.path.isdir(path)]:
        raise UserError(f"There is no folder {missing[0]}.")
    if not 0 < margin < 100:
        raise UserError(f"--margin={margin:g}: must be a number between 0 and 100.")
    from lora_or_full.report import render
    from lora_or_full.report.collect import collect
    from lora_or_full.report.sections.overview import all_sections
    from lora_or_full.report.stats.comparison import compare_arms

    study = collect(runs)
    if not study.arms:
        reasons = "\n  ".join(study.left_out) or "they hold no run at all"
        raise UserError(f"No finished run in {', '.join(map(str, runs))}:\n  {reasons}")
    found = compare_arms(study, margin, against)
    options = [f"--output={folder}", f"--margin={margin:g}"]
    options += [] if against is None else [f"--against={against}"]
    command = shlex.join(["lora-or-full", "report", *map(str, runs), *options])
    sections = all_sections(study, found, command)
    try:
        render.write(folder, title(found), sections)
        store.write_text(folder / "report.csv", runs_csv(study))
        store.write_json(folder / "report.json", numbers(study, found, sections))
    except OSError as error:
        raise UserError(f"--output={folder} can't be written: {error.strerror}.") from None
    return folder


def title(found: "Comparison | None") -> str:
    """Give the title: what is compared with what."""
    if found is None:
        return "Fine-tuning on question answering"
    labels = [pair.arm.label for pair in found.pairs]
    reference = found.reference
    whole = reference.label if reference.has_adapter else "full fine-tuning"
    if len(labels) > 3:
        return f"{len(labels)} ways to fine-tune against {whole}"
    *first, last = labels
    return f"{', '.join(first)}{' and ' if first else ''}{last} against {whole}"


def runs_csv(study: "Study") -> str:
    """Write CSV with a row per run: its configuration and its results."""
    rows = [_row(arm, run, study.metrics) for arm in study.arms for run in arm.runs.values()]
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _row(arm: "Arm", run: "Run", metrics: Iterable[str]) -> dict[str, Any]:
    r = run.record
    return {
        "run": run.folder.name, "arm": arm.label, "mode": arm.mode, "seed": r.config.seed,
        "lr": r.config.lr, "rank": r.config.rank, "mask_prompt": r.config.mask_prompt,
        "train_questions": r.data.train.questions, "epochs": len(r.epochs),
        "trainable": r.parameters.trainable, "best_epoch": r.best_epoch,
        "validation_loss": r.best.validation_loss,
        **{f"validation_{name}": getattr(r.best, name) for name in metrics},
        **{name: getattr(r.test, name) for name in metrics},
        "train_seconds": r.cost.train_seconds, "seconds_per_batch": r.cost.seconds_per_batch,
        "samples_per_second": r.cost.samples_per_second,
        "train_peak_bytes": r.cost.peak_memory_bytes.train,
        "exported_bytes": r.cost.exported_bytes, "commit": r.environment.commit,
    }  # fmt: skip


def _cell(value: Any) -> Any:
    """A text that stays in its cell and that a spreadsheet does not take for a formula."""
    if not isinstance(value, str):
        return value
    text = "".join(c if c.isprintable() else "?" for c in value)
    return f"'{text}" if text.startswith(FORMULA) else text


def numbers(
    study: "Study", found: "Comparison | None", sections: "list[Section]"
) -> dict[str, Any]:
    """Give everything that the report computed: the whole comparison, and all tables."""
    from lora_or_full.report.render import Table

    arms = {
        arm.label: {
            "seeds": list(arm.runs),
            "runs": [str(run.folder) for run in arm.runs.values()],
            "config": arm.config,
            **{metric: arm.test(metric) for metric in study.metrics},
            "epochs": [[e.model_dump() for e in r.record.epochs] for r in arm.runs.values()],
            "cost": [run.record.cost.model_dump() for run in arm.runs.values()],
        }
        for arm in study.arms
    }
    compared = found and {
        "reference": found.reference.label,
        "margin": found.margin,
        "arms": [
            {
                "arm": pair.arm.label,
                "seeds": pair.seeds,
                "over_seeds": {m: asdict(v) for m, v in pair.over_seeds.items()},
                "over_paragraphs": {m: asdict(v) for m, v in pair.over_paragraphs.items()},
                "over_both": {m: v and asdict(v) for m, v in pair.over_both.items()},
                "mcnemar": [asdict(d) for d in pair.mcnemar],
                "holm": pair.holm,
            }
            for pair in found.pairs
        ],
    }
    tables = {
        section.title: [asdict(block) for block in section.blocks if isinstance(block, Table)]
        for section in sections
    }
    return {"arms": arms, "comparison": compared, "left_out": study.left_out, "tables": tables}
