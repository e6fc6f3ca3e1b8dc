"""The sections of the report in their order; results, dynamics and provenance."""

from statistics import fmean

from lora_or_full.report import plots
from lora_or_full.report.formatting import METRICS, spread
from lora_or_full.report.render import Section, section
from lora_or_full.report.sections.conclusion import conclusion
from lora_or_full.report.sections.configurations import configurations
from lora_or_full.report.sections.costs import cost, efficiency, recipe
from lora_or_full.report.sections.failures import failure_cases
from lora_or_full.report.sections.other_test_sets import other_test_sets
from lora_or_full.report.sections.significance import significance
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Study, shown


def all_sections(study: Study, found: ArmComparison | None, command: str) -> list[Section]:
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
    rows = [
        {
            "": arm.label,
            "seeds": len(arm.runs),
            "trainable": f"{arm.any.record.parameters.trainable:,}",
            "% of all": f"{arm.any.record.parameters.percent:.4f}",
            **{
                f"{m} before": f"{getattr(arm.any.record.before, k):.1f}"
                for k, m in METRICS.items()
            },
            **{name: spread(arm.test(metric)) for metric, name in METRICS.items()},
            "train loss": f"{fmean(arm.values(lambda r: r.best.train_loss)):.4f}",
            "validation loss": f"{fmean(arm.values(lambda r: r.best.validation_loss)):.4f}",
        }
        for arm in study.arms
    ]
    plot = plots.scores(study.arms, plots.colours(study))
    return section("results", rows=rows, plot=plot, test=study.arms[0].any.record.data.test)


def dynamics(study: Study) -> Section:
    """Write the section on losses and scores by epoch."""
    rows, trends = [], []
    for arm in study.arms:
        records = [run.record for run in arm.runs.values()]
        for number, epochs in enumerate(zip(*(r.epochs for r in records), strict=False), 1):
            rows.append({
                "": f"{arm.label}, epoch {number}",
                "train loss": f"{fmean(epoch.train_loss for epoch in epochs):.4f}",
                "validation loss": f"{fmean(epoch.validation_loss for epoch in epochs):.4f}",
                "validation EM, %": f"{fmean(epoch.exact_match for epoch in epochs):.1f}",
                "validation F1, %": f"{fmean(epoch.f1 for epoch in epochs):.1f}",
                "scored": f"{sum(r.best_epoch == number for r in records)} of {len(records)}",
            })  # fmt: skip
        lowest = [min(r.epochs, key=lambda epoch: epoch.validation_loss) for r in records]
        rising = [
            (low, r.epochs[-1])
            for low, r in zip(lowest, records, strict=True)
            if r.epochs[-1].validation_loss > low.validation_loss
        ]
        falling = sum(last.train_loss < low.train_loss for low, last in rising)
        trends.append(
            f"{arm.label}: the validation loss rises after its lowest epoch in {len(rising)} of "
            f"{len(records)} runs; the training loss still falls in {falling} of these."
        )
    most = len(plots.LINES)
    drawn = study.leading(most)
    return section(
        "dynamics", rows=rows, trends=trends, plot=plots.dynamics(drawn, plots.colours(study)),
        most=most if len(drawn) < len(study.arms) else None,
    )  # fmt: skip


def provenance(study: Study, command: str) -> Section:
    """Write the section on where each number comes from."""
    rows = []
    for arm in study.arms:
        for seed, run in arm.runs.items():
            e = run.record.environment
            commit, changed, _ = str(e.commit).partition("+")
            packages = ", ".join(f"{name} {number}" for name, number in e.packages.items())
            rows.append({
                "run": run.folder.name,
                "arm": arm.label,
                "seed": seed,
                "commit": commit[:12] + ("+changes" if changed else ""),
                "hardware": f"{e.device}, {e.cores} cores, {run.record.config.trainer.precision}",
                "machine and versions": f"{e.machine}, Python {e.python}, {packages}",
                "training questions": run.record.data.train.fingerprint,
                "seen": run.record.cost.samples,
            })  # fmt: skip
    first = study.arms[0].any
    data = first.record.data
    facts = [
        f"model {first.model}, weights {first.record.model.fingerprint}",
        f"data files {data.source[:16]}; test {data.test.fingerprint}, validation "
        f"{data.validation.fingerprint}",
    ]
    facts += [
        f"{arm.label}: "
        + ", ".join(f"{key}={shown(value)}" for key, value in arm.any.config.items())
        for arm in study.arms
    ]
    return section("provenance", rows=rows, facts=facts, command=command)
