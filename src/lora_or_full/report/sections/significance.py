"""The section on significance: tests over seeds, over paragraphs, and over both."""

from typing import Any

from lora_or_full.report import plots
from lora_or_full.report.formatting import METRICS, p_value, shown_interval, signed
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats import paired, seeds_by_paragraphs
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.stats.paired import Interval


def significance(found: ArmComparison | None) -> Section | None:
    """Write the section; None if there is nothing to compare."""
    if found is None:
        return None
    equivalent = f"p, equivalent ±{found.margin:g}"
    drawn: list[tuple[str, float, Interval | None]] = []
    tables: dict[str, list[dict[str, Any]]] = {"seeds": [], "paragraphs": [], "both": []}

    def adjusted(metric: str, test: str, p: float | None) -> str | None:
        return None if p is None else f"{p_value(p)} ({p_value(found.holm[test][metric])})"

    for metric, name in METRICS.items():
        s, q, j = found.over_seeds[metric], found.over_paragraphs[metric], found.over_both[metric]
        of_metric = {"seeds": s, "paragraphs": q} | ({"both": j} if j else {})
        for over, test in of_metric.items():
            drawn.append((f"{name}, over {over}", test.mean, test.interval))
        tables["seeds"].append({
            "": name,
            "mean": signed(s.mean),
            "deviation": None if s.deviation is None else f"{s.deviation:.2f}",
            "95 % t interval": shown_interval(s.interval),
            "p, t test": adjusted(metric, "t", s.p_t),
            "p, sign flips": adjusted(metric, "sign flips", s.p_sign_flip),
            "smallest p": p_value(s.smallest_p),
            equivalent: adjusted(metric, "equivalence over seeds", s.p_equivalent),
            "seeds needed": None if s.p_t is None else _needed(s.seeds_needed),
        })  # fmt: skip
        tables["paragraphs"].append({
            "": name,
            "mean": signed(q.mean),
            "95 % interval": shown_interval(q.interval),
            "paragraphs": q.paragraphs,
        })  # fmt: skip
        if j is not None:
            tables["both"].append({
                "": name,
                "mean": signed(j.mean),
                "95 % interval": shown_interval(j.interval),
                "p": adjusted(metric, "over both", j.p),
                equivalent: adjusted(metric, "equivalence over both", j.p_equivalent),
                "degrees of freedom": f"{j.degrees_of_freedom:.1f}",
                "coverage": ", ".join(f"{100 * c:.1f} % with {n}" for n, c in j.coverage.items()),
                "seeds needed": _needed(j.seeds_needed),
            })  # fmt: skip
    return section(
        "significance",
        found=found,
        seeds=[
            {"": f"seed {seed}"}
            | {name: signed(found.over_seeds[m].differences[n]) for m, name in METRICS.items()}
            for n, seed in enumerate(found.seeds)
        ],
        over=tables,
        mcnemar=[
            [f"seed {d.seed}", str(d.first_only), str(d.second_only), p_value(d.p)]
            for d in found.mcnemar
        ],
        plot=plots.differences(drawn, found.margin, (found.adapter.label, found.full.label)),
        resamples=paired.RESAMPLES,
        studies=seeds_by_paragraphs.STUDIES,
    )


def _needed(seeds: int | None) -> str:
    return f"over {paired.MOST_SEEDS:,}" if seeds is None else str(seeds)
