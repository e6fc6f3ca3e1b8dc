"""The section on significance: tests over seeds, over paragraphs, and over both."""

from lora_or_full.report import plots
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats import paired, seeds_by_paragraphs
from lora_or_full.report.stats.comparison import ArmComparison, Comparison


def significance(found: Comparison | None) -> Section | None:
    """Write the section; None if there is nothing to compare."""
    if found is None:
        return None
    return section(
        "significance",
        found=found,
        over_both=any(test for pair in found.pairs for test in pair.over_both.values()),
        plot=_plot(found.pairs[0], found) if len(found.pairs) == 1 else None,
        most_seeds=paired.MOST_SEEDS,
        resamples=paired.RESAMPLES,
        studies=seeds_by_paragraphs.STUDIES,
    )


def _plot(pair: ArmComparison, found: Comparison) -> str:
    drawn = [
        (f"{name}, over {over}", test.mean, test.interval)
        for metric, name in found.metrics.items()
        for over, test in (
            ("seeds", pair.over_seeds[metric]),
            ("paragraphs", pair.over_paragraphs[metric]),
            ("both", pair.over_both[metric]),
        )
        if test is not None
    ]
    return plots.differences(drawn, found.margin, (pair.arm.label, pair.reference.label))
