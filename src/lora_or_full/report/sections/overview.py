"""The sections of the report in their order; results, dynamics and provenance."""

from lora_or_full.report import plots
from lora_or_full.report.formatting import mean, spread
from lora_or_full.report.render import Code, Section, section
from lora_or_full.report.sections.conclusion import conclusion
from lora_or_full.report.sections.configurations import configurations
from lora_or_full.report.sections.costs import cost, efficiency, recipe
from lora_or_full.report.sections.failures import failure_cases
from lora_or_full.report.sections.other_test_sets import other_test_sets
from lora_or_full.report.sections.significance import significance
from lora_or_full.report.stats.comparison import Comparison
from lora_or_full.report.study import Study


def all_sections(study: Study, found: Comparison | None, command: str) -> list[Section]:
    """Write the whole report.

    Args:
        study: Arms that can be compared.
        found: Their comparison, if there is one.
        command: The command that makes the report.
    """
    sections = (
        conclusion(study, found),
        results(study),
        dynamics(study),
        cost(study),
        significance(found),
        other_test_sets(study, found),
        failure_cases(study, found),
        recipe(study, found),
        efficiency(study, found),
        configurations(study),
        provenance(study, command),
    )
    return [section for section in sections if section is not None]


def results(study: Study) -> Section:
    """Write the section on parameters, scores and losses."""
    rows: list[list[object]] = []
    for arm in study.arms:
        record, runs = arm.any.record, arm.runs.values()
        losses = [mean(runs, f"record.best.{name}_loss") for name in ("train", "validation")]
        rows.append([
            arm.label,
            *(spread(arm.test(metric)) for metric in study.metrics),
            *(f"{getattr(record.before, metric):.1f}" for metric in study.metrics),
            len(runs),
            f"{record.parameters.trainable:,}",
            f"{record.parameters.percent:.4f}",
            *(f"{loss:.4f}" for loss in losses),
        ])  # fmt: skip
    for model in study.untrained:
        found = map(model.test, study.metrics)
        tested = [spread(scores) if scores else None for scores in found]
        before = [None for _ in study.metrics]
        rows.append([model.label, *tested, *before, len(model.evaluations), 0, 0, None, None])
    plot = plots.scores(study.arms, plots.colours(study), study.metrics)
    return section("results", study=study, rows=rows, plot=plot)


def dynamics(study: Study) -> Section:
    """Write the section on losses and scores by epoch."""
    by_epoch, trends = [], []
    for arm in study.arms:
        epochs = [run.record.epochs for run in arm.runs.values()]
        by_epoch += [(arm, n, each) for n, each in enumerate(arm.by_epoch, 1)]
        lowest = [(min(own, key=lambda e: e.validation_loss), own[-1]) for own in epochs]
        rising = [ends for ends in lowest if ends[1].validation_loss > ends[0].validation_loss]
        falling = sum(last.train_loss < low.train_loss for low, last in rising)
        trends.append((arm, len(rising), falling))
    most, longest = len(plots.LINES), max(number for _, number, _ in by_epoch)
    drawn = study.leading(most)
    return section(
        "dynamics", by_epoch=by_epoch, trends=trends, metrics=study.metrics,
        plot=plots.dynamics(drawn, plots.colours(study), study.metrics) if longest > 1 else None,
        most=most if len(drawn) < len(study.arms) else None,
    )  # fmt: skip


def provenance(study: Study, command: str) -> Section:
    """Write the section on where each number comes from."""
    return section("provenance", study=study, command=Code(command))
