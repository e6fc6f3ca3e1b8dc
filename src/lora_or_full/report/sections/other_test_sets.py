"""The report's section on other test sets than the runs' own."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lora_or_full.report.formatting import METRICS, NONE, counted, shown_interval, signed, spread
from lora_or_full.report.render import Block, Points, Section, Table, Text
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.stats.paired import mean_over_seeds, over_questions
from lora_or_full.report.stats.seeds_by_paragraphs import estimate
from lora_or_full.report.study import Arm, Study
from lora_or_full.runs.schema import odd

OWN = "own test set"


@dataclass(frozen=True)
class Evaluation:
    """The answers of a run to the questions of a test set, in the order of their ids."""

    name: str
    fingerprint: str
    predictions: list[dict[str, Any]]
    trained_on: int | None

    def mean(self, metric: str) -> float:
        return fmean(p[metric] for p in self.predictions)


def elsewhere(study: Study, found: ArmComparison | None) -> Section | None:
    """The scores on each test set that runs of the study were scored on besides their own."""
    read, broken = _read(study)
    names = sorted({(e.name, e.fingerprint) for own in read.values() for e in own})
    if not names and not broken:
        return None
    rows: list[list[str]] = []
    gaps: list[list[str]] = []
    for arm in study.arms:
        rows.append([f"{arm.label}, {OWN}", str(len(arm.runs)), *_own(arm)])
        for name, fingerprint in names:
            of_seed = _of(arm, read, fingerprint, name)
            if not of_seed:
                continue
            cells = [spread([e.mean(metric) for e in of_seed.values()]) for metric in METRICS]
            drops = [
                signed(
                    fmean(
                        e.mean(metric) - float(arm.runs[seed].results["test"][metric])
                        for seed, e in of_seed.items()
                    )
                )
                for metric in METRICS
            ]
            rows.append([f"{arm.label}, {name}", str(len(of_seed)), *cells, *drops])
    if found is not None:
        gaps = [
            row
            for name, fingerprint in names
            for row in _gap(
                name, *(_of(a, read, fingerprint, name) for a in (found.lora, found.full))
            )
        ]
    blocks: list[Block] = [
        Text("What was trained on one domain, tried on others, by the same rules (python "
             "src/evaluate_run.py)."),
        Table(["", "seeds", "EM", "F1", "EM against own", "F1 against own"], rows,
              "Percent: mean ± standard deviation and 95 % t interval over seeds; against own: "
              "percentage points above the runs' own test set, whose questions are others: part "
              "of it is how hard they are."),
    ]  # fmt: skip
    if gaps:
        assert found is not None
        blocks.append(Table(
            ["95 % intervals", "seeds", "difference", "over seeds", "over paragraphs", "over both"],
            gaps,
            f"{found.lora.label} minus {found.full.label}, percentage points, paired by seed and "
            "question. Not adjusted for their number.",
        ))  # fmt: skip
    notes = [f"left out: {problem}" for problem in broken]
    notes += [
        f"{run} was trained on or chosen by {counted(e.trained_on, 'question')} of {e.name}: its "
        "score there is of what it knows."
        for run, own in read.items()
        for e in own
        if e.trained_on
    ]
    return Section("Other test sets", [*blocks, *([Points(notes)] if notes else [])])


def _own(arm: Arm) -> list[str]:
    return [*(spread(arm.values("test", metric)) for metric in METRICS), NONE, NONE]


def _of(
    arm: Arm, read: dict[Path, list[Evaluation]], fingerprint: str, name: str
) -> dict[int, Evaluation]:
    """An arm's evaluations on a test set, by seed."""
    return {
        seed: e
        for seed, run in arm.runs.items()
        for e in read[run.folder]
        if (e.fingerprint, e.name) == (fingerprint, name)
    }


def _gap(name: str, lora: dict[int, Evaluation], full: dict[int, Evaluation]) -> list[list[str]]:
    """The difference of two arms on a test set, a row for each metric."""
    seeds = sorted(lora.keys() & full.keys())
    if not seeds:
        return []
    paragraphs = [p["paragraph"] for p in lora[seeds[0]].predictions]
    rows = []
    for metric, shown in METRICS.items():
        apart = np.array([
            [a[metric] - b[metric]
             for a, b in zip(lora[s].predictions, full[s].predictions, strict=True)]
            for s in seeds
        ])  # fmt: skip
        mean, _, interval = mean_over_seeds(list(apart.mean(axis=1)))
        both = estimate(apart, paragraphs)
        rows.append([
            f"{name}, {shown}", str(len(seeds)), signed(mean), shown_interval(interval),
            shown_interval(over_questions(apart, paragraphs).interval),
            shown_interval(both.interval if both else None),
        ])  # fmt: skip
    return rows


def _read(study: Study) -> tuple[dict[Path, list[Evaluation]], list[str]]:
    """The evaluations of each run of a study, and what is wrong with others."""
    read: dict[Path, list[Evaluation]] = {}
    broken = []
    for run in (run for arm in study.arms for run in arm.runs.values()):
        read[run.folder] = []
        for file in sorted(run.folder.glob("evaluations/*/results.json")):
            one = _evaluation(file.parent)
            if isinstance(one, Evaluation):
                read[run.folder].append(one)
            else:
                broken.append(f"{file.parent}: {one}")
    return read, broken


def _evaluation(folder: Path) -> Evaluation | str:
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        predictions = sorted((json.loads(line) for line in lines if line), key=lambda p: p["id"])
        contexts = json.loads((folder / "contexts.json").read_text(encoding="utf-8"))
        test, data = results["test"], results["data"]
        found = Evaluation(
            str(results["name"]), str(data["test"]["fingerprint"]), predictions, data["trained_on"]
        )
        problem = odd(predictions, contexts)
        if problem is None and any(abs(found.mean(m) - test[m]) > 1e-6 for m in METRICS):
            problem = "its answers do not give its scores"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its files can't be read ({type(error).__name__}: {error})"
    return problem or found
