"""Arms of a study compared with a reference by every test."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lora_or_full.report.stats import paired, seeds_by_paragraphs
from lora_or_full.report.study import Arm, Study, shared_seeds

# What each test is called, the field that holds it, and the field of its p.
TESTS = {
    "t": ("over_seeds", "p_t"),
    "sign flips": ("over_seeds", "p_sign_flip"),
    "equivalence over seeds": ("over_seeds", "p_equivalent"),
    "over both": ("over_both", "p"),
    "equivalence over both": ("over_both", "p_equivalent"),
}


@dataclass(frozen=True)
class ArmComparison:
    """An arm and its reference, over the seeds that both have; tests by metric."""

    arm: Arm  # every difference is this arm minus the reference
    reference: Arm
    seeds: list[int]
    over_seeds: Mapping[str, paired.PairedSeedTest]
    over_paragraphs: Mapping[str, paired.ParagraphBootstrap]
    over_both: Mapping[str, seeds_by_paragraphs.SeedByParagraphTest | None]  # None: can't be done
    mcnemar: list[paired.McNemarTest]  # one per seed
    # p by test and metric, adjusted for testing several arms and metrics.
    holm: Mapping[str, Mapping[str, float]]
    alone: bool  # whether no other arm is compared with the reference

    def name(self, row: str) -> str:
        """Name a row of a table: the arm too, if there are several."""
        return row if self.alone else f"{self.arm.label}, {row}"

    @property
    def arms(self) -> tuple[Arm, Arm]:
        """The arm and its reference."""
        return self.arm, self.reference

    @property
    def alike(self) -> tuple[Arm, Arm] | None:
        """The runs of both on the first hardware that both have, for costs; None if there is none.

        Each shares seeds with the other, if they have any on that hardware.
        """
        kinds = [dict.fromkeys(run.hardware for run in arm.runs.values()) for arm in self.arms]
        common = [kind for kind in kinds[0] if kind in kinds[1]]
        if not common:
            return None
        own, its = (
            Arm(arm.label, {s: run for s, run in arm.runs.items() if run.hardware == common[0]})
            for arm in self.arms
        )
        return own, its


@dataclass(frozen=True)
class Comparison:
    """Arms compared with one reference."""

    pairs: list[ArmComparison]
    reference: Arm
    margin: float  # of equivalence, percentage points
    apart: list[Arm]  # without a seed in common with the reference
    metrics: Mapping[str, str]  # labels by name

    @property
    def arms(self) -> list[Arm]:
        """The compared arms, then the reference."""
        return [*(pair.arm for pair in self.pairs), self.reference]


def compare_arms(study: Study, margin: float, against: str | None = None) -> Comparison | None:
    """Compare the arms of a study that `Study.compared` chooses.

    Args:
        study: Arms that can be compared.
        margin: Margin of equivalence, percentage points.
        against: Label of the reference; None for full fine-tuning.

    Returns:
        None if there is nothing to compare, or no arm has a seed in common with the reference.

    Raises:
        UserError: No arm has the label `against`.
    """
    arms, reference = study.compared(against)
    if reference is None:
        return None
    own = [arm for arm in arms if shared_seeds(arm, reference)]
    if not own:
        return None
    pairs = [_compare(arm, reference, margin, len(own) == 1, study.metrics) for arm in own]
    # Adjusted over arms and metrics at once (Holm, 1979).
    p_values = {
        name: {
            (number, metric): getattr(test, p, None)
            for number, pair in enumerate(pairs)
            for metric, test in getattr(pair, field).items()
        }
        for name, (field, p) in TESTS.items()
    }
    adjusted = {name: paired.holm(values) for name, values in p_values.items()}
    pairs = [
        replace(
            pair,
            holm={
                name: {m: values[number, m] for m in study.metrics if (number, m) in values}
                for name, values in adjusted.items()
            },
        )
        for number, pair in enumerate(pairs)
    ]
    apart = [arm for arm in arms if not shared_seeds(arm, reference)]
    return Comparison(pairs, reference, margin, apart, study.metrics)


def _compare(
    arm: Arm, reference: Arm, margin: float, alone: bool, metrics: Iterable[str]
) -> ArmComparison:
    """Compare two arms, without the adjusted p values."""
    seeds = shared_seeds(arm, reference)
    paragraphs = [p["paragraph"] for p in arm.any.predictions]
    differences = {metric: arm.minus(reference, metric) for metric in metrics}
    return ArmComparison(
        arm,
        reference,
        seeds,
        {m: paired.paired_seed_test(d.mean(axis=1), margin) for m, d in differences.items()},
        {m: paired.paragraph_bootstrap(d, paragraphs) for m, d in differences.items()},
        {
            m: seeds_by_paragraphs.seed_by_paragraph_test(d, paragraphs, margin)
            for m, d in differences.items()
        },
        list(map(paired.mcnemar_test, seeds, differences["exact_match"])),
        {},
        alone,
    )
