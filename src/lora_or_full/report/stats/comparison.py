"""The best arm with an adapter and the best arm without, compared by every test."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_or_full.report.formatting import METRICS
from lora_or_full.report.stats import paired, seeds_by_paragraphs
from lora_or_full.report.study import Arm, Study, shared_seeds


@dataclass(frozen=True)
class ArmComparison:
    """Two arms compared over the seeds that both have; tests by metric (exact_match, f1)."""

    adapter: Arm  # every difference is this arm minus the other
    full: Arm
    margin: float  # of equivalence, percentage points
    seeds: list[int]
    over_seeds: dict[str, paired.PairedSeedTest]
    over_paragraphs: dict[str, paired.ParagraphBootstrap]
    over_both: dict[str, seeds_by_paragraphs.SeedByParagraphTest | None]  # None: can't be done
    mcnemar: list[paired.McNemarTest]  # one per seed
    holm: dict[str, dict[str, float]]  # p by test and metric, adjusted for testing two metrics


def compare_arms(study: Study, margin: float) -> ArmComparison | None:
    """Compare the best arms of a study, with a margin of equivalence in percentage points.

    Returns:
        None if one of the two modes is missing, or they have no seed in common.
    """
    adapter, full = study.compared()
    if adapter is None or full is None or not (seeds := shared_seeds(adapter, full)):
        return None
    paragraphs = [p["paragraph"] for p in adapter.any.predictions]
    differences = {metric: adapter.minus(full, metric) for metric in METRICS}
    over_seeds = {
        m: paired.paired_seed_test(d.mean(axis=1), margin) for m, d in differences.items()
    }
    over_both = {
        m: seeds_by_paragraphs.seed_by_paragraph_test(d, paragraphs, margin)
        for m, d in differences.items()
    }
    p_values: dict[str, tuple[Mapping[str, object], str]] = {
        "t": (over_seeds, "p_t"),
        "sign flips": (over_seeds, "p_sign_flip"),
        "equivalence over seeds": (over_seeds, "p_equivalent"),
        "over both": (over_both, "p"),
        "equivalence over both": (over_both, "p_equivalent"),
    }
    return ArmComparison(
        adapter,
        full,
        margin,
        seeds,
        over_seeds,
        {m: paired.paragraph_bootstrap(d, paragraphs) for m, d in differences.items()},
        over_both,
        list(map(paired.mcnemar_test, seeds, differences["exact_match"])),
        {
            name: paired.holm({m: getattr(test, field, None) for m, test in by_metric.items()})
            for name, (by_metric, field) in p_values.items()
        },
    )
