"""What may be concluded, in words, and what may not."""

from statistics import fmean
from typing import Any

from lora_or_full.report import plots
from lora_or_full.report.formatting import p_with, shown_interval, signed
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats import paired
from lora_or_full.report.stats.comparison import ArmComparison, Comparison
from lora_or_full.report.study import Study, shown

OF_MODE = ("mode", "lr", "rank", "frozen_dtype", "adapter")  # keys in which modes differ by design
LEVEL = 1 - paired.LEVEL


def conclusion(study: Study, found: Comparison | None) -> Section:
    """Write the section that the report begins with."""
    hardware: dict[str, list[str]] = {}
    for arm in study.arms:
        for seed, run in arm.runs.items():
            hardware.setdefault(run.hardware, []).append(f"{arm.label} seed {seed}")
    several = found is not None and len(found.pairs) > 1
    return section(
        "conclusion",
        study=study,
        found=found,
        level=LEVEL,
        most_seeds=paired.MOST_SEEDS,
        hardware=hardware if len(hardware) > 1 else {},
        unlike=[(pair, _unlike(pair)) for pair in found.pairs] if found else [],
        rows=[_row(pair, found.margin) for pair in found.pairs] if found and several else [],
        plot=_plot(study, found) if found and several else None,
    )


def _unlike(pair: ArmComparison) -> dict[str, list[str]]:
    """What differs between two arms besides the mode."""
    one, other = (arm.config for arm in pair.arms)
    records = [[arm.runs[seed].record for seed in pair.seeds] for arm in pair.arms]
    return {
        "keys": [
            f"{key} ({shown(one.get(key))} and {shown(other.get(key))})"
            for key in sorted(one.keys() | other.keys())
            if key.partition(".")[0] not in OF_MODE and one.get(key) != other.get(key)
        ],
        "seeds": [
            str(own.config.seed)
            for own, its in zip(*records, strict=True)
            if own.data.train.fingerprint != its.data.train.fingerprint
        ],
        "conditions": [
            what
            for what in ("machine", "cores", "packages", "commit")
            if len({frozenset(str(getattr(r.environment, what)) for r in own) for own in records})
            > 1
        ],
    }


def _row(pair: ArmComparison, margin: float) -> list[Any]:
    """An arm's row in the table of several: scores, then cost, relative to the reference."""
    cells: list[Any] = [pair.arm.label, len(pair.seeds)]
    for metric in pair.over_seeds:
        mean, interval = _difference(pair, metric)
        cells += [f"{signed(mean)} {shown_interval(interval)}", _verdict(pair, metric, margin)]
    cells.append(f"{pair.arm.any.record.parameters.percent:.4f}")
    if pair.alike is None:
        return [*cells, None, None]
    own, its = (
        [
            fmean(arm.values(lambda record: record.cost.peak_memory_bytes.train)),
            fmean(run.seconds_per_step for run in arm.runs.values()),
        ]
        for arm in pair.alike
    )
    return cells + [f"× {a / b:.2f}" if b else None for a, b in zip(own, its, strict=True)]


def _difference(pair: ArmComparison, metric: str) -> tuple[float, paired.Interval | None]:
    """The difference with its interval over seeds and paragraphs, or else over paragraphs."""
    models = pair.over_paragraphs[metric]
    both = pair.over_both[metric]
    return models.mean, both.interval if both else models.interval


def _verdict(pair: ArmComparison, metric: str, margin: float) -> str:
    """What may be concluded of a difference."""
    p = pair.holm["over both"].get(metric)
    if p is None:
        return "open: one seed" if len(pair.seeds) == 1 else "open: nothing varies"
    p_equivalent = pair.holm["equivalence over both"][metric]
    within = f"within ±{margin:g} ({p_with(p_equivalent)})" if p_equivalent < LEVEL else ""
    if p < LEVEL:
        higher = pair.over_paragraphs[metric].mean > 0
        differs = f"{'higher' if higher else 'lower'} ({p_with(p)})"
        return f"{differs}, yet {within}" if within else differs
    return f"equivalent, {within}" if within else f"open ({p_with(p)})"


def _plot(study: Study, found: Comparison) -> str:
    colours = plots.colours(study)
    rows = [
        (
            pair.arm.label,
            colours[pair.arm.label],
            {m: _difference(pair, m) for m in pair.over_seeds},
        )
        for pair in found.pairs
    ]
    return plots.against_reference(rows, found.margin, found.reference.label, found.metrics)
