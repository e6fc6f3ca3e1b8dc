"""What each mode was chosen over: its other configurations, held against its best one."""

from statistics import fmean

from lora_or_full.report.formatting import METRICS, NONE, shown_interval, signed
from lora_or_full.report.render import Block, Section, Table
from lora_or_full.report.stats.paired import Array, Interval, over_questions
from lora_or_full.report.stats.seeds_by_paragraphs import estimate
from lora_or_full.report.study import Arm, Study
from lora_or_full.runs.schema import at


def alternatives(study: Study) -> Section | None:
    """None where each mode has one configuration, or none that shares a seed with its best."""
    tables = [
        table
        for mode in ("lora", "full")
        if (best := study.best(mode)) and (table := _held_against(best, study.arms))
    ]
    return Section("The other configurations", list[Block](tables)) if tables else None


def _held_against(best: Arm, arms: list[Arm]) -> Table | None:
    paragraphs = [prediction["paragraph"] for prediction in best.any.predictions]
    rows = []
    for arm in arms:
        seeds = best.shared_seeds(arm)
        if arm is not best and arm.mode == best.mode and seeds:
            rows.append([
                arm.label,
                str(len(seeds)),
                *(_difference(best.minus(arm, metric), paragraphs) for metric in METRICS),
                _times(best, arm, "cost.train_seconds"),
                _times(best, arm, "cost.peak_memory_bytes.train"),
            ])  # fmt: skip
    if not rows:
        return None
    return Table(
        [f"{best.label}, minus", "seeds", *METRICS.values(), "training time", "train peak"],
        rows,
        f"What {best.label}, chosen by validation F1, gains on the test questions over each other, "
        "paired by seed and question: percentage points, with the 95 % interval over seeds and "
        "paragraphs; with one seed over paragraphs alone, which is of these very models and says "
        "nothing of other seeds. Not adjusted for being several. Time and memory: how many times "
        "the other's.",
    )  # fmt: skip


def _difference(apart: Array, paragraphs: list[int]) -> str:
    """The mean of `apart` (seeds, questions), and its interval."""
    interval: Interval | None = None
    if len(apart) == 1:
        interval = over_questions(apart, paragraphs).interval
    elif found := estimate(apart, paragraphs):
        interval = found.interval
    return f"{signed(float(apart.mean()))} {shown_interval(interval)}"


def _times(best: Arm, other: Arm, path: str) -> str:
    seeds = best.shared_seeds(other)
    own, others = (fmean(at(arm.runs[n].results, path) for n in seeds) for arm in (best, other))
    return f"× {own / others:.2f}" if others else NONE
