"""What may be concluded, in words, and what may not."""

from lora_or_full.report.formatting import METRICS, counted, p_with, shown_interval
from lora_or_full.report.render import Block, Points, Section, Text
from lora_or_full.report.stats import paired
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.stats.seeds_by_paragraphs import SeedByParagraphTest
from lora_or_full.report.study import Study, shown

LEVEL = 1 - paired.LEVEL  # of every test
OF_MODE = ("mode", "lr", "rank", "frozen_dtype", "adapter")  # keys in which modes differ by design


def conclusion(study: Study, found: ArmComparison | None) -> Section:
    """Write the section that the report begins with."""
    if found is None:
        runs = "; ".join(
            f"{arm.label} (seeds {', '.join(map(str, arm.runs))})" for arm in study.arms
        )
        said = [
            f"There is nothing to compare: the runs are of {runs}. A comparison needs finished "
            "runs of a mode with an adapter and of full fine-tuning that have a seed in common, "
            "both with mask_prompt=true. What follows describes these runs; it says nothing about "
            "LoRA against full fine-tuning."
        ]
    else:
        said = [_subject(found), *_caveats(found), *(_verdict(found, m) for m in METRICS)]
    blocks: list[Block] = [Text(sentence) for sentence in said]
    if study.left_out:
        blocks += [Text("Left out of every figure below:"), Points(study.left_out)]
    return Section("What may be concluded", blocks)


def _subject(found: ArmComparison) -> str:
    return (
        f"{found.adapter.label} is compared with {found.full.label} over "
        f"{counted(len(found.seeds), 'seed')} ({', '.join(map(str, found.seeds))}) and "
        f"{len(found.adapter.any.predictions):,} test questions. If a mode has several "
        "configurations, this is the one with the best validation F1 among those with masked "
        "prompts that have the most seeds."
    )


def _caveats(found: ArmComparison) -> list[str]:
    """What differs between the two arms besides the mode."""
    arms = (found.adapter, found.full)
    said = [
        f"{arm.label} has seeds that the other does not have ({', '.join(map(str, own))}): they "
        "are not in the comparison."
        for arm in arms
        if (own := sorted(arm.runs.keys() - set(found.seeds)))
    ]
    one, other = (arm.any.config for arm in arms)
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
    records = [[arm.runs[seed].record for seed in found.seeds] for arm in arms]
    drawn = [
        str(seed)
        for seed, own, full in zip(found.seeds, *records, strict=True)
        if own.data.train.fingerprint != full.data.train.fingerprint
    ]
    if drawn:
        said.append(
            f"Beware: the two were not trained on the same questions (seeds {', '.join(drawn)})."
        )
    conditions = [
        what
        for what in ("machine", "cores", "packages", "commit")
        if len({frozenset(str(getattr(r.environment, what)) for r in own) for own in records}) > 1
    ]
    if conditions:
        said.append(
            f"Beware: the two ran under different conditions ({', '.join(conditions)}; see "
            "Provenance). Their times can't be compared, and scores may differ a little for it."
        )
    return said


def _verdict(found: ArmComparison, metric: str) -> str:
    """What a metric says about the two methods, or why it says nothing."""
    name, test, models = METRICS[metric], found.over_both[metric], found.over_paragraphs[metric]
    side = "higher" if models.mean > 0 else "lower"
    apart = f"{abs(models.mean):.2f} points {side} than" if round(models.mean, 2) else "as high as"
    points = f"{found.adapter.label} scores {apart} {found.full.label}"
    if test is not None:
        return (
            f"{name}: {points}, 95 % interval over seeds and paragraphs "
            f"{shown_interval(test.interval)}. {_tested(found, metric, test)}"
        )
    why = (
        "with one seed nothing can be said about the two methods"
        if len(found.seeds) < 2
        else "with one paragraph nothing can be said about other questions"
        if models.paragraphs < 2
        else "seeds and paragraphs do not vary, so nothing can be said about chance"
    )
    if models.interval is not None:
        points += f", 95 % interval {shown_interval(models.interval)} over paragraphs"
    return f"{name}: {why}. For these very models, {points}."


def _tested(found: ArmComparison, metric: str, test: SeedByParagraphTest) -> str:
    """Whether the two methods differ significantly, are equivalent, or neither is shown."""
    margin = f"±{found.margin:g}"
    p = found.holm["over both"][metric]
    p_equivalent = found.holm["equivalence over both"][metric]
    if p < LEVEL:
        said = f"The difference is significant ({p_with(p)} after Holm)."
        if p_equivalent < LEVEL:
            said += f" Yet it is within {margin} points ({p_with(p_equivalent)})."
        return said
    if p_equivalent < LEVEL:
        return f"The two are equivalent within {margin} ({p_with(p_equivalent)} after Holm)."
    find = f"would find a difference of {found.margin:g} with a power of 80 %"
    more = (
        f"about {counted(test.seeds_needed, 'seed')} {find}, not adjusted"
        if test.seeds_needed is not None
        else f"not even {paired.MOST_SEEDS:,} seeds {find}: more paragraphs would help"
    )
    return (
        f"Neither a difference ({p_with(p)} after Holm) nor equivalence within {margin} "
        f"({p_with(p_equivalent)}) can be claimed. With the spread found here and "
        f"{found.over_paragraphs[metric].paragraphs:,} test paragraphs, {more}."
    )
