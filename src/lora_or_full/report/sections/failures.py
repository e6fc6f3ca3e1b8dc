"""The section on wrong answers."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from statistics import fmean

from lora_or_full.evaluation.spans import pieces, spans
from lora_or_full.report import failure_classes, plots
from lora_or_full.report.failure_classes import CLASSES
from lora_or_full.report.render import Example, Section, section
from lora_or_full.report.stats.comparison import ArmComparison, Comparison
from lora_or_full.report.study import Arm, Study
from lora_or_full.runs.schema import Prediction

EXAMPLES = 2  # of each class of failures


def failure_cases(study: Study, found: Comparison | None) -> Section:
    """Write the section for the arms that are compared, or else the first two."""
    arms = found.arms if found else study.arms[:2]
    named: set[str] = set()  # questions shown so far: each serves once
    predictions = arms[0].any.predictions
    contexts = [arms[0].any.contexts[str(p["paragraph"])] for p in predictions]
    runs = {arm.label: [run.predictions for run in arm.runs.values()] for arm in arms}
    scoring = arms[0].any.record.config.scoring
    failure = partial(failure_classes.failure, scoring=scoring)
    classes = {
        label: [list(map(failure, run, contexts)) for run in own] for label, own in runs.items()
    }

    def by_group(groups: Sequence[str]) -> dict[str, list[failure_classes.Share]]:
        return {
            label: failure_classes.shares(groups, own, classes[label])
            for label, own in runs.items()
        }

    everything = by_group([""] * len(predictions))
    counts = {label: share.classes for label, [share] in everything.items()}
    groupings = {
        "question word": [failure_classes.question_word(p["question"]) for p in predictions],
        "words of the shortest gold answer": [
            failure_classes.answer_words(p, scoring) for p in predictions
        ],
        "words of the context": [failure_classes.context_words(c, scoring) for c in contexts],
    }
    colours = plots.colours(study)
    bins, errors, curves, areas = {}, {}, {}, {}
    for label, own in runs.items():
        bins[label], errors[label] = failure_classes.calibration([p for run in own for p in run])
        of_runs, area = zip(*map(failure_classes.risk_coverage, own), strict=True)
        curves[label] = [fmean(values) for values in zip(*of_runs, strict=True)]
        areas[label] = fmean(area)
    return section(
        "failures",
        questions=len(predictions),
        counts=counts,
        classes=CLASSES,
        met=[name for name in CLASSES if any(count[name] for count in counts.values())],
        plot=plots.failures(counts, colours),
        groupings={
            name: list(zip(*by_group(groups).values(), strict=True))
            for name, groups in groupings.items()
        },
        examples=_examples(arms, named),
        disagreements=[
            one for pair in found.pairs for one in _disagreements(pair, named, len(arms))
        ]
        if found
        else [],
        calibration_plot=plots.calibration(bins, colours),
        errors=errors,
        coverage_plot=plots.risk_coverage(curves, colours),
        curves=curves,
        areas=areas,
    )


def _examples(arms: Sequence[Arm], named: set[str]) -> list[Example]:
    """The first failures of each class: EXAMPLES of each of two arms, no more of several."""
    counted: Counter[str] = Counter()
    examples = []
    for number, arm in enumerate(arms, 1):
        for p in arm.any.predictions:
            context = arm.any.contexts[str(p["paragraph"])]
            name = failure_classes.failure(p, context, arm.any.record.config.scoring)
            if name and p["id"] not in named and counted[name] < EXAMPLES * min(number, 2):
                counted[name] += 1
                named.add(p["id"])
                said = [f"answer: {p['prediction']}"]
                examples.append(_example(p, context, said, [f"{arm.label}, {name}"]))
    return examples


def _disagreements(
    pair: ArmComparison, named: set[str], arms: int
) -> list[tuple[str, str, int, int, list[Example]]]:
    """Questions that only one of two models of the first seed answers exactly.

    Returns:
        For each arm of the pair: its label, that of the other, the seed, the number of questions,
        and the first ones as examples.
    """
    seed = pair.seeds[0]
    runs = [arm.runs[seed] for arm in pair.arms]
    answers = list(zip(*(run.predictions for run in runs), strict=True))
    disagreements = []
    for better, arm in enumerate(pair.arms):
        differ = [
            both
            for both in answers
            if both[better]["exact_match"] > both[1 - better]["exact_match"]
        ]
        new = [both for both in differ if both[0]["id"] not in named]
        chosen = new[: EXAMPLES if arms == 2 else 1]
        named.update(both[0]["id"] for both in chosen)
        examples = [
            _example(
                both[0],
                runs[0].contexts[str(both[0]["paragraph"])],
                [f"{of.label}: {p['prediction']}" for of, p in zip(pair.arms, both, strict=True)],
            )
            for both in chosen
        ]
        other = pair.arms[1 - better].label
        disagreements.append((arm.label, other, seed, len(differ), examples))
    return disagreements


def _example(
    p: Prediction, context: str, said: Sequence[str], title: Sequence[str] = ()
) -> Example:
    references = dict.fromkeys(p["answers"])
    marks = [span for text in references for span in spans(text, context)[:1]]
    lines = [*title, f"gold answer: {' / '.join(references)}", *said]
    return Example(p["question"], lines, pieces(context, marks))
