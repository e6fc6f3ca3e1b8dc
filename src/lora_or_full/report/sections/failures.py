"""The section on wrong answers."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from lora_or_full.evaluation.spans import pieces, spans
from lora_or_full.report import failure_classes, plots
from lora_or_full.report.failure_classes import CLASSES
from lora_or_full.report.render import Example, Section, section
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Arm, Study
from lora_or_full.runs.schema import Prediction

EXAMPLES = 2  # of each class of failures


def failure_cases(study: Study, found: ArmComparison | None) -> Section:
    """Write the section for the best arm of each mode."""
    arms = [arm for arm in study.compared() if arm] or study.arms[:2]
    predictions = arms[0].any.predictions
    contexts = [arms[0].any.contexts[str(p["paragraph"])] for p in predictions]
    runs = {arm.label: [run.predictions for run in arm.runs.values()] for arm in arms}
    classes = {
        label: [list(map(failure_classes.failure, run, contexts)) for run in own]
        for label, own in runs.items()
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
        "words of the shortest gold answer": list(map(failure_classes.answer_words, predictions)),
        "words of the context": list(map(failure_classes.context_words, contexts)),
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
        examples=[example for arm in arms for example in _examples(arm)],
        seed=found and found.seeds[0],
        disagreements=_disagreements(found) if found else [],
        calibration_plot=plots.calibration(bins, colours),
        errors=errors,
        coverage_plot=plots.risk_coverage(curves, colours),
        curves=curves,
        areas=areas,
    )


def _examples(arm: Arm) -> list[Example]:
    """The first failures of each class."""
    counted: Counter[str] = Counter()
    examples = []
    for p in arm.any.predictions:
        context = arm.any.contexts[str(p["paragraph"])]
        name = failure_classes.failure(p, context)
        if name and counted[name] < EXAMPLES:
            counted[name] += 1
            said = [f"answer: {p['prediction']}"]
            examples.append(_example(p, context, said, [f"{arm.label}, {name}"]))
    return examples


def _disagreements(found: ArmComparison) -> list[tuple[str, int, list[Example]]]:
    """Questions that only one of the two models of the first seed answers exactly."""
    arms = (found.adapter, found.full)
    runs = [arm.runs[found.seeds[0]] for arm in arms]
    pairs = list(zip(*(run.predictions for run in runs), strict=True))
    disagreements = []
    for better, arm in enumerate(arms):
        differ = [
            pair for pair in pairs if pair[better]["exact_match"] > pair[1 - better]["exact_match"]
        ]
        examples = [
            _example(
                pair[0],
                runs[0].contexts[str(pair[0]["paragraph"])],
                [f"{of.label}: {p['prediction']}" for of, p in zip(arms, pair, strict=True)],
            )
            for pair in differ[:EXAMPLES]
        ]
        disagreements.append((arm.label, len(differ), examples))
    return disagreements


def _example(
    p: Prediction, context: str, said: Sequence[str], title: Sequence[str] = ()
) -> Example:
    references = dict.fromkeys(p["answers"])
    marks = [span for text in references for span in spans(text, context)[:1]]
    lines = [*title, f"gold answer: {' / '.join(references)}", *said]
    return Example(p["question"], lines, pieces(context, marks))
