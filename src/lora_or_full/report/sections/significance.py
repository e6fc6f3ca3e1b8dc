"""The section on significance: tests over seeds, over paragraphs, and over both."""

from lora_or_full.report import plots
from lora_or_full.report.formatting import METRICS, NONE, counted, p_value, shown_interval, signed
from lora_or_full.report.render import Block, Figure, Section, Table, Text
from lora_or_full.report.stats import paired, seeds_by_paragraphs
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.stats.paired import Interval

FEW = 20  # paragraphs, with which the interval of a percentile bootstrap is too narrow


def significance(found: ArmComparison | None) -> Section | None:
    """Write the section; None if there is nothing to compare."""
    if found is None:
        return None
    margin, names = found.margin, (found.adapter.label, found.full.label)
    drawn: list[tuple[str, float, Interval | None]] = []
    seed_rows, paragraph_rows, joint_rows = [], [], []

    def adjusted(metric: str, test: str, p: float | None) -> str:
        return NONE if p is None else f"{p_value(p)} ({p_value(found.holm[test][metric])})"

    for metric, name in METRICS.items():
        s, q, j = found.over_seeds[metric], found.over_paragraphs[metric], found.over_both[metric]
        drawn += [
            (f"{name}, over seeds", s.mean, s.interval),
            (f"{name}, over paragraphs", q.mean, q.interval),
        ]
        seed_rows.append([
            name, signed(s.mean), NONE if s.deviation is None else f"{s.deviation:.2f}",
            shown_interval(s.interval), adjusted(metric, "t", s.p_t),
            adjusted(metric, "sign flips", s.p_sign_flip), p_value(s.smallest_p),
            adjusted(metric, "equivalence over seeds", s.p_equivalent),
            NONE if s.p_t is None else _needed(s.seeds_needed),
        ])  # fmt: skip
        paragraph_rows.append([name, signed(q.mean), shown_interval(q.interval), str(q.paragraphs)])
        if j is not None:
            drawn.append((f"{name}, over both", j.mean, j.interval))
            joint_rows.append([
                name, signed(j.mean), shown_interval(j.interval),
                adjusted(metric, "over both", j.p),
                adjusted(metric, "equivalence over both", j.p_equivalent),
                f"{j.degrees_of_freedom:.1f}",
                ", ".join(f"{100 * c:.1f} % with {n}" for n, c in j.coverage.items()),
                _needed(j.seeds_needed),
            ])  # fmt: skip
    each = [
        [f"seed {seed}", *(signed(found.over_seeds[m].differences[n]) for m in METRICS)]
        for n, seed in enumerate(found.seeds)
    ]
    few = found.over_paragraphs["f1"].paragraphs < FEW
    blocks: list[Block] = [
        Text(f"Every difference is {names[0]} minus {names[1]}, in percentage points, paired by "
             "seed and question. Each p is followed, in brackets, by the one adjusted for testing "
             "both EM and F1 (Holm)."),
        Table(["", *METRICS.values()], each, "The difference of each seed."),
        Figure("differences", plots.differences(drawn, margin, names),
               f"Differences with their 95 % intervals; the band is the margin of ±{margin:g}. "
               "(Equivalence at 5 % asks whether the 90 % interval lies within the band.)"),
        Text("Over seeds: would the two methods differ if they were run again with other seeds, on "
             "the same questions?"),
        Table(["", "mean", "deviation", "95 % t interval", "p, t test", "p, sign flips",
               "smallest p", f"p, equivalent ±{margin:g}", "seeds needed"],
              seed_rows,
              f"Two-sided tests. Smallest p: the smallest that sign flips of "
              f"{counted(len(found.seeds), 'seed')} can give. Equivalent: two one-sided t tests. "
              "Seeds needed: to find a difference of the margin with a power of 80 %."),
        Text("Over paragraphs: would these very models differ on other paragraphs of this kind? "
             "This says nothing about other seeds."),
        Table(["", "mean", "95 % interval", "paragraphs"], paragraph_rows,
              f"Percentile bootstrap, {paired.RESAMPLES:,} resamples of whole paragraphs, the mean "
              f"over seeds.{' With so few paragraphs this interval is too narrow.' * few}"),
        Table(["", f"only {names[0]} right", f"only {names[1]} right", "p"],
              [[f"seed {d.seed}", str(d.first_only), str(d.second_only), p_value(d.p)]
               for d in found.mcnemar],
              "McNemar's exact test of EM for each pair of models (not adjusted for testing "
              "several). It treats questions as independent, though those of a paragraph are not "
              "quite."),
    ]  # fmt: skip
    if joint_rows:
        blocks += [
            Text("Over both: would the methods differ with other seeds on other paragraphs? This "
                 "is the question of this report."),
            Table(["", "mean", "95 % interval", "p", f"p, equivalent ±{margin:g}",
                   "degrees of freedom", "coverage", "seeds needed"],
                  joint_rows,
                  "Two-way analysis of variance, seeds × paragraphs. Coverage: how often such an "
                  f"interval holds the truth in {seeds_by_paragraphs.STUDIES:,} simulated studies "
                  "with the variance components estimated here, by number of seeds. Seeds needed: "
                  "as above, on as many paragraphs."),
        ]  # fmt: skip
    return Section("Significance", blocks)


def _needed(seeds: int | None) -> str:
    return f"over {paired.MOST_SEEDS:,}" if seeds is None else str(seeds)
