"""LoRA held against full fine-tuning: what differs, and what may be said of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from study import comparison, figures, over_both
from study.comparison import MOST_SEEDS, Discordant, Interval, OverQuestions, OverSeeds
from study.document import Block, Figure, Points, Section, Table, Text
from study.over_both import Joint
from study.runs import Arm, Study, shown
from study.wording import METRICS, NONE, counted, p_value, p_with, shown_interval, signed

LEVEL = 1 - comparison.LEVEL  # of every test
# What the modes may have each for themselves.
OF_MODE = ("mode", "lr", "rank", "frozen_dtype", "lora")
FEW = 20  # paragraphs, with which a percentile bootstrap's interval is too narrow


@dataclass(frozen=True)
class Contrast:
    """The best arms of both modes, held against each other over the seeds that both have.

    `holm` has the p values of each test by metric, adjusted for being of two metrics."""

    lora: Arm
    full: Arm
    margin: float
    seeds: list[int]
    over_seeds: dict[str, OverSeeds]
    over_questions: dict[str, OverQuestions]
    joint: dict[str, Joint | None]
    discordant: list[Discordant]
    holm: dict[str, dict[str, float]]


def contrast(study: Study, margin: float) -> Contrast | None:
    """None if a mode is missing, or the two have no seed in common."""
    lora, full = study.best("lora"), study.best("full")
    if lora is None or full is None:
        return None
    seeds = lora.shared_seeds(full)
    if not seeds:
        return None
    paragraphs = [p["paragraph"] for p in lora.any.predictions]
    apart = {metric: lora.minus(full, metric) for metric in METRICS}
    over_seeds = {m: comparison.over_seeds(d.mean(axis=1), margin) for m, d in apart.items()}
    joint = {m: over_both.joint(d, paragraphs, margin) for m, d in apart.items()}
    return Contrast(
        lora,
        full,
        margin,
        seeds,
        over_seeds,
        {m: comparison.over_questions(d, paragraphs) for m, d in apart.items()},
        joint,
        [
            comparison.discordant(
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
    return dict(zip(known, comparison.holm(list(known.values())), strict=True))


def conclusion(study: Study, found: Contrast | None) -> Section:
    blocks: list[Block] = [Text(sentence) for sentence in in_words(study, found)]
    if study.left_out:
        blocks += [Text("Left out of every figure below:"), Points(study.left_out)]
    return Section("What may be concluded", blocks)


def in_words(study: Study, found: Contrast | None) -> list[str]:
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


def _unlike(found: Contrast) -> list[str]:
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


def _alone(found: Contrast, metric: str, name: str) -> str:
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


def _verdict(found: Contrast, metric: str, name: str, joint: Joint) -> str:
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
        else f"not even {MOST_SEEDS:,} seeds would find a difference of {margin:g} with a power of "
        "80 %: more paragraphs would help"
    )
    return (
        f"{lead} Neither a difference ({p_with(p)} after Holm) nor equivalence within "
        f"±{margin:g} ({p_with(p_equivalent)}) can be claimed. With the spread found here and "
        f"{paragraphs:,} test paragraphs, {more}."
    )


def significance(found: Contrast | None) -> Section | None:
    if found is None:
        return None
    margin = found.margin
    drawn: list[tuple[str, float, Interval | None]] = []
    seeds_rows, question_rows, joint_rows = [], [], []

    def both(metric: str, test: str, p: float | None) -> str:
        return NONE if p is None else f"{p_value(p)} ({p_value(found.holm[test][metric])})"

    for metric, name in METRICS.items():
        s, q, j = found.over_seeds[metric], found.over_questions[metric], found.joint[metric]
        drawn += [
            (f"{name}, over seeds", s.mean, s.interval),
            (f"{name}, over paragraphs", q.mean, q.interval),
        ]
        seeds_rows.append([
            name, signed(s.mean), NONE if s.deviation is None else f"{s.deviation:.2f}",
            shown_interval(s.interval), both(metric, "t", s.p_t),
            both(metric, "sign flips", s.p_sign_flip), p_value(s.smallest_p),
            both(metric, "equivalence over seeds", s.p_equivalent), _seeds_needed(s),
        ])  # fmt: skip
        question_rows.append([name, signed(q.mean), shown_interval(q.interval), str(q.paragraphs)])
        if j is not None:
            drawn.append((f"{name}, over both", j.mean, j.interval))
            joint_rows.append([
                name, signed(j.mean), shown_interval(j.interval), both(metric, "joint", j.p),
                both(metric, "joint equivalence", j.p_equivalent), f"{j.degrees_of_freedom:.1f}",
                ", ".join(f"{100 * c:.1f} % with {n}" for n, c in j.coverage.items()),
                f"over {MOST_SEEDS:,}" if j.seeds_needed is None else str(j.seeds_needed),
            ])  # fmt: skip
    each = [
        [f"seed {seed}", *(signed(found.over_seeds[m].differences[n]) for m in METRICS)]
        for n, seed in enumerate(found.seeds)
    ]
    few = found.over_questions["f1"].paragraphs < FEW
    blocks: list[Block] = [
        Text(
            f"Every difference is {found.lora.label} minus {found.full.label}, in percentage "
            "points, paired by seed and question. Behind each p, in brackets, the one adjusted "
            "for testing both EM and F1 (Holm)."
        ),
        Table(["", *METRICS.values()], each, "The difference of each seed."),
        Figure("differences", figures.differences(drawn, margin),
               f"Differences with their 95 % intervals; the band is the margin of ±{margin:g}. "
               "(Equivalence at 5 % asks whether the 90 % interval lies within the band.)"),
        Text(
            "Over seeds: would the two methods differ if they were run again with other seeds, on "
            "these questions?"
        ),
        Table(["", "mean", "deviation", "95 % t interval", "p, t test", "p, sign flips",
               "smallest p", f"p, equivalent ±{margin:g}", "seeds needed"],
              seeds_rows,
              f"Two-sided tests. Smallest p: the least that sign flips of "
              f"{counted(len(found.seeds), 'seed')} can give. Equivalent: two one-sided t tests. "
              "Seeds needed: to find a difference of the margin with a power of 80 %."),
        Text(
            "Over questions: would these very models differ on other paragraphs of this kind? It "
            "says nothing of other seeds."
        ),
        Table(["", "mean", "95 % interval", "paragraphs"], question_rows,
              f"Percentile bootstrap, {comparison.RESAMPLES:,} resamples of whole paragraphs, "
              "the mean over seeds."
              + (" So few paragraphs make such an interval too narrow." if few else "")),
        Table(["", "only LoRA right", "only full right", "p"],
              [[f"seed {d.seed}", str(d.first_only), str(d.second_only), p_value(d.p)]
               for d in found.discordant],
              "McNemar's exact test of EM, each pair of models by itself (not adjusted for being "
              "several). It takes questions as independent, though those of a paragraph are not "
              "quite."),
    ]  # fmt: skip
    if joint_rows:
        blocks += [
            Text("Over both: other seeds and other paragraphs at once, the question of this "
                 "report."),
            Table(["", "mean", "95 % interval", "p", f"p, equivalent ±{margin:g}",
                   "degrees of freedom", "coverage", "seeds needed"],
                  joint_rows,
                  "Two-way analysis of variance, seeds × paragraphs. Coverage: how often such "
                  f"an interval held the truth in {over_both.STUDIES:,} simulated studies with "
                  "the components of variance found here, by number of seeds. Seeds needed: as "
                  "above, on so many paragraphs."),
        ]  # fmt: skip
    return Section("Significance", blocks)


def _seeds_needed(own: OverSeeds) -> str:
    if own.p_t is None:
        return NONE
    needed = own.seeds_needed
    return f"over {comparison.MOST_SEEDS:,}" if needed is None else str(needed)
