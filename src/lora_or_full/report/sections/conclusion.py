"""What may be concluded, in words, and what may not."""

from collections.abc import Sequence

from lora_or_full.report.formatting import METRICS, counted, p_with, shown_interval
from lora_or_full.report.render import Block, Points, Section, Text
from lora_or_full.report.stats import paired
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.stats.seeds_by_paragraphs import SeedByParagraphTest
from lora_or_full.report.study import Arm, Study, shown

LEVEL = 1 - paired.LEVEL  # of every test
OF_MODE = ("mode", "lr", "rank", "frozen_dtype", "adapter")  # keys in which modes differ by design


def conclusion(study: Study, found: ArmComparison | None) -> Section:
    """Write the section that the report begins with."""
    blocks: list[Block] = [Text(sentence) for sentence in sentences(study, found)]
    if study.left_out:
        blocks += [Text("Left out of every figure below:"), Points(study.left_out)]
    return Section("What may be concluded", blocks)


def sentences(study: Study, found: ArmComparison | None) -> list[str]:
    """Say what may be concluded from the comparison, and what may not."""
    if found is None:
        there = "; ".join(
            f"{arm.label} (seeds {', '.join(map(str, arm.runs))})" for arm in study.arms
        )
        return [
            f"There is nothing to compare: the runs are of {there}. A comparison needs finished "
            "runs of a mode with an adapter and of full fine-tuning that have a seed in common, "
            "both with mask_prompt=true. What follows describes these runs; it says nothing about "
            "LoRA against full fine-tuning."
        ]
    said = [
        f"{found.adapter.label} is compared with {found.full.label} over "
        f"{counted(len(found.seeds), 'seed')} ({', '.join(map(str, found.seeds))}) and "
        f"{len(found.adapter.any.predictions):,} test questions. If a mode has several "
        "configurations, this is the one with the best validation F1 among those with masked "
        "prompts that have the most seeds."
    ]
    said += _caveats(found)
    for metric, name in METRICS.items():
        test = found.over_both[metric]
        said.append(
            _one_sample(found, metric, name)
            if test is None
            else _verdict(found, metric, name, test)
        )
    return said


def _caveats(found: ArmComparison) -> list[str]:
    """What differs between the two arms besides the mode."""
    adapter, full = found.adapter, found.full
    said = [
        f"{arm.label} has seeds that the other does not have ({', '.join(map(str, own))}): they "
        "are not in the comparison."
        for arm in (adapter, full)
        if (own := sorted(arm.runs.keys() - set(found.seeds)))
    ]
    one, other = adapter.any.config, full.any.config
    differ = [
        f"{key} ({shown(one.get(key))} and {shown(other.get(key))})"
        for key in sorted(one.keys() | other.keys())
        if key.partition(".")[0] not in OF_MODE and one.get(key) != other.get(key)
    ]
    if differ:
        said.append(
            f"Beware: the two differ in more than the mode: in {', '.join(differ)}. A difference "
            "in scores or cost may come from that."
        )
    if drawn := [
        seed for seed in found.seeds if adapter.runs[seed].trained_on != full.runs[seed].trained_on
    ]:
        said.append(
            "Beware: the two were not trained on the same questions (seeds "
            f"{', '.join(map(str, drawn))})."
        )
    if conditions := [
        what
        for what in ("machine", "cores", "packages", "commit")
        if _met(adapter, found.seeds, what) != _met(full, found.seeds, what)
    ]:
        said.append(
            f"Beware: the two ran under different conditions ({', '.join(conditions)}; see "
            "Provenance). Their times can't be compared, and scores may differ a little for it."
        )
    return said


def _met(arm: Arm, seeds: Sequence[int], what: str) -> set[str]:
    """Values of a field in the environments of these runs."""
    return {str(getattr(arm.runs[seed].record.environment, what)) for seed in seeds}


def _points(found: ArmComparison, name: str, mean: float) -> str:
    """A difference as a sentence: who scores how much lower or higher."""
    side = "higher" if mean > 0 else "lower"
    return (
        f"{found.adapter.label} scores {abs(mean):.2f} {name} points {side} than {found.full.label}"
    )


def _one_sample(found: ArmComparison, metric: str, name: str) -> str:
    own = found.over_paragraphs[metric]
    why = (
        "with one seed nothing can be said about the two methods"
        if len(found.seeds) < 2
        else "with one paragraph nothing can be said about other questions"
        if own.paragraphs < 2
        else "seeds and paragraphs do not vary, so nothing can be said about chance"
    )
    interval = "" if own.interval is None else f", 95 % interval {shown_interval(own.interval)}"
    over = "" if own.interval is None else " over paragraphs"
    return (
        f"{name}: {why}. For these very models, {_points(found, name, own.mean)}{interval}{over}."
    )


def _verdict(found: ArmComparison, metric: str, name: str, test: SeedByParagraphTest) -> str:
    margin = found.margin
    p = found.holm["over both"][metric]
    p_equivalent = found.holm["equivalence over both"][metric]
    lead = (
        f"{name}: {_points(found, name, test.mean)}, 95 % interval over seeds and paragraphs "
        f"{shown_interval(test.interval)}."
    )
    if p < LEVEL:
        lead += f" The difference is significant ({p_with(p)} after Holm)."
        if p_equivalent < LEVEL:
            lead += f" Yet it is within ±{margin:g} points ({p_with(p_equivalent)})."
        return lead
    if p_equivalent < LEVEL:
        return (
            f"{lead} The two are equivalent within ±{margin:g} ({p_with(p_equivalent)} after Holm)."
        )
    paragraphs = found.over_paragraphs[metric].paragraphs
    more = (
        f"about {counted(test.seeds_needed, 'seed')} would find a difference of {margin:g} with "
        "a power of 80 %, not adjusted"
        if test.seeds_needed is not None
        else f"not even {paired.MOST_SEEDS:,} seeds would find a difference of {margin:g} with a "
        "power of 80 %: more paragraphs would help"
    )
    return (
        f"{lead} Neither a difference ({p_with(p)} after Holm) nor equivalence within "
        f"±{margin:g} ({p_with(p_equivalent)}) can be claimed. With the spread found here and "
        f"{paragraphs:,} test paragraphs, {more}."
    )
