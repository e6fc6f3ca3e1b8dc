"""The plots of the report, as SVG; a mode has the same colour in all of them."""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_or_full.report.failure_classes import Bin
from lora_or_full.report.stats.paired import Interval, mean_over_seeds
from lora_or_full.report.study import Arm

# Okabe and Ito's palette (2008), which the colour-blind can tell apart.
BLUE, VERMILION, GREEN, PURPLE, SKY, AMBER = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00",
)  # fmt: skip
LIGHT, GREY = "#C8C8C8", "#7F7F7F"
OF_ADAPTER, OF_FULL = BLUE, VERMILION
OF_COMPONENT = (LIGHT, GREEN, AMBER, PURPLE, SKY, GREY)  # none is a mode's
LINES = ("-", "--", ":", "-.")
WIDEST = 36  # characters of a line of a label, so that there is room for what it names
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "svg.fonttype": "none", "svg.hashsalt": "report", "figure.dpi": 100,
    "font.family": ["DejaVu Sans", "sans-serif"], "text.parse_math": False,
}  # fmt: skip
matplotlib.rcParams.update(STYLE)


def dynamics(arms: Sequence[Arm]) -> str:
    """Plot losses and validation scores by epoch: mean and range over seeds.

    Args:
        arms: At most as many of each mode as there are LINES to distinguish them.
    """
    figure, axes = _new(2, 2, width=8, height=6)
    panels = (
        ("Training loss, nats per token", "train_loss"),
        ("Validation loss, nats per token", "validation_loss"),
        ("Validation EM, %", "exact_match"),
        ("Validation F1, %", "f1"),
    )
    for axis, (title, key) in zip(axes, panels, strict=True):
        for arm, style in _styled(arms):
            rows = [[getattr(e, key) for e in run.record.epochs] for run in arm.runs.values()]
            columns = list(zip(*rows, strict=False))
            epochs = range(1, len(columns) + 1)
            axis.plot(
                epochs, [sum(c) / len(c) for c in columns], style, marker="o", markersize=4,
                color=_colour(arm), label=arm.label,
            )  # fmt: skip
            lowest, highest = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(epochs, lowest, highest, color=_colour(arm), alpha=0.15, linewidth=0)
            axis.set_xticks(list(epochs))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("epoch")
    _legend(figure, axes[0])
    return svg(figure)


def scores(arms: Sequence[Arm]) -> str:
    """Plot EM and F1: one dot per seed, the mean, and its t interval."""
    figure, axes = _new(1, 2, width=9, height=0.9 + 0.45 * len(arms))
    for axis, (title, metric) in zip(
        axes, (("EM, %", "exact_match"), ("F1, %", "f1")), strict=True
    ):
        for place, arm in enumerate(reversed(arms)):
            values = arm.test(metric)
            mean, _, interval = mean_over_seeds(values)
            axis.plot(values, [place] * len(values), "o", color=_colour(arm), alpha=0.45)
            _interval(axis, place, mean, interval, _colour(arm))
        _names(axis, [arm.label for arm in reversed(arms)])
        axis.set_ylim(-0.6, len(arms) - 0.4)
        axis.set_xlabel(title)
    axes[1].tick_params(labelleft=False)
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
    figure, (axis,) = _new(1, 1, width=8, height=1.2 + 0.4 * len(rows))
    axis.axvspan(-margin, margin, color=GREEN, alpha=0.15, linewidth=0)
    axis.axvline(0, color="black", linewidth=1)
    for place, (_, mean, interval) in enumerate(reversed(rows)):
        _interval(axis, place, mean, interval, "black")
    _names(axis, [name for name, _, _ in reversed(rows)])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel(f"{names[0]} minus {names[1]}, percentage points")
    return svg(figure)


def memory(parts: Mapping[str, Mapping[str, float]]) -> str:
    """Plot the components (MB) of each arm's peak memory, one bar per arm.

    A component below zero is left out: the others were never in memory at the same time.
    """
    figure, (axis,) = _new(1, 1, width=9, height=1.5 + 0.45 * len(parts))
    for place, own in enumerate(reversed(list(parts.values()))):
        left = 0.0
        for (name, size), colour in zip(own.items(), OF_COMPONENT, strict=True):
            axis.barh(
                place, max(0.0, size), left=left, height=0.6, color=colour,
                label=name if place == 0 else None,
            )  # fmt: skip
            left += max(0.0, size)
    _names(axis, list(reversed(list(parts))))
    axis.set_xlabel("peak memory in training, MB")
    _legend(figure, axis)
    return svg(figure)


def failures(counts: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> str:
    """Plot wrong answers per run by class, one bar per arm."""
    classes = list(next(iter(counts.values())))
    figure, (axis,) = _new(1, 1, width=8, height=1 + 0.5 * len(classes))
    height = 0.8 / len(counts)
    for number, (arm, own) in enumerate(counts.items()):
        places = [n + 0.4 - height * (number + 0.5) for n in range(len(classes))]
        values = list(reversed(list(own.values())))
        bars = axis.barh(places, values, height, color=colours[arm], label=arm)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    _names(axis, list(reversed(classes)))
    axis.set_xlabel("wrong answers a run")
    _legend(figure, axis)
    return svg(figure)


def calibration(bins: Mapping[str, Sequence[Bin]], colours: Mapping[str, str]) -> str:
    """The share of right answers by the probability that the model gave them."""
    figure, (axis,) = _new(1, 1, width=5, height=4)
    axis.plot([0, 100], [0, 100], color="black", linewidth=1, linestyle=":")
    for arm, own in bins.items():
        axis.plot(
            [b.probability for b in own], [b.exact_match for b in own], "o-", markersize=4,
            color=colours[arm], label=arm,
        )  # fmt: skip
    axis.set_xlabel("probability of the answer, %")
    axis.set_ylabel("exact match, %")
    _legend(figure, axis)
    return svg(figure)


def coverage(curves: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> str:
    """Plot EM of the most confident answers by their share of all."""
    figure, (axis,) = _new(1, 1, width=5, height=4)
    for arm, curve in curves.items():
        shares = [100 * (step + 1) / len(curve) for step in range(len(curve))]
        axis.plot(shares, curve, "o-", markersize=3, color=colours[arm], label=arm)
    axis.set_xlabel("most confident answers, % of all")
    axis.set_ylabel("exact match, %")
    _legend(figure, axis)
    return svg(figure)


def sweep(arms: Sequence[Arm], key: str, title: str) -> str:
    """Plot validation F1 by a swept value: mean and t interval over seeds, a line per other key."""
    figure, (axis,) = _new(1, 1, width=7, height=3.6)
    lines: dict[str, list[tuple[float, Arm]]] = {}
    for arm in arms:
        name = arm.label.replace(f", {key} {arm.any.config[key]:g}", "")
        lines.setdefault(name, []).append((arm.any.config[key], arm))
    seen: dict[str, int] = {}
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        mode, colour = points[0][1].mode, _colour(points[0][1])
        style = LINES[seen.setdefault(mode, 0) % len(LINES)]
        seen[mode] += 1
        means = [mean_over_seeds([run.best.f1 for run in arm.runs.values()]) for _, arm in points]
        axis.plot(
            [x for x, _ in points], [m for m, _, _ in means], style, marker="o", markersize=4,
            color=colour, label=name,
        )  # fmt: skip
        for (x, _), (_, _, interval) in zip(points, means, strict=True):
            if interval is not None:
                axis.plot([x, x], interval, color=colour, linewidth=1)
    axis.set_xscale("log")
    values = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xticks(values, [f"{x:g}" for x in values])
    axis.minorticks_off()
    axis.set_xlabel(title)
    axis.set_ylabel("validation F1, %")
    _legend(figure, axis)
    return svg(figure)


def colours(arms: Sequence[Arm]) -> dict[str, str]:
    """Give the colour of each arm by its label."""
    return {arm.label: _colour(arm) for arm in arms}


def _colour(arm: Arm) -> str:
    return OF_ADAPTER if arm.has_adapter else OF_FULL


def _styled(arms: Sequence[Arm]) -> list[tuple[Arm, str]]:
    """Each arm with a line style of its own within its mode."""
    seen: dict[str, int] = {}
    styled = []
    for arm in arms:
        number = seen.get(arm.mode, 0)
        seen[arm.mode] = number + 1
        styled.append((arm, LINES[number]))
    return styled


def _interval(
    axis: Axes, place: float, mean: float, interval: Interval | None, colour: str
) -> None:
    if interval is not None:
        axis.plot(interval, [place, place], color=colour, linewidth=2)
    axis.plot([mean], [place], "|", color=colour, markersize=16, markeredgewidth=2.5)


def _new(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _names(axis: Axes, names: Sequence[str]) -> None:
    """Label the positions on the vertical axis, from below."""
    axis.set_yticks(range(len(names)), list(map(_wrapped, names)))


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    widest = min(WIDEST, max(map(len, labels)))
    columns = int(figure.get_figwidth() / (0.5 + 0.08 * widest))  # inches, of a line and a letter
    figure.legend(
        handles, list(map(_wrapped, labels)), loc="outside lower center",
        ncols=max(1, min(3, columns, len(labels))), frameon=False,
    )  # fmt: skip


def _wrapped(label: str) -> str:
    return textwrap.fill(label, WIDEST)


def svg(figure: Figure) -> str:
    """Render a figure as SVG text, reproducibly."""
    out = io.StringIO()
    with warnings.catch_warnings():
        # A character that this font lacks: viewers take another font for it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
