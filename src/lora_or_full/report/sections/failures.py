"""The section on wrong answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

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
    predictions, contexts = arms[0].any.predictions, arms[0].any.contexts
    total = len(predictions)
    runs = {arm.label: [run.predictions for run in arm.runs.values()] for arm in arms}
    classes = {
        label: [
            [failure_classes.failure(p, contexts[str(p["paragraph"])]) for p in run] for run in own
        ]
        for label, own in runs.items()
    }

    def by_group(groups: Sequence[str]) -> dict[str, list[failure_classes.Share]]:
        return {
            label: failure_classes.shares(groups, own, classes[label])
            for label, own in runs.items()
        }

    counts = {label: everything.classes for label, [everything] in by_group([""] * total).items()}
    met = [name for name in failure_classes.CLASSES if any(c[name] for c in counts.values())]
    colours = plots.colours(study)
    blocks: list[Block] = [
        Text("Every answer that is no exact match is in one class, the first that fits of: "
             "empty; never ended; extra words around a gold answer; part of a gold answer; "
             "context was cut; wrong span of the context; not in the context. Words are compared "
             "as the score compares them."),
        Table(["wrong answers per run", *runs],
              [[name, *(f"{c[name]:.1f} ({100 * c[name] / total:.1f} %)" for c in counts.values())]
               for name in failure_classes.CLASSES],
              f"Means over seeds, of {total:,} questions."),
        Figure("failures", plots.failures(counts, colours), "Wrong answers per run, by class."),
    ]  # fmt: skip
    groupings = {
        "question word": [failure_classes.question_word(p["question"]) for p in predictions],
        "words of the shortest gold answer": [failure_classes.answer_words(p) for p in predictions],
        "words of the context": [
            failure_classes.context_words(contexts[str(p["paragraph"])]) for p in predictions
        ],
    }
    for title, groups in groupings.items():
        rows = [
            [f"{share.group}, {label}", str(share.questions),
             f"{share.exact_match:.1f}", f"{share.f1:.1f}",
             *(f"{share.classes[name]:.1f}" for name in met)]
            for of_group in zip(*by_group(groups).values(), strict=True)
            for label, share in zip(runs, of_group, strict=True)
        ]  # fmt: skip
        blocks.append(Table([title, "questions", "EM, %", "F1, %", *met], rows))
    blocks.append(Text("The last columns of these tables count wrong answers per run, by class."))
    blocks.append(Text("Examples, of the first seed; gold answers are marked in the context:"))
    for arm in arms:
        blocks += _examples(arm)
    if found is not None:
        blocks += _disagreements(found)
    return Section("Failure cases", [*blocks, *_confidence(runs, colours)])


def _confidence(
    runs: Mapping[str, Sequence[Sequence[Prediction]]], colours: Mapping[str, str]
) -> list[Block]:
    """How well the probability of an answer says whether it is right."""
    bins, errors, curves, areas = {}, [], {}, []
    for label, own in runs.items():
        bins[label], error = failure_classes.calibration([p for run in own for p in run])
        errors.append(f"{label} {error:.1f} points")
        of_runs, area = zip(*map(failure_classes.risk_coverage, own), strict=True)
        curves[label] = [fmean(values) for values in zip(*of_runs, strict=True)]
        areas.append(f"{label} {fmean(area):.1f} %")
    return [
        Figure("calibration", plots.calibration(bins, colours),
               "How often an answer is right, by the probability that the model gave it "
               "(in tenths). On the dotted line the two are equal."),
        Text("The expected calibration error, over the answers of all seeds together: "
             f"{', '.join(errors)}."),
        Figure("coverage", plots.risk_coverage(curves, colours),
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
            blocks.append(
                _example(p, context, [f"answer: {p['prediction']}"], [f"{arm.label}, {name}"])
            )
    return blocks


def _disagreements(found: ArmComparison) -> list[Block]:
    """Questions that only one of the two models of the first seed answers exactly."""
    seed, labels = found.seeds[0], (found.adapter.label, found.full.label)
    runs = (found.adapter.runs[seed], found.full.runs[seed])
    pairs = list(zip(runs[0].predictions, runs[1].predictions, strict=True))
    blocks: list[Block] = []
    for better, name in enumerate(labels):
        differ = [
            pair for pair in pairs if pair[better]["exact_match"] > pair[1 - better]["exact_match"]
        ]
        blocks.append(Text(
            f"Where the modes disagree: {len(differ):,} of {len(pairs):,} questions (seed {seed}) "
            f"that only {name} answers exactly, for example:"
        ))  # fmt: skip
        for pair in differ[:EXAMPLES]:
            context = runs[0].contexts[str(pair[0]["paragraph"])]
            said = [f"{of}: {p['prediction']}" for of, p in zip(labels, pair, strict=True)]
            blocks.append(_example(pair[0], context, said))
    return blocks


def _example(
    p: Prediction, context: str, said: Sequence[str], title: Sequence[str] = ()
) -> Example:
    references = dict.fromkeys(p["answers"])
    marks = [span for text in references for span in spans(text, context)[:1]]
    lines = [*title, f"gold answer: {' / '.join(references)}", *said]
    return Example(p["question"], lines, context, marks)
