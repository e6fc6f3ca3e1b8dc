"""LoRA held against full fine-tuning: what differs, and what may be said of it."""

from dataclasses import dataclass

import numpy as np

from study import comparison, figures
from study.comparison import Discordant, Interval, Joint, OverQuestions, OverSeeds
from study.document import Block, Figure, Points, Section, Table, Text
from study.runs import Arm, Study
from study.wording import METRICS, NONE, counted, p_value, shown_interval, signed


@dataclass(frozen=True)
class Contrast:
    """The best arms of both modes, held against each other over the seeds that both have."""

    lora: Arm
    full: Arm
    margin: float
    seeds: list[int]
    over_seeds: dict[str, OverSeeds]
    over_questions: dict[str, OverQuestions]
    joint: dict[str, Joint | None]
    discordant: list[Discordant]


def contrast(study: Study, margin: float) -> Contrast | None:
    """None if a mode is missing, or the two have no seed in common."""
    lora, full = study.best("lora"), study.best("full")
    if lora is None or full is None:
        return None
    seeds = sorted(lora.runs.keys() & full.runs.keys())
    if not seeds:
        return None
    paragraphs = [p["paragraph"] for p in lora.any.predictions]
    apart = {
        metric: np.stack(
            [lora.runs[seed].scores(metric) - full.runs[seed].scores(metric) for seed in seeds]
        )
        for metric in METRICS
    }  # (seeds, questions) each
    return Contrast(
        lora,
        full,
        margin,
        seeds,
        {m: comparison.over_seeds(d.mean(axis=1), margin) for m, d in apart.items()},
        {m: comparison.over_questions(d, paragraphs) for m, d in apart.items()},
        {m: comparison.joint(d, paragraphs, margin) for m, d in apart.items()},
        [
            comparison.discordant(
                seed,
                lora.runs[seed].scores("exact_match"),
                full.runs[seed].scores("exact_match"),
            )
            for seed in seeds
        ],
    )


def conclusion(study: Study, found: Contrast | None) -> Section:
    blocks: list[Block] = [Text(sentence) for sentence in in_words(study, found)]
    if study.left_out:
        blocks += [Text("Left out of every figure below:"), Points(study.left_out)]
    return Section("What may be concluded", blocks)


def in_words(study: Study, found: Contrast | None) -> list[str]:
    """What may be said of LoRA against full fine-tuning, and what may not."""
    if found is None:
        there = ", ".join(arm.label for arm in study.arms)
        return [
            f"There is nothing to compare LoRA with: the runs are of {there}. A comparison needs "
            "finished runs of mode=lora and mode=full with a seed in common, both with "
            "mask_prompt=true."
        ]
    sentences = [
        f"{found.lora.label} is held against {found.full.label} over "
        f"{counted(len(found.seeds), 'seed')} ({', '.join(map(str, found.seeds))}) and "
        f"{len(found.lora.any.predictions):,} test questions. Where a mode has several "
        "configurations, the one with the best validation F1 was taken."
    ]
    alone = {
        arm.label: sorted(arm.runs.keys() - set(found.seeds)) for arm in (found.lora, found.full)
    }
    sentences += [
        f"{label} has seeds that the other has not ({', '.join(map(str, seeds))}): they are not "
        "in the comparison."
        for label, seeds in alone.items()
        if seeds
    ]
    p_values = [joint.p for joint in found.joint.values() if joint is not None]
    adjusted = iter(comparison.holm(p_values))
    for metric, name in METRICS.items():
        joint = found.joint[metric]
        sentences.append(
            _alone(found, metric, name)
            if joint is None
            else _verdict(found, metric, name, joint, next(adjusted))
        )
    return sentences


def _alone(found: Contrast, metric: str, name: str) -> str:
    own = found.over_questions[metric]
    return (
        f"{name}: with one seed (or seeds without any spread) nothing can be said of the two "
        f"methods. Of these very models, LoRA's {name} is {signed(own.mean)} points from full's, "
        f"{shown_interval(own.interval)} over other paragraphs of this kind."
    )


def _verdict(found: Contrast, metric: str, name: str, joint: Joint, p: float) -> str:
    margin, seeds = found.margin, found.over_seeds[metric]
    lead = (
        f"{name}: LoRA's is {signed(joint.mean)} points from full's, 95 % interval over seeds and "
        f"paragraphs {shown_interval(joint.interval)}."
    )
    if p < 1 - comparison.LEVEL:
        side = "higher" if joint.mean > 0 else "lower"
        lead += f" It is {side} beyond chance (p = {p_value(p)} after Holm)."
        if joint.p_equivalent < 1 - comparison.LEVEL:
            lead += (
                f" Yet it is within ±{margin:g} points of it (p = {p_value(joint.p_equivalent)})."
            )
        return lead
    if joint.p_equivalent < 1 - comparison.LEVEL:
        return (
            f"{lead} The two are equivalent within ±{margin:g} (p = {p_value(joint.p_equivalent)})."
        )
    more = (
        f"about {seeds.seeds_needed} seeds"
        if seeds.seeds_needed is not None
        else "more than 10,000 seeds"
    )
    return (
        f"{lead} Neither a difference (p = {p_value(p)} after Holm) nor equivalence within "
        f"±{margin:g} (p = {p_value(joint.p_equivalent)}) can be claimed. With the spread of "
        f"these seeds, {more} would find a difference of {margin:g} with a power of 80 %."
    )


def significance(study: Study, found: Contrast | None) -> Section | None:
    if found is None:
        return None
    margin = found.margin
    shown: list[tuple[str, float, Interval | None]] = []
    seeds_rows, question_rows, joint_rows = [], [], []
    adjusted = {
        test: iter(
            comparison.holm([p for m in METRICS if (p := _p_of(found, m, test)) is not None])
        )
        for test in ("t", "flip", "joint")
    }

    def both(metric: str, test: str) -> str:
        p = _p_of(found, metric, test)
        return NONE if p is None else f"{p_value(p)} ({p_value(next(adjusted[test]))})"

    for metric, name in METRICS.items():
        s, q, j = found.over_seeds[metric], found.over_questions[metric], found.joint[metric]
        shown += [
            (f"{name}, over seeds", s.mean, s.interval),
            (f"{name}, over paragraphs", q.mean, q.interval),
        ]
        seeds_rows.append([
            name, signed(s.mean), NONE if s.deviation is None else f"{s.deviation:.2f}",
            shown_interval(s.interval), both(metric, "t"), both(metric, "flip"),
            p_value(s.smallest_p),
            p_value(s.p_equivalent),
            NONE if s.seeds_needed is None else str(s.seeds_needed),
        ])  # fmt: skip
        question_rows.append([name, signed(q.mean), shown_interval(q.interval), str(q.paragraphs)])
        if j is not None:
            shown.append((f"{name}, over both", j.mean, j.interval))
            joint_rows.append([
                name, signed(j.mean), shown_interval(j.interval), both(metric, "joint"),
                p_value(j.p_equivalent), f"{j.degrees_of_freedom:.1f}",
                ", ".join(f"{100 * c:.1f} % with {n}" for n, c in j.coverage.items()),
            ])  # fmt: skip
    each = [
        [f"seed {seed}", *(signed(found.over_seeds[m].differences[n]) for m in METRICS)]
        for n, seed in enumerate(found.seeds)
    ]
    blocks: list[Block] = [
        Text(
            f"Every difference is {found.lora.label} minus {found.full.label}, in percentage "
            "points, paired by seed and question."
        ),
        Table(["", *METRICS.values()], each, "The difference of each seed."),
        Figure("differences", figures.differences(shown, margin),
               f"Differences with their 95 % intervals; the band is the margin of ±{margin:g}."),
        Text(
            "Over seeds: would the two methods differ if they were run again with other seeds, on "
            "these questions?"
        ),
        Table(["", "mean", "deviation", "95 % t interval", "p, t test (Holm)",
               "p, sign flips (Holm)", "smallest p", f"p, equivalent ±{margin:g}", "seeds needed"],
              seeds_rows,
              f"Two-sided tests. Smallest p: the least that sign flips of {len(found.seeds)} "
              "seeds can give. Equivalent: two one-sided t tests. Seeds needed: to find a "
              "difference of the margin with a power of 80 %."),
        Text(
            "Over questions: would these very models differ on other paragraphs of this kind? It "
            "says nothing of other seeds."
        ),
        Table(["", "mean", "95 % interval", "paragraphs"], question_rows,
              f"Percentile bootstrap, {comparison.RESAMPLES:,} resamples of whole paragraphs, "
              "the mean over seeds."),
        Table(["", "only LoRA right", "only full right", "p"],
              [[f"seed {d.seed}", str(d.first_only), str(d.second_only), p_value(d.p)]
               for d in found.discordant],
              "McNemar's exact test of EM, each pair of models. It takes questions as "
              "independent, though those of a paragraph are not quite."),
    ]  # fmt: skip
    if joint_rows:
        blocks += [
            Text("Over both: other seeds and other paragraphs at once, the question of this "
                 "report."),
            Table(["", "mean", "95 % interval", "p (Holm)", f"p, equivalent ±{margin:g}",
                   "degrees of freedom", "coverage"],
                  joint_rows,
                  "Two-way analysis of variance, seeds × paragraphs. Coverage: how often such "
                  f"an interval held the truth in {comparison.STUDIES:,} simulated studies with "
                  "the components of variance found here, by number of seeds."),
        ]  # fmt: skip
    return Section("Significance", blocks)


def _p_of(found: Contrast, metric: str, test: str) -> float | None:
    joint, seeds = found.joint[metric], found.over_seeds[metric]
    return {
        "t": seeds.p_t,
        "flip": seeds.p_sign_flip,
        "joint": None if joint is None else joint.p,
    }[test]
