"""The section on the configurations of each mode: what each value gave, and the best one's lead."""

from typing import Any

from lora_or_full.report import plots
from lora_or_full.report.formatting import NONE, shown_interval, signed
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats.paired import paragraph_bootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import anova_estimate
from lora_or_full.report.study import Arm, Study, shared_seeds

SWEPT = {"lr": "learning rate", "rank": "rank"}


def configurations(study: Study) -> Section | None:
    """Write the section; None if each mode has one configuration."""
    best = [arm for arm in map(study.best, study.modes) if arm is not None]
    leads = {arm.label: rows for arm in best if (rows := _lead(arm, study))}
    swept = []
    for key, name in SWEPT.items():
        arms = [arm for arm in study.masked if key in arm.config]
        values = {mode: {a.config[key] for a in arms if a.mode == mode} for mode in study.modes}
        moving = [arm for arm in arms if len(values[arm.mode]) > 1]
        plot = plots.sweep(moving, key, name, plots.colours(study)) if moving else None
        tried = [(arm.mode, arm.config.get(key), _tried(arm, arms, key)) for arm in best]
        swept.append((key, name, plot, [one for one in tried if len(one[2]) > 1]))
    made = section("configurations", leads=leads, swept=swept, metrics=study.metrics)
    return made if made.blocks else None


def _tried(best: Arm, arms: list[Arm], key: str) -> list[Any]:
    """The values of a key in the arms that differ from the best one in nothing else."""
    return sorted(
        arm.config[key]
        for arm in arms
        if arm.config | {key: best.config.get(key)} == best.config
        and len(arm.runs) == len(best.runs)
    )


def _lead(best: Arm, study: Study) -> list[list[str]]:
    """What the best arm of a mode gains over each other one, a row each."""
    rows = []
    paragraphs = [prediction["paragraph"] for prediction in best.any.predictions]
    for arm in study.arms:
        seeds = shared_seeds(best, arm)
        if arm is best or arm.mode != best.mode or not seeds:
            continue
        cells = [arm.label, str(len(seeds))]
        for metric in study.metrics:
            differences = best.minus(arm, metric)
            found = (
                paragraph_bootstrap(differences, paragraphs)
                if len(seeds) == 1
                else anova_estimate(differences, paragraphs)
            )
            interval = shown_interval(found.interval if found else None)
            cells.append(f"{signed(float(differences.mean()))} {interval}")
        alike = [s for s in seeds if best.runs[s].hardware == arm.runs[s].hardware]
        costs = [[one.runs[seed].record.cost for seed in alike] for one in (best, arm)]
        for own, its in (
            [sum(cost.train_seconds for cost in of_arm) for of_arm in costs],
            [sum(cost.peak_memory_bytes.train for cost in of_arm) for of_arm in costs],
        ):
            cells.append(f"× {own / its:.2f}" if its else NONE)
        rows.append(cells)
    return rows
