"""The section on the configurations of each mode: what each value gave, and the best one's lead."""

from collections.abc import Callable
from statistics import fmean

from lora_or_full.report import plots
from lora_or_full.report.formatting import METRICS, NONE, shown_interval, signed
from lora_or_full.report.render import Block, Figure, Section, Table, Text
from lora_or_full.report.stats.paired import paragraph_bootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import anova_estimate
from lora_or_full.report.study import Arm, Study, shared_seeds
from lora_or_full.runs.schema import Cost

SWEPT = {"lr": "learning rate", "rank": "rank"}


def configurations(study: Study) -> Section | None:
    """Write the section; None if each mode has one configuration."""
    best = [arm for arm in map(study.best, study.modes) if arm is not None]
    blocks: list[Block] = [table for arm in best if (table := _lead(arm, study.arms))]
    for key, title in SWEPT.items():
        arms = [arm for arm in study.masked if key in arm.any.config]
        values = {mode: {a.any.config[key] for a in arms if a.mode == mode} for mode in study.modes}
        if moving := [arm for arm in arms if len(values[arm.mode]) > 1]:
            blocks.append(Figure(
                f"by_{key}", plots.sweep(moving, key, title, plots.colours(study)),
                f"F1 on the validation questions by {title}: means over seeds, 95 % t intervals.",
            ))  # fmt: skip
        blocks += [text for arm in best if (text := _position(arm, arms, key, title))]
    return Section("The other configurations", blocks) if blocks else None


def _position(best: Arm, arms: list[Arm], key: str, title: str) -> Text | None:
    """Where the best value of a key lies among those that differ in nothing else."""
    chosen = best.any.config.get(key)
    tried = sorted(
        arm.any.config[key]
        for arm in arms
        if arm.any.config | {key: chosen} == best.any.config and len(arm.runs) == len(best.runs)
    )
    if len(tried) < 2:
        return None
    edge = "; it lies at the edge of the grid, so a better one may lie beyond."
    return Text(
        f"mode={best.mode}: the best {title} on validation is {chosen:g} of "
        f"{', '.join(f'{value:g}' for value in tried)}"
        f"{edge if chosen in (tried[0], tried[-1]) else '.'}"
    )


def _lead(best: Arm, arms: list[Arm]) -> Table | None:
    """What the best arm of a mode gains over each other one."""
    rows = []
    paragraphs = [prediction["paragraph"] for prediction in best.any.predictions]
    for arm in arms:
        seeds = shared_seeds(best, arm)
        if arm is best or arm.mode != best.mode or not seeds:
            continue
        cells = []
        for metric in METRICS:
            differences = best.minus(arm, metric)
            found = (
                paragraph_bootstrap(differences, paragraphs)
                if len(seeds) == 1
                else anova_estimate(differences, paragraphs)
            )
            interval = shown_interval(found.interval if found else None)
            cells.append(f"{signed(float(differences.mean()))} {interval}")
        rows.append([
            arm.label, str(len(seeds)), *cells,
            _ratio(best, arm, lambda cost: cost.train_seconds),
            _ratio(best, arm, lambda cost: cost.peak_memory_bytes.train),
        ])  # fmt: skip
    if not rows:
        return None
    return Table(
        [f"{best.label}, minus", "seeds", *METRICS.values(), "training time", "train peak"],
        rows,
        f"What {best.label}, chosen by validation F1, gains on the test questions over each other "
        "configuration, paired by seed and question: percentage points, with the 95 % interval "
        "over seeds and paragraphs. With one seed the interval is over paragraphs only, and says "
        "nothing about other seeds. Not adjusted for testing several. Time and memory: ratio to "
        "the other.",
    )


def _ratio(best: Arm, other: Arm, value: Callable[[Cost], float]) -> str:
    own, its = (
        fmean(value(arm.runs[seed].record.cost) for seed in shared_seeds(best, other))
        for arm in (best, other)
    )
    return f"× {own / its:.2f}" if its else NONE
