"""The section on wrong answers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lora_or_full.evaluation.spans import spans
from lora_or_full.report import failure_classes, plots
from lora_or_full.report.render import Block, Example, Figure, Section, Table, Text
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Arm, Study
from lora_or_full.runs.schema import Prediction

EXAMPLES = 2  # of each class of failures
COVERAGES = (5, 10, 15, 20)  # twentieths that the table shows


def failure_cases(study: Study, found: ArmComparison | None) -> Section:
    """Write the section for the best arm of each mode."""
    arms = [arm for arm in study.compared() if arm] or study.arms[:2]
    contexts = arms[0].any.contexts
    runs = {arm.label: [run.predictions for run in arm.runs.values()] for arm in arms}
    classes = {
        label: [
            [failure_classes.failure(p, contexts[str(p["paragraph"])]) for p in run] for run in own
        ]
        for label, own in runs.items()
    }
    colours = plots.colours(arms)
    predictions = arms[0].any.predictions
    total = len(predictions)
    # All questions are one group here: (arm, class).
    counts = {
        label: failure_classes.shares([""] * total, own, classes[label])[0].classes
        for label, own in runs.items()
    }
    calibrated = {
        label: failure_classes.calibration(p for run in own for p in run)
        for label, own in runs.items()
    }
    blocks: list[Block] = [
        Text("Every answer that is no exact match is in one class, the first that fits of: "
             "empty; never ended; extra words around a gold answer; part of a gold answer; "
             "context was cut; "
             "wrong span of the context; not in the context. Words are compared as the score "
             "compares them."),
        Table(["wrong answers per run", *runs],
              [[name, *(f"{c[name]:.1f} ({100 * c[name] / total:.1f} %)" for c in counts.values())]
               for name in failure_classes.CLASSES],
              f"Means over seeds, of {total:,} questions."),
        Figure("failures", plots.failures(counts, colours), "Wrong answers per run, by class."),
    ]  # fmt: skip
    groupings: tuple[tuple[str, Callable[[Any], str]], ...] = (
        ("question word", lambda p: failure_classes.question_word(p["question"])),
        ("words of the shortest gold answer", failure_classes.answer_words),
        (
            "words of the context",
            lambda p: failure_classes.context_words(contexts[str(p["paragraph"])]),
        ),
    )
    for title, group_of in groupings:
        groups = [group_of(p) for p in predictions]
        shares = {
            label: failure_classes.shares(groups, own, classes[label])
            for label, own in runs.items()
        }
        met = [name for name in failure_classes.CLASSES if any(c[name] for c in counts.values())]
        rows = [
            [f"{share.group}, {label}", str(share.questions),
             f"{share.exact_match:.1f}", f"{share.f1:.1f}",
             *(f"{share.classes[name]:.1f}" for name in met)]
            for same in zip(*shares.values(), strict=True)
            for label, share in zip(shares, same, strict=True)
        ]  # fmt: skip
        blocks.append(Table([title, "questions", "EM, %", "F1, %", *met], rows))
    blocks.append(Text("The last columns of these tables count wrong answers per run, by class."))
    blocks.append(Text("Examples, of the first seed; gold answers are marked in the context:"))
    for arm in arms:
        blocks += _examples(arm)
    if found is not None:
        blocks += _disagreements(found)
    errors = ", ".join(f"{label} {error:.1f} points" for label, (_, error) in calibrated.items())
    blocks += [
        Figure("calibration",
               plots.calibration({k: bins for k, (bins, _) in calibrated.items()}, colours),
               "How often an answer is right, by the probability that the model gave it "
               "(in tenths). On the dotted line the two are equal."),
        Text(f"The expected calibration error, over the answers of all seeds together: {errors}."),
        *_coverage(runs, colours),
    ]  # fmt: skip
    return Section("Failure cases", blocks)


def _coverage(
    runs: Mapping[str, Sequence[Sequence[Prediction]]], colours: Mapping[str, str]
) -> list[Block]:
    """How well probability separates right answers from wrong ones."""
    curves, areas = {}, []
    for label, own in runs.items():
        of_runs, area = zip(*map(failure_classes.risk_coverage, own), strict=True)
        curves[label] = [fmean(values) for values in zip(*of_runs, strict=True)]
        areas.append(f"{label} {fmean(area):.1f} %")
    return [
        Figure("coverage", plots.coverage(curves, colours),
               "EM of the answers that a model is most confident of, by their share of all "
               "questions. Means over seeds."),
        Table(["EM of the most confident, %", *runs],
              [[f"{100 * share // failure_classes.STEPS} % of the answers",
                *(f"{curve[share - 1]:.1f}" for curve in curves.values())]
               for share in COVERAGES]),
        Text(f"The area under the risk-coverage curve: {', '.join(areas)}. Lower is better; "
             "answers in random order would have the share of all wrong answers."),
    ]  # fmt: skip


def _examples(arm: Arm) -> list[Block]:
    counted: Counter[str] = Counter()
    blocks: list[Block] = []
    for p in arm.any.predictions:
        context = arm.any.contexts[str(p["paragraph"])]
        name = failure_classes.failure(p, context)
        if name and counted[name] < EXAMPLES:
            counted[name] += 1
            lines = [
                f"{arm.label}, {name}",
                f"gold answer: {_golds(p)}",
                f"answer: {p['prediction']}",
            ]
            blocks.append(_example(p, lines, context))
    return blocks


def _disagreements(found: ArmComparison) -> list[Block]:
    seed = found.seeds[0]
    first, second = found.adapter.runs[seed], found.full.runs[seed]
    pairs = list(zip(first.predictions, second.predictions, strict=True))
    blocks: list[Block] = []
    for better, name in enumerate((found.adapter.label, found.full.label)):
        differ = [
            pair for pair in pairs if pair[better]["exact_match"] > pair[1 - better]["exact_match"]
        ]
        blocks.append(Text(
            f"Where the modes disagree: {len(differ):,} of {len(pairs):,} questions (seed {seed}) "
            f"that only {name} answers exactly, for example:"
        ))  # fmt: skip
        for pair in differ[:EXAMPLES]:
            lines = [
                f"gold answer: {_golds(pair[0])}",
                f"{found.adapter.label}: {pair[0]['prediction']}",
                f"{found.full.label}: {pair[1]['prediction']}",
            ]
            blocks.append(_example(pair[0], lines, first.contexts[str(pair[0]["paragraph"])]))
    return blocks


def _example(p: Prediction, lines: Sequence[str], context: str) -> Example:
    marks = [place for gold in dict.fromkeys(p["answers"]) for place in spans(gold, context)[:1]]
    return Example(p["question"], lines, context, marks)


def _golds(p: Prediction) -> str:
    return " / ".join(dict.fromkeys(p["answers"]))
