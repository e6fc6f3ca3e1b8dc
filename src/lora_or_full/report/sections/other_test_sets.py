"""The section on other test sets than the runs' own."""

from collections.abc import Iterable, Mapping
from statistics import fmean

from lora_or_full.errors import UserError
from lora_or_full.report.formatting import counted, signed, spread
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats.comparison import Comparison
from lora_or_full.report.stats.paired import Interval, mean_over_seeds, paragraph_bootstrap
from lora_or_full.report.stats.seeds_by_paragraphs import anova_estimate
from lora_or_full.report.study import Arm, Evaluation, Study, differences
from lora_or_full.runs.reader import check_scores, read_answers, read_record
from lora_or_full.runs.schema import EvaluationRecord

# The evaluations of an arm on a test set, by seed.
OnTestSet = dict[int, Evaluation]


def other_test_sets(study: Study, found: Comparison | None) -> Section | None:
    """Write the section; None if no run was scored on another test set."""
    read, notes = _read(study)
    names = sorted({test_set for own in read.values() for test_set in own})
    if not names and not notes:
        return None
    done = [one for own in read.values() for by_seed in own.values() for one in by_seed.values()]
    metrics = {
        name: label
        for name, label in study.metrics.items()
        if all(name in one.record.test.metrics for one in done)
    }
    scores = []
    for arm in study.arms:
        own = [spread(arm.test(metric)) for metric in metrics]
        nothing = [None for _ in metrics]
        scores.append([f"{arm.label}, own test set", len(arm.runs), *own, *nothing])
        for test_set in names:
            if by_seed := read[arm.label].get(test_set):
                scores.append(
                    [f"{arm.label}, {test_set[0]}", len(by_seed), *_scores(arm, by_seed, metrics)]
                )
    gaps = []
    for pair in found.pairs if found is not None else ():
        for test_set in names:
            one, other = (read[arm.label].get(test_set, {}) for arm in pair.arms)
            gaps += _gaps(pair.name(test_set[0]), one, other, metrics)
    return section(
        "other_test_sets", found=found, metrics=metrics, scores=scores, gaps=gaps, notes=notes
    )


def _read(study: Study) -> tuple[dict[str, dict[tuple[str, str], OnTestSet]], list[str]]:
    """Evaluations by arm and test set (its name and fingerprint), and what to know about them."""
    read: dict[str, dict[tuple[str, str], OnTestSet]] = {arm.label: {} for arm in study.arms}
    broken, known = [], []
    for arm in study.arms:
        for seed, run in arm.runs.items():
            for file in sorted(run.folder.glob("evaluations/*/results.json")):
                try:
                    record = read_record(file.parent, EvaluationRecord)
                    predictions, _ = read_answers(file.parent)
                    check_scores(file.parent, record, predictions)
                except UserError as error:
                    broken.append(f"left out: {error}")
                    continue
                rules = run.record.config.scoring
                if record.scoring != rules:
                    broken.append(
                        f"left out: {file.parent}: scoring {record.scoring}, not {rules} as the "
                        "run's own scores"
                    )
                    continue
                test_set = (record.name, record.data.test.fingerprint)
                read[arm.label].setdefault(test_set, {})[seed] = Evaluation(record, predictions)
                if record.data.trained_on:
                    known.append(
                        f"{run.folder} was trained on or chosen by "
                        f"{counted(record.data.trained_on, 'question')} of {record.name}: its "
                        "score there is not on unseen questions."
                    )
    return read, broken + known


def _scores(arm: Arm, by_seed: OnTestSet, metrics: Iterable[str]) -> list[str]:
    """The scores of an arm, and their differences from those on its own test set."""
    scores, drops = [], []
    for metric in metrics:
        own = {seed: getattr(arm.runs[seed].record.test, metric) for seed in by_seed}
        here = {seed: getattr(one.record.test, metric) for seed, one in by_seed.items()}
        scores.append(spread(list(here.values())))
        drops.append(signed(fmean(here[seed] - own[seed] for seed in by_seed)))
    return [*scores, *drops]


def _gaps(
    name: str, one: OnTestSet, other: OnTestSet, metrics: Mapping[str, str]
) -> list[tuple[str, int, float, list[Interval | None]]]:
    """The difference of two arms on a test set, by metric, with its intervals."""
    gaps = []
    for metric, shown in metrics.items() if one.keys() & other.keys() else ():
        paragraphs = [p["paragraph"] for p in next(iter(one.values())).predictions]
        scores = differences(one, other, metric)
        mean, _, over_seeds = mean_over_seeds(list(scores.mean(axis=1)))
        over_paragraphs = paragraph_bootstrap(scores, paragraphs).interval
        both = anova_estimate(scores, paragraphs)
        intervals = [over_seeds, over_paragraphs, both.interval if both else None]
        gaps.append((f"{name}, {shown}", len(scores), mean, intervals))
    return gaps
