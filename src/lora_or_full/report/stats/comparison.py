"""The best LoRA arm and the best full arm, held against each other by every test."""

from dataclasses import dataclass

from lora_or_full.report.formatting import METRICS
from lora_or_full.report.stats import paired, seeds_by_paragraphs
from lora_or_full.report.stats.paired import McNemarTest, PairedSeedTest, ParagraphBootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import SeedByParagraphTest
from lora_or_full.report.study import Arm, Study


@dataclass(frozen=True)
class ArmComparison:
    """The best arms of both modes, held against each other over the seeds that both have.

    `holm` has the p values of each test by metric, adjusted for being of two metrics."""

    lora: Arm
    full: Arm
    margin: float
    seeds: list[int]
    over_seeds: dict[str, PairedSeedTest]
    over_questions: dict[str, ParagraphBootstrap]
    joint: dict[str, SeedByParagraphTest | None]
    discordant: list[McNemarTest]
    holm: dict[str, dict[str, float]]


def contrast(study: Study, margin: float) -> ArmComparison | None:
    """None if a mode is missing, or the two have no seed in common."""
    lora, full = study.best("lora"), study.best("full")
    if lora is None or full is None:
        return None
    seeds = lora.shared_seeds(full)
    if not seeds:
        return None
    paragraphs = [p["paragraph"] for p in lora.any.predictions]
    apart = {metric: lora.minus(full, metric) for metric in METRICS}
    over_seeds = {m: paired.over_seeds(d.mean(axis=1), margin) for m, d in apart.items()}
    joint = {m: seeds_by_paragraphs.joint(d, paragraphs, margin) for m, d in apart.items()}
    return ArmComparison(
        lora,
        full,
        margin,
        seeds,
        over_seeds,
        {m: paired.over_questions(d, paragraphs) for m, d in apart.items()},
        joint,
        [
            paired.discordant(
                seed,
                lora.runs[seed].scores("exact_match"),
                full.runs[seed].scores("exact_match"),
            )
            for seed in seeds
        ],
        {
            "t": _holm({m: s.p_t for m, s in over_seeds.items()}),
            "sign flips": _holm({m: s.p_sign_flip for m, s in over_seeds.items()}),
            "equivalence over seeds": _holm({m: s.p_equivalent for m, s in over_seeds.items()}),
            "joint": _holm({m: j.p if j else None for m, j in joint.items()}),
            "joint equivalence": _holm(
                {m: j.p_equivalent if j else None for m, j in joint.items()}
            ),
        },
    )


def _holm(p_values: dict[str, float | None]) -> dict[str, float]:
    known = {metric: p for metric, p in p_values.items() if p is not None}
    return dict(zip(known, paired.holm(list(known.values())), strict=True))
