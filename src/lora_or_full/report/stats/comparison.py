"""The best arm with an adapter and the best arm without, compared by every test."""

from dataclasses import dataclass

from lora_or_full.report.formatting import METRICS
from lora_or_full.report.stats import paired
from lora_or_full.report.stats.paired import McNemarTest, PairedSeedTest, ParagraphBootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import (
    SeedByParagraphTest,
    seed_by_paragraph_test,
)
from lora_or_full.report.study import Arm, Study, question_scores, shared_seeds


@dataclass(frozen=True)
class ArmComparison:
    """Two arms compared over the seeds that both have; tests by metric (exact_match, f1)."""

    adapter: Arm  # every difference is this arm minus the other
    full: Arm
    margin: float  # of equivalence, percentage points
    seeds: list[int]
    over_seeds: dict[str, PairedSeedTest]
    over_paragraphs: dict[str, ParagraphBootstrap]
    over_both: dict[str, SeedByParagraphTest | None]  # None where it can't be done
    mcnemar: list[McNemarTest]  # one per seed
    holm: dict[str, dict[str, float]]  # p by test and metric, adjusted for testing two metrics


def compare_arms(study: Study, margin: float) -> ArmComparison | None:
    """Compare the best arms of a study.

    Args:
        study: Arms that can be compared.
        margin: Margin of equivalence, percentage points.

    Returns:
        None if one of the two modes is missing, or they have no seed in common.
    """
    adapter, full = study.compared()
    if adapter is None or full is None:
        return None
    seeds = shared_seeds(adapter, full)
    if not seeds:
        return None
    paragraphs = [p["paragraph"] for p in adapter.any.predictions]
    differences = {metric: adapter.minus(full, metric) for metric in METRICS}
    over_seeds = {
        m: paired.paired_seed_test(d.mean(axis=1), margin) for m, d in differences.items()
    }
    over_both = {m: seed_by_paragraph_test(d, paragraphs, margin) for m, d in differences.items()}
    p_values: dict[str, dict[str, float | None]] = {
        "t": {m: test.p_t for m, test in over_seeds.items()},
        "sign flips": {m: test.p_sign_flip for m, test in over_seeds.items()},
        "equivalence over seeds": {m: test.p_equivalent for m, test in over_seeds.items()},
        "over both": {m: test.p if test else None for m, test in over_both.items()},
        "equivalence over both": {
            m: test.p_equivalent if test else None for m, test in over_both.items()
        },
    }
    mcnemar = []
    for seed in seeds:
        own, other = (
            question_scores(arm.runs[seed].predictions, "exact_match") for arm in (adapter, full)
        )
        mcnemar.append(paired.mcnemar_test(seed, own, other))
    return ArmComparison(
        adapter,
        full,
        margin,
        seeds,
        over_seeds,
        {m: paired.paragraph_bootstrap(d, paragraphs) for m, d in differences.items()},
        over_both,
        mcnemar,
        {test: _holm(by_metric) for test, by_metric in p_values.items()},
    )


def _holm(p_values: dict[str, float | None]) -> dict[str, float]:
    known = {metric: p for metric, p in p_values.items() if p is not None}
    return dict(zip(known, paired.holm(list(known.values())), strict=True))
