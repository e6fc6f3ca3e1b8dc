"""The section on the configurations of each mode: what each key's values gave, and the best one's
lead over the others."""

from collections.abc import Sequence
from statistics import fmean

from lora_or_full.report import plots
from lora_or_full.report.formatting import METRICS, NONE, shown_interval, signed
from lora_or_full.report.render import Block, Figure, Section, Table, Text
from lora_or_full.report.stats.paired import Array, Interval, paragraph_bootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import anova_estimate
from lora_or_full.report.study import Arm, Study

SWEPT = (("lr", "learning rate"), ("rank", "rank"))


def configurations(study: Study) -> Section | None:
    """Write the section; None if each mode has one configuration."""
    blocks: list[Block] = []
    for mode in study.modes:
        if (best := study.best(mode)) and (table := _compared_with_others(best, study.arms)):
            blocks.append(table)
    masked = [arm for arm in study.arms if arm.any.record.config.mask_prompt]
    for key, title in SWEPT:
        blocks += _swept(study, [arm for arm in masked if key in arm.any.config], key, title)
    return Section("The other configurations", blocks) if blocks else None


def _swept(study: Study, arms: list[Arm], key: str, title: str) -> list[Block]:
    """Validation F1 by the values of a key, and whether the best value lies at an edge."""
    values_of = {
        mode: {arm.any.config[key] for arm in arms if arm.mode == mode} for mode in study.modes
    }
    blocks: list[Block] = []
    if moving := [arm for arm in arms if len(values_of[arm.mode]) > 1]:
        blocks.append(Figure(
            f"by_{key}", plots.sweep(moving, key, title),
            f"F1 on the validation questions by {title}: means over seeds, 95 % t intervals.",
        ))  # fmt: skip
    for best in filter(None, map(study.best, study.modes)):
        values = {arm.any.config[key] for arm in arms if _differs_in(key, arm, best)}
        if len(values) > 1:
            chosen = best.any.config[key]
            edge = (
                "; it lies at the edge of the grid, so a better one may lie beyond."
                if chosen in (min(values), max(values))
                else "."
            )
            tried = ", ".join(f"{v:g}" for v in sorted(values))
            blocks.append(Text(
                f"mode={best.mode}: the best {title} on validation is {chosen:g} of {tried}{edge}"
            ))  # fmt: skip
    return blocks


def _differs_in(key: str, arm: Arm, best: Arm) -> bool:
    """Whether `arm` was compared with `best`, and has its configuration but for `key`."""
    own, others = dict(arm.any.config), dict(best.any.config)
    own[key] = others[key] = None
    return arm.mode == best.mode and own == others and len(arm.runs) == len(best.runs)


def _compared_with_others(best: Arm, arms: list[Arm]) -> Table | None:
    paragraphs = [prediction["paragraph"] for prediction in best.any.predictions]
    rows = []
    for arm in arms:
        seeds = best.shared_seeds(arm)
        if arm is not best and arm.mode == best.mode and seeds:
            own, other = ([a.runs[n].record.cost for n in seeds] for a in (best, arm))
            rows.append([
                arm.label,
                str(len(seeds)),
                *(_difference(best.minus(arm, metric), paragraphs) for metric in METRICS),
                _ratio([c.train_seconds for c in own], [c.train_seconds for c in other]),
                _ratio(
                    [c.peak_memory_bytes.train for c in own],
                    [c.peak_memory_bytes.train for c in other],
                ),
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
    )  # fmt: skip


def _difference(differences: Array, paragraphs: list[int]) -> str:
    """The mean of differences (seeds, questions), and its interval."""
    interval: Interval | None = None
    if len(differences) == 1:
        interval = paragraph_bootstrap(differences, paragraphs).interval
    elif found := anova_estimate(differences, paragraphs):
        interval = found.interval
    return f"{signed(float(differences.mean()))} {shown_interval(interval)}"


def _ratio(own: Sequence[float], others: Sequence[float]) -> str:
    return f"× {fmean(own) / fmean(others):.2f}" if any(others) else NONE
