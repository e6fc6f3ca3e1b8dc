"""The section on other test sets than the runs' own."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from lora_or_full.errors import UserError
from lora_or_full.report.formatting import METRICS, NONE, counted, shown_interval, signed, spread
from lora_or_full.report.render import Block, Points, Section, Table, Text
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.stats.paired import mean_over_seeds, paragraph_bootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import anova_estimate
from lora_or_full.report.study import Arm, Study
from lora_or_full.runs.reader import check_scores, read_answers, read_record
from lora_or_full.runs.schema import EvaluationRecord, Prediction

OWN = "own test set"


@dataclass(frozen=True)
class Evaluation:
    """A run's answers to the questions of another test set, by id."""

    record: EvaluationRecord
    predictions: list[Prediction]

    @property
    def test_set(self) -> tuple[str, str]:
        """Name and fingerprint of the test set."""
        return self.record.name, self.record.data.test.fingerprint

    def mean(self, metric: str) -> float:
        """Give the mean exact_match or f1, percent."""
        return float(getattr(self.record.test, metric))

    def scores(self, metric: str) -> list[float]:
        """Give the exact_match or f1 (percent) of each question."""
        return [dict(p)[metric] for p in self.predictions]  # type: ignore[misc]


def other_test_sets(study: Study, found: ArmComparison | None) -> Section | None:
    """Write the section; None if no run was scored on another test set."""
    read, broken = _read(study)
    names = sorted({e.test_set for own in read.values() for e in own})
    if not names and not broken:
        return None
    rows: list[list[str]] = []
    gaps: list[list[str]] = []
    for arm in study.arms:
        rows.append([f"{arm.label}, {OWN}", str(len(arm.runs)), *_own(arm)])
        for test_set in names:
            of_seed = _of(arm, read, test_set)
            if not of_seed:
                continue
            cells = [spread([e.mean(metric) for e in of_seed.values()]) for metric in METRICS]
            drops = [
                signed(
                    fmean(
                        e.mean(metric) - getattr(arm.runs[seed].record.test, metric)
                        for seed, e in of_seed.items()
                    )
                )
                for metric in METRICS
            ]
            rows.append([f"{arm.label}, {test_set[0]}", str(len(of_seed)), *cells, *drops])
    if found is not None:
        gaps = [
            row
            for test_set in names
            for row in _gap(
                test_set[0], *(_of(a, read, test_set) for a in (found.adapter, found.full))
            )
        ]
    blocks: list[Block] = [
        Text("Runs that were trained on one domain, scored on others by the same rules "
             "(lora-or-full evaluate)."),
        Table(["", "seeds", "EM", "F1", "EM minus own", "F1 minus own"], rows,
              "Percent: mean ± standard deviation and 95 % t interval over seeds. Minus own: "
              "percentage points above the runs' own test set. Its questions differ, so part of "
              "the difference is how hard they are."),
    ]  # fmt: skip
    if gaps:
        assert found is not None
        blocks.append(Table(
            ["95 % intervals", "seeds", "difference", "over seeds", "over paragraphs", "over both"],
            gaps,
            f"{found.adapter.label} minus {found.full.label}, percentage points, paired by seed "
            "and question. Not adjusted for testing several.",
        ))  # fmt: skip
    notes = [f"left out: {problem}" for problem in broken]
    notes += [
        f"{run} was trained on or chosen by {counted(e.record.data.trained_on, 'question')} of "
        f"{e.record.name}: its score there is not on unseen questions."
        for run, own in read.items()
        for e in own
        if e.record.data.trained_on
    ]
    return Section("Other test sets", [*blocks, *([Points(notes)] if notes else [])])


def _own(arm: Arm) -> list[str]:
    return [*(spread(arm.test(metric)) for metric in METRICS), NONE, NONE]


def _of(
    arm: Arm, read: dict[Path, list[Evaluation]], test_set: tuple[str, str]
) -> dict[int, Evaluation]:
    """An arm's evaluations on a test set, by seed."""
    return {
        seed: e
        for seed, run in arm.runs.items()
        for e in read[run.folder]
        if e.test_set == test_set
    }


def _gap(name: str, adapter: dict[int, Evaluation], full: dict[int, Evaluation]) -> list[list[str]]:
    """The difference of two arms on a test set, a row for each metric."""
    seeds = sorted(adapter.keys() & full.keys())
    if not seeds:
        return []
    paragraphs = [p["paragraph"] for p in adapter[seeds[0]].predictions]
    rows = []
    for metric, shown in METRICS.items():
        differences = np.array([
            np.subtract(adapter[s].scores(metric), full[s].scores(metric)) for s in seeds
        ])  # fmt: skip
        mean, _, interval = mean_over_seeds(list(differences.mean(axis=1)))
        both = anova_estimate(differences, paragraphs)
        rows.append([
            f"{name}, {shown}", str(len(seeds)), signed(mean), shown_interval(interval),
            shown_interval(paragraph_bootstrap(differences, paragraphs).interval),
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
            try:
                record = read_record(file.parent, EvaluationRecord)
                answers = read_answers(file.parent)
                check_scores(file.parent, record, answers)
                read[run.folder].append(Evaluation(record, answers.predictions))
            except UserError as error:
                broken.append(str(error))
    return read, broken
