"""The section on significance: tests over seeds, over paragraphs, and over both."""

from lora_or_full.report import plots
from lora_or_full.report.formatting import METRICS
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats import paired, seeds_by_paragraphs
from lora_or_full.report.stats.comparison import ArmComparison


def significance(found: ArmComparison | None) -> Section | None:
    """Write the section; None if there is nothing to compare."""
    if found is None:
        return None
    drawn = [
        (f"{name}, over {over}", test.mean, test.interval)
        for metric, name in METRICS.items()
        for over, test in (
            ("seeds", found.over_seeds[metric]),
            ("paragraphs", found.over_paragraphs[metric]),
            ("both", found.over_both[metric]),
        )
        if test is not None
    ]
    return section(
        "significance",
        found=found,
        plot=plots.differences(drawn, found.margin, (found.adapter.label, found.full.label)),
        most_seeds=paired.MOST_SEEDS,
        resamples=paired.RESAMPLES,
        studies=seeds_by_paragraphs.STUDIES,
    )
