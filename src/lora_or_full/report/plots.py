"""The plots of the report, as SVG; a mode has the same colour in all of them."""

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_or_full.report.failure_classes import Bin
from lora_or_full.report.stats.paired import Interval, mean_over_seeds
from lora_or_full.report.study import Arm, Study

# Okabe and Ito's palette (2008), which the colour-blind can tell apart.
BLUE, VERMILION, GREEN, PURPLE, SKY, AMBER, YELLOW = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442",
)  # fmt: skip
LIGHT, GREY, BLACK = "#C8C8C8", "#7F7F7F", "#000000"
OF_ADAPTER, OF_FULL = (BLUE, GREEN, PURPLE, SKY, AMBER, GREY, BLACK, YELLOW), VERMILION
OF_COMPONENT = (LIGHT, GREEN, AMBER, PURPLE, SKY, GREY)  # none is that of the first modes
LINES, HATCHES = ("-", "--", ":", "-."), ("", "//", "..", "xx")  # of arms with the same colour
WIDTH = 9  # inches, of every figure
WIDEST = 36  # characters of a line of a label, so that there is room for what it names
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "svg.fonttype": "none", "svg.hashsalt": "report", "figure.dpi": 100,
    "font.family": ["DejaVu Sans", "sans-serif"], "text.parse_math": False, "lines.markersize": 4,
}  # fmt: skip
matplotlib.rcParams.update(STYLE)


def dynamics(arms: Sequence[Arm], colours: Mapping[str, str], metrics: Mapping[str, str]) -> str:
    """Plot losses and validation scores by epoch: mean and range over seeds.

    Args:
        arms: At most as many of each mode as there are LINES to distinguish them.
        colours: By label of an arm.
        metrics: Labels of the metrics by name.
    """
    panels = {
        "train_loss": "Training loss, nats per token",
        "validation_loss": "Validation loss, nats per token",
        **{name: f"Validation {label}, %" for name, label in metrics.items()},
    }
    rows = math.ceil(len(panels) / 2)
    figure, axes = _new(rows, 2, height=3 * rows)
    for spare in axes[len(panels) :]:
        spare.remove()
    styles = _styles(LINES, [colours[arm.label] for arm in arms])
    for axis, (key, title) in zip(axes, panels.items(), strict=False):
        for arm, style in zip(arms, styles, strict=True):
            columns = [[getattr(e, key) for e in epochs] for epochs in arm.by_epoch]
            colour = colours[arm.label]
            epochs = range(1, len(columns) + 1)
            means = [sum(c) / len(c) for c in columns]
            axis.plot(epochs, means, style, marker="o", color=colour, label=arm.label)
            lowest, highest = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(epochs, lowest, highest, color=colour, alpha=0.15, linewidth=0)
        axis.set_xticks(range(1, 1 + max(len(arm.by_epoch) for arm in arms)))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylim(_within(axis.get_ylim(), 100 if title.endswith("%") else math.inf))
    return _with_legend(figure, axes[0])


def scores(arms: Sequence[Arm], colours: Mapping[str, str], metrics: Mapping[str, str]) -> str:
    """Plot each metric: one dot per seed, the mean, and its t interval."""
    figure, axes = _new(1, len(metrics), height=0.9 + 0.45 * len(arms))
    for axis, (metric, name) in zip(axes, metrics.items(), strict=True):
        for height, arm in enumerate(reversed(arms)):
            values, colour = arm.test(metric), colours[arm.label]
            mean, _, interval = mean_over_seeds(values)
            heights = [height] * len(values)
            axis.plot(values, heights, "o", markersize=6, color=colour, alpha=0.45)
            _interval(axis, height, mean, interval, colour)
        _names(axis, [arm.label for arm in arms])
        axis.set(xlabel=f"{name}, %", ylim=(-0.6, len(arms) - 0.4))
        axis.set_xlim(_within(axis.get_xlim(), 100))
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    return svg(figure)


def differences(
    rows: Sequence[tuple[str, float, Interval | None]], margin: float, names: tuple[str, str]
) -> str:
    """Plot differences with their intervals over the margin of equivalence.

    Args:
        rows: Label, difference and interval, percentage points.
        margin: Percentage points.
        names: The two arms; each difference is the first minus the second.
    """
    figure, (axis,) = _new(1, 1, height=1.2 + 0.4 * len(rows))
    axis.axvspan(-margin, margin, color=GREEN, alpha=0.15, linewidth=0)
    axis.axvline(0, color="black", linewidth=1)
    for height, (_, mean, interval) in enumerate(reversed(rows)):
        _interval(axis, height, mean, interval, "black")
    _names(axis, [name for name, _, _ in rows])
    label = f"{names[0]} minus {names[1]}, percentage points"
    axis.set(xlabel=label, ylim=(-0.6, len(rows) - 0.4))
    return svg(figure)


def against_reference(
    rows: Sequence[tuple[str, str, Mapping[str, tuple[float, Interval | None]]]],
    margin: float,
    reference: str,
    metrics: Mapping[str, str],
) -> str:
    """Plot the differences of several arms from one, the metrics side by side.

    Args:
        rows: Label of an arm, its colour, and difference and interval by metric, percentage points.
        margin: Of equivalence, percentage points.
        reference: Label of the reference.
        metrics: Labels of the metrics by name.
    """
    figure, axes = _new(1, len(metrics), height=1.1 + 0.4 * len(rows))
    for axis, (metric, name) in zip(axes, metrics.items(), strict=True):
        axis.axvspan(-margin, margin, color=GREEN, alpha=0.15, linewidth=0)
        axis.axvline(0, color="black", linewidth=1)
        for height, (_, colour, found) in enumerate(reversed(rows)):
            _interval(axis, height, *found[metric], colour)
        _names(axis, [label for label, _, _ in rows])
        axis.set(xlabel=f"{name} minus that of {reference}", ylim=(-0.6, len(rows) - 0.4))
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    return svg(figure)


def memory(components: Mapping[str, Mapping[str, float]]) -> str:
    """Plot the components (MB) of each arm's peak memory, one bar per arm.

    A component below zero is left out: the others were never in memory at the same time.
    """
    figure, (axis,) = _new(1, 1, height=1.5 + 0.45 * len(components))
    for height, own in enumerate(reversed(list(components.values()))):
        left = 0.0
        for (name, signed), colour in zip(own.items(), OF_COMPONENT, strict=True):
            size, label = max(0.0, signed), name if height == 0 else None
            axis.barh(height, size, left=left, height=0.6, color=colour, label=label)
            left += size
    _names(axis, list(components))
    axis.set_xlabel("peak memory in training, MB")
    return _with_legend(figure, axis)


def failures(counts: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> str:
    """Plot wrong answers per run by class, one bar per arm."""
    classes = list(next(iter(counts.values())))
    figure, (axis,) = _new(1, 1, height=1 + max(0.5, 0.16 * len(counts)) * len(classes))
    width = 0.8 / len(counts)
    hatches = _styles(HATCHES, [colours[arm] for arm in counts])
    for number, ((arm, own), hatch) in enumerate(zip(counts.items(), hatches, strict=True)):
        heights = [n + 0.4 - width * (number + 0.5) for n in range(len(classes))]
        sizes, colour = list(own.values())[::-1], colours[arm]
        bars = axis.barh(heights, sizes, width, color=colour, label=arm, hatch=hatch)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    _names(axis, classes)
    axis.set_xlabel("wrong answers per run")
    return _with_legend(figure, axis)


def calibration(bins: Mapping[str, Sequence[Bin]], colours: Mapping[str, str]) -> str:
    """Plot the share of right answers by the probability that the model gave them."""
    figure, (axis,) = _new(1, 1, height=4)
    axis.plot([0, 100], [0, 100], color="black", linewidth=1, linestyle=":")
    styles = _styles(LINES, [colours[arm] for arm in bins])
    for (arm, own), style in zip(bins.items(), styles, strict=True):
        x, y = [b.probability for b in own], [b.exact_match for b in own]
        axis.plot(x, y, style, marker="o", color=colours[arm], label=arm)
    axis.set(xlabel="probability of the answer, %", ylabel="exact match, %")
    axis.set(xlim=(0, 100), ylim=(0, 100))
    return _with_legend(figure, axis)


def risk_coverage(curves: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> str:
    """Plot EM of the most confident answers by their share of all."""
    figure, (axis,) = _new(1, 1, height=4)
    styles = _styles(LINES, [colours[arm] for arm in curves])
    for (arm, curve), style in zip(curves.items(), styles, strict=True):
        shares = [100 * step / len(curve) for step in range(1, len(curve) + 1)]
        axis.plot(shares, curve, style, marker="o", markersize=3, color=colours[arm], label=arm)
    axis.set(xlabel="most confident answers, % of all", ylabel="exact match, %", xlim=(0, 100))
    axis.set_ylim(_within(axis.get_ylim(), 100))
    return _with_legend(figure, axis)


def sweep(arms: Sequence[Arm], key: str, title: str, colours: Mapping[str, str]) -> str:
    """Plot validation F1 by a swept value: mean and t interval over seeds, a line per other key."""
    figure, (axis,) = _new(1, 1, height=3.6)
    lines: dict[str, dict[float, Arm]] = {}
    for arm in sorted(arms, key=lambda arm: arm.config[key]):
        name = arm.label.replace(f", {key} {arm.config[key]:g}", "")
        lines.setdefault(name, {})[arm.config[key]] = arm
    firsts = [next(iter(points.values())) for points in lines.values()]
    styles = _styles(LINES, [colours[arm.label] for arm in firsts])
    for (name, points), first, style in zip(lines.items(), firsts, styles, strict=True):
        colour = colours[first.label]
        found = [mean_over_seeds(arm.values(lambda r: r.best.f1)) for arm in points.values()]
        means = [mean for mean, _, _ in found]
        axis.plot(list(points), means, style, marker="o", color=colour, label=name)
        for x, (_, _, interval) in zip(points, found, strict=True):
            if interval is not None:
                axis.plot([x, x], interval, color=colour, linewidth=1)
    axis.set_xscale("log")
    ticks = sorted({arm.config[key] for arm in arms})
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.set(xlabel=title, ylabel="validation F1, %")
    axis.set_ylim(_within(axis.get_ylim(), 100))
    return _with_legend(figure, axis)


def colours(study: Study) -> dict[str, str]:
    """Give the colour of each arm by its label: that of its mode, the same in all plots."""
    of_mode = dict(zip(study.modes, cycle(OF_ADAPTER), strict=False))
    return {arm.label: of_mode[arm.mode] if arm.has_adapter else OF_FULL for arm in study.arms}


def svg(figure: Figure) -> str:
    """Render a figure as SVG text, reproducibly."""
    out = io.StringIO()
    with warnings.catch_warnings():
        # A character that this font lacks: viewers take another font for it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _styles(styles: Sequence[str], colours: Sequence[str]) -> list[str]:
    """A style for each arm, another one for each of the same colour."""
    return [styles[colours[:n].count(c) % len(styles)] for n, c in enumerate(colours)]


def _interval(axis: Axes, y: float, mean: float, interval: Interval | None, colour: str) -> None:
    if interval is not None:
        axis.plot(interval, [y, y], color=colour, linewidth=2)
    axis.plot([mean], [y], "|", color=colour, markersize=16, markeredgewidth=2.5)


def _new(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the text, in which letters are as large as in every other."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _within(limits: tuple[float, float], highest: float) -> tuple[float, float]:
    """Cut the limits of an axis at 0 and at the highest value that can be."""
    return max(0.0, limits[0]), min(limits[1], highest)


def _names(axis: Axes, names: Sequence[str]) -> None:
    """Label the positions on the vertical axis, from above."""
    axis.set_yticks(range(len(names)), [_wrapped(name) for name in reversed(names)])


def _with_legend(figure: Figure, axis: Axes) -> str:
    handles, labels = axis.get_legend_handles_labels()
    widest = min(WIDEST, max(map(len, labels)))
    columns = int(figure.get_figwidth() / (0.5 + 0.08 * widest))  # inches, of a line and a letter
    figure.legend(
        handles, list(map(_wrapped, labels)), loc="outside lower center",
        ncols=max(1, min(3, columns, len(labels))), frameon=False,
    )  # fmt: skip
    return svg(figure)


def _wrapped(label: str) -> str:
    return textwrap.fill(label, WIDEST)
