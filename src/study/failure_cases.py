"""The report's section on wrong answers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from study import failures, figures
from study.document import Block, Example, Figure, Section, Table, Text
from study.runs import Arm, Study
from study.verdict import Contrast

EXAMPLES = 2  # of each class of failures


def failure_cases(study: Study, found: Contrast | None, contexts: Mapping[str, str]) -> Section:
    arms = [arm for arm in (study.best("lora"), study.best("full")) if arm] or study.arms[:2]
    runs = {arm.label: [run.predictions for run in arm.runs.values()] for arm in arms}
    colours = figures.colours(arms)
    counts = {label: failures.counts(own, contexts) for label, own in runs.items()}
    total = len(arms[0].any.predictions)
    calibrated = {
        label: failures.calibration(p for run in own for p in run) for label, own in runs.items()
    }
    blocks: list[Block] = [
        Text("Every answer that is no exact match is in one class, the first that fits of: "
             "empty; never ended; extra words around a gold; part of a gold; context was cut; "
             "wrong span of the context; not in the context. Words are compared as the score "
             "compares them."),
        Table(["wrong answers a run", *runs],
              [[name, *(f"{c[name]:.1f} ({100 * c[name] / total:.1f} %)" for c in counts.values())]
               for name in failures.CLASSES],
              f"Means over seeds, of {total:,} questions."),
        Figure("failures", figures.failures(counts, colours), "Wrong answers a run, by class."),
    ]  # fmt: skip
    predictions = arms[0].any.predictions
    groupings: tuple[tuple[str, Callable[[Any], str]], ...] = (
        ("question word", lambda p: failures.question_word(p["question"])),
        ("words of the shortest gold", failures.answer_words),
        ("words of the context", lambda p: failures.context_words(contexts[str(p["paragraph"])])),
    )
    for title, group_of in groupings:
        groups = [group_of(p) for p in predictions]
        shares = [failures.shares(groups, own) for own in runs.values()]
        rows = [
            [same[0].group, str(same[0].questions),
             *(f"{s.exact_match:.1f} / {s.f1:.1f}" for s in same)]
            for same in zip(*shares, strict=True)
        ]  # fmt: skip
        blocks.append(Table([title, "questions", *(f"{label}, EM / F1" for label in runs)], rows))
    blocks.append(Text("Examples, of the first seed:"))
    for arm in arms:
        blocks += _examples(arm, contexts)
    if found is not None:
        blocks += _disagreements(found, contexts)
    errors = ", ".join(f"{label} {error:.1f} points" for label, (_, error) in calibrated.items())
    blocks += [
        Figure("calibration",
               figures.calibration({k: bins for k, (bins, _) in calibrated.items()}, colours),
               "How often an answer is right, by the probability that the model gave it "
               "(tenths); on the dotted line it is as sure as it is right."),
        Text(f"The expected calibration error: {errors}."),
    ]  # fmt: skip
    return Section("Failure cases", blocks)


def _examples(arm: Arm, contexts: Mapping[str, str]) -> list[Block]:
    shown: Counter[str] = Counter()
    blocks: list[Block] = []
    for p in arm.any.predictions:
        context = contexts[str(p["paragraph"])]
        name = failures.failure(p, context)
        if name and shown[name] < EXAMPLES:
            shown[name] += 1
            lines = [f"{arm.label}, {name}", f"gold: {_golds(p)}", f"answer: {p['prediction']}"]
            blocks.append(_example(p, lines, context))
    return blocks


def _disagreements(found: Contrast, contexts: Mapping[str, str]) -> list[Block]:
    seed = found.seeds[0]
    pairs = list(
        zip(found.lora.runs[seed].predictions, found.full.runs[seed].predictions, strict=True)
    )
    blocks: list[Block] = [Text(f"Where the two modes disagree (seed {seed}):")]
    for better in (0, 1):
        apart = [
            pair for pair in pairs if pair[better]["exact_match"] > pair[1 - better]["exact_match"]
        ]
        for pair in apart[:EXAMPLES]:
            lines = [
                f"gold: {_golds(pair[0])}",
                f"{found.lora.label}: {pair[0]['prediction']}",
                f"{found.full.label}: {pair[1]['prediction']}",
            ]
            blocks.append(_example(pair[0], lines, contexts[str(pair[0]["paragraph"])]))
    return blocks


def _example(p: Mapping[str, Any], lines: Sequence[str], context: str) -> Example:
    marks = [
        (start, start + len(gold))
        for gold in dict.fromkeys(p["answers"])
        if gold and (start := context.find(gold)) >= 0
    ]
    return Example(p["question"], lines, context, marks)


def _golds(p: Mapping[str, Any]) -> str:
    return " / ".join(dict.fromkeys(p["answers"]))
