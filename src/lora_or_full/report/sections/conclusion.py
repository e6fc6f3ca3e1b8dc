"""What may be concluded of LoRA against full fine-tuning, in words, and what may not."""

from collections.abc import Sequence

from lora_or_full.report.formatting import METRICS, counted, p_with, shown_interval, signed
from lora_or_full.report.render import Block, Points, Section, Text
from lora_or_full.report.stats import paired
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.stats.seeds_by_paragraphs import SeedByParagraphTest
from lora_or_full.report.study import Arm, Study, shown

LEVEL = 1 - paired.LEVEL  # of every test
# What the modes may have each for themselves.
OF_MODE = ("mode", "lr", "rank", "frozen_dtype", "lora")


def conclusion(study: Study, found: ArmComparison | None) -> Section:
    blocks: list[Block] = [Text(sentence) for sentence in explain(study, found)]
    if study.left_out:
        blocks += [Text("Left out of every figure below:"), Points(study.left_out)]
    return Section("What may be concluded", blocks)


def explain(study: Study, found: ArmComparison | None) -> list[str]:
    """What may be said of LoRA against full fine-tuning, and what may not."""
    if found is None:
        there = "; ".join(
            f"{arm.label} (seeds {', '.join(map(str, arm.runs))})" for arm in study.arms
        )
        return [
            f"There is nothing to compare LoRA with: the runs are of {there}. A comparison needs "
            "finished runs of mode=lora and mode=full with a seed in common, both with "
            "mask_prompt=true. What follows describes the runs that there are; it says nothing "
            "of LoRA against full fine-tuning."
        ]
    sentences = [
        f"{found.lora.label} is held against {found.full.label} over "
        f"{counted(len(found.seeds), 'seed')} ({', '.join(map(str, found.seeds))}) and "
        f"{len(found.lora.any.predictions):,} test questions. Where a mode has several "
        "configurations, the one with the best validation F1 was taken, among those with "
        "masked prompts that have the most seeds."
    ]
    sentences += _unlike(found)
    for metric, name in METRICS.items():
        joint = found.joint[metric]
        sentences.append(
            _alone(found, metric, name) if joint is None else _verdict(found, metric, name, joint)
        )
    return sentences


def _unlike(found: ArmComparison) -> list[str]:
    """What differs between the two besides the mode, which a reader has to know."""
    lora, full = found.lora, found.full
    sentences = [
        f"{arm.label} has seeds that the other has not ({', '.join(map(str, own))}): they are "
        "not in the comparison."
        for arm in (lora, full)
        if (own := sorted(arm.runs.keys() - set(found.seeds)))
    ]
    keys = lora.any.config.keys() | full.any.config.keys()
    differ = [
        f"{key} ({shown(lora.any.config.get(key))} and {shown(full.any.config.get(key))})"
        for key in sorted(keys)
        if key.partition(".")[0] not in OF_MODE
        and lora.any.config.get(key) != full.any.config.get(key)
    ]
    if differ:
        sentences.append(
            f"Beware: the two differ in more than the mode, in {', '.join(differ)}; so a "
            "difference of scores or cost may come from that."
        )
    if drawn := [
        seed
        for seed in found.seeds
        if lora.runs[seed].trained_on != full.runs[seed].trained_on
    ]:  # fmt: skip
        sentences.append(
            "Beware: the two were not trained on the same questions (seeds "
            f"{', '.join(map(str, drawn))})."
        )
    if apart := [
        what
        for what in ("machine", "cores", "packages", "commit")
        if _met(lora, found.seeds, what) != _met(full, found.seeds, what)
    ]:
        sentences.append(
            f"Beware: the two did not run under the same conditions ({', '.join(apart)}; see "
            "Provenance): their times are not to be compared, and scores may differ a little by it."
        )
    return sentences


def _met(arm: Arm, seeds: Sequence[int], what: str) -> set[str]:
    """The values of `what` in the environments of these runs."""
    return {str(arm.runs[seed].results["environment"][what]) for seed in seeds}


def _alone(found: ArmComparison, metric: str, name: str) -> str:
    own = found.over_questions[metric]
    why = (
        "with one seed nothing can be said of the two methods"
        if len(found.seeds) < 2
        else "with one paragraph nothing can be said of other questions"
        if own.paragraphs < 2
        else "the seeds and paragraphs differ in nothing, so no chance can be reckoned with"
    )
    interval = "" if own.interval is None else f", {shown_interval(own.interval)} over paragraphs"
    return (
        f"{name}: {why}. Of these very models, LoRA's {name} is {signed(own.mean)} points from "
        f"full's{interval}."
    )


def _verdict(found: ArmComparison, metric: str, name: str, joint: SeedByParagraphTest) -> str:
    margin = found.margin
    p, p_equivalent = found.holm["joint"][metric], found.holm["joint equivalence"][metric]
    lead = (
        f"{name}: LoRA's is {signed(joint.mean)} points from full's, 95 % interval over seeds and "
        f"paragraphs {shown_interval(joint.interval)}."
    )
    if p < LEVEL:
        side = "higher" if joint.mean > 0 else "lower"
        lead += f" It is {side} beyond chance ({p_with(p)} after Holm)."
        if p_equivalent < LEVEL:
            lead += f" Yet it is within ±{margin:g} points of it ({p_with(p_equivalent)})."
        return lead
    if p_equivalent < LEVEL:
        return (
            f"{lead} The two are equivalent within ±{margin:g} ({p_with(p_equivalent)} after Holm)."
        )
    paragraphs = found.over_questions[metric].paragraphs
    more = (
        f"about {counted(joint.seeds_needed, 'seed')} would find a difference of {margin:g} with "
        "a power of 80 %, not adjusted"
        if joint.seeds_needed is not None
        else f"not even {paired.MOST_SEEDS:,} seeds would find a difference of {margin:g} with "
        "a power of 80 %: more paragraphs would help"
    )
    return (
        f"{lead} Neither a difference ({p_with(p)} after Holm) nor equivalence within "
        f"±{margin:g} ({p_with(p_equivalent)}) can be claimed. With the spread found here and "
        f"{paragraphs:,} test paragraphs, {more}."
    )
