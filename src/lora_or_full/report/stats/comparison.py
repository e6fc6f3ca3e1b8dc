"""The best arm with an adapter and the best arm without, compared by every test."""

from dataclasses import dataclass

from lora_or_full.report.formatting import METRICS
from lora_or_full.report.stats import paired, seeds_by_paragraphs
from lora_or_full.report.stats.paired import McNemarTest, PairedSeedTest, ParagraphBootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import SeedByParagraphTest
from lora_or_full.report.study import Arm, Study


@dataclass(frozen=True)
class ArmComparison:
    """Two arms compared over the seeds that both have.

    Attributes:
        adapter: The arm with an adapter; every difference is this arm minus the other.
        full: The arm of full fine-tuning.
        margin: Margin of equivalence, percentage points.
        seeds: The seeds that both arms have.
        over_seeds: By metric, the tests over seeds.
        over_paragraphs: By metric, the bootstrap over paragraphs.
        over_both: By metric, the test over both; None where it can't be done.
        mcnemar: McNemar's test of each seed.
        holm: By test and metric, p values adjusted for testing two metrics (Holm, 1979).
    """

    adapter: Arm
    full: Arm
    margin: float
    seeds: list[int]
    over_seeds: dict[str, PairedSeedTest]
    over_paragraphs: dict[str, ParagraphBootstrap]
    over_both: dict[str, SeedByParagraphTest | None]
    mcnemar: list[McNemarTest]
    holm: dict[str, dict[str, float]]


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
    seeds = adapter.shared_seeds(full)
    if not seeds:
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
    return ArmComparison(
        adapter,
        full,
        margin,
        seeds,
        over_seeds,
        {m: paired.paragraph_bootstrap(d, paragraphs) for m, d in differences.items()},
        over_both,
        [
            paired.mcnemar_test(
                seed,
                adapter.runs[seed].scores("exact_match"),
                full.runs[seed].scores("exact_match"),
            )
            for seed in seeds
        ],
        {
            "t": _holm({m: s.p_t for m, s in over_seeds.items()}),
            "sign flips": _holm({m: s.p_sign_flip for m, s in over_seeds.items()}),
            "equivalence over seeds": _holm({m: s.p_equivalent for m, s in over_seeds.items()}),
            "over both": _holm({m: b.p if b else None for m, b in over_both.items()}),
            "equivalence over both": _holm(
                {m: b.p_equivalent if b else None for m, b in over_both.items()}
            ),
        },
    )


def _holm(p_values: dict[str, float | None]) -> dict[str, float]:
    known = {metric: p for metric, p in p_values.items() if p is not None}
    return dict(zip(known, paired.holm(list(known.values())), strict=True))
