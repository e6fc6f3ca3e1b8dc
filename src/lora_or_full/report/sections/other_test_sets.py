"""The section on other test sets than the runs' own."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from lora_or_full.errors import UserError
from lora_or_full.report.formatting import METRICS, counted, shown_interval, signed, spread
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.stats.paired import mean_over_seeds, paragraph_bootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import anova_estimate
from lora_or_full.report.study import Arm, Study, question_scores
from lora_or_full.runs.reader import check_scores, read_answers, read_record
from lora_or_full.runs.schema import EvaluationRecord, Prediction


@dataclass(frozen=True)
class Evaluation:
    """A run's answers to the questions of another test set, by id."""

    record: EvaluationRecord
    predictions: list[Prediction]


# The evaluations of an arm on a test set, by seed.
OnTestSet = dict[int, Evaluation]


def other_test_sets(study: Study, found: ArmComparison | None) -> Section | None:
    """Write the section; None if no run was scored on another test set."""
    read, notes = _read(study)
    names = sorted({test_set for own in read.values() for test_set in own})
    if not names and not notes:
        return None
    scores, gaps = [], []
    for arm in study.arms:
        scores.append(_scores(f"{arm.label}, own test set", arm, None))
        scores += [
            _scores(f"{arm.label}, {test_set[0]}", arm, read[arm.label][test_set])
            for test_set in names
            if test_set in read[arm.label]
        ]
    if found is not None:
        for test_set in names:
            adapter, full = (read[a.label].get(test_set, {}) for a in (found.adapter, found.full))
            gaps += _gap(test_set[0], adapter, full)
    return section("other_test_sets", found=found, scores=scores, gaps=gaps, notes=notes)


def _read(study: Study) -> tuple[dict[str, dict[tuple[str, str], OnTestSet]], list[str]]:
    """Evaluations by arm and test set (its name and fingerprint), and what to know about them."""
    read: dict[str, dict[tuple[str, str], OnTestSet]] = {arm.label: {} for arm in study.arms}
    broken, known = [], []
    for arm in study.arms:
        for seed, run in arm.runs.items():
            for file in sorted(run.folder.glob("evaluations/*/results.json")):
                try:
                    record = read_record(file.parent, EvaluationRecord)
                    predictions, _ = read_answers(file.parent)
                    check_scores(file.parent, record, predictions)
                except UserError as error:
                    broken.append(f"left out: {error}")
                    continue
                test_set = (record.name, record.data.test.fingerprint)
                read[arm.label].setdefault(test_set, {})[seed] = Evaluation(record, predictions)
                if record.data.trained_on:
                    known.append(
                        f"{run.folder} was trained on or chosen by "
                        f"{counted(record.data.trained_on, 'question')} of {record.name}: its "
                        "score there is not on unseen questions."
                    )
    return read, broken + known


def _scores(name: str, arm: Arm, by_seed: OnTestSet | None) -> dict[str, Any]:
    """The scores of an arm on a test set, its own if None, and their differences from its own."""
    scores: dict[str, str] = {}
    drops: dict[str, str | None] = {}
    for metric, shown in METRICS.items():
        own = {seed: getattr(run.record.test, metric) for seed, run in arm.runs.items()}
        here = own
        if by_seed:
            here = {seed: getattr(one.record.test, metric) for seed, one in by_seed.items()}
        scores[shown] = spread(list(here.values()))
        drop = fmean(value - own[seed] for seed, value in here.items())
        drops[f"{shown} minus own"] = signed(drop) if by_seed else None
    return {"": name, "seeds": len(by_seed or arm.runs)} | scores | drops


def _gap(name: str, adapter: OnTestSet, full: OnTestSet) -> list[dict[str, Any]]:
    """The difference of two arms on a test set, a row for each metric."""
    seeds = sorted(adapter.keys() & full.keys())
    rows = []
    for metric, shown in METRICS.items() if seeds else ():
        paragraphs = [p["paragraph"] for p in adapter[seeds[0]].predictions]
        differences = np.stack([
            question_scores(adapter[seed].predictions, metric)
            - question_scores(full[seed].predictions, metric)
            for seed in seeds
        ])  # fmt: skip
        mean, _, interval = mean_over_seeds(list(differences.mean(axis=1)))
        both = anova_estimate(differences, paragraphs)
        rows.append({
            "95 % intervals": f"{name}, {shown}",
            "seeds": len(seeds),
            "difference": signed(mean),
            "over seeds": shown_interval(interval),
            "over paragraphs": shown_interval(
                paragraph_bootstrap(differences, paragraphs).interval
            ),
            "over both": shown_interval(both and both.interval),
        })  # fmt: skip
    return rows
