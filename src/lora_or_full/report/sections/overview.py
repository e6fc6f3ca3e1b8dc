"""The sections of the report in their order; results, dynamics and provenance."""

from statistics import fmean

from lora_or_full.report import plots
from lora_or_full.report.formatting import METRICS, spread
from lora_or_full.report.render import Code, Figure, Points, Section, Table, Text
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
    rows = []
    for arm in study.arms:
        record = arm.any.record
        rows.append([
            arm.label,
            str(len(arm.runs)),
            f"{record.parameters.trainable:,}",
            f"{record.parameters.percent:.4f}",
            *(f"{getattr(record.before, metric):.1f}" for metric in METRICS),
            *(spread(arm.test(metric)) for metric in METRICS),
            f"{fmean(arm.values(lambda r: r.best.train_loss)):.4f}",
            f"{fmean(arm.values(lambda r: r.best.validation_loss)):.4f}",
        ])  # fmt: skip
    test = study.arms[0].any.record.data.test
    return Section("Results", [
        Table(["", "seeds", "trainable", "% of all", "EM before", "F1 before", "EM", "F1",
               "train loss", "validation loss"], rows,
              "EM and F1 in percent: mean ± standard deviation over seeds, and the 95 % t interval "
              "of the mean over seeds; before: the model before fine-tuning. Losses in nats per "
              "answer token, at the epoch that was scored. With mask_prompt=false the training "
              "loss is over all tokens, and can't be compared with the others."),
        Figure("scores", plots.scores(study.arms, plots.colours(study)),
               "EM and F1 on the test questions: one dot per seed, a bar for the mean, a line for "
               "its 95 % t interval over seeds."),
        Text(f"Each run is scored on the same {test.questions:,} questions over "
             f"{test.paragraphs:,} paragraphs, by SQuAD v1.1's rules against all gold answers; "
             "answers are greedy. The interval of a single run over paragraphs is in its "
             "results.json."),
    ])  # fmt: skip


def dynamics(study: Study) -> Section:
    """Write the section on losses and scores by epoch."""
    rows, trends = [], []
    digits = {"train_loss": 4, "validation_loss": 4, "exact_match": 1, "f1": 1}
    for arm in study.arms:
        records = [run.record for run in arm.runs.values()]
        for number, each in enumerate(zip(*(r.epochs for r in records), strict=False), 1):
            means = {key: fmean(getattr(epoch, key) for epoch in each) for key in digits}
            chosen = sum(record.best_epoch == number for record in records)
            rows.append([
                f"{arm.label}, epoch {number}",
                *(f"{mean:.{digits[key]}f}" for key, mean in means.items()),
                f"{chosen} of {len(records)}",
            ])  # fmt: skip
        rising = [
            (lowest, last)
            for lowest, last in (
                (min(r.epochs, key=lambda e: e.validation_loss), r.epochs[-1]) for r in records
            )
            if last.validation_loss > lowest.validation_loss
        ]
        falling = sum(last.train_loss < lowest.train_loss for lowest, last in rising)
        trends.append(
            f"{arm.label}: the validation loss rises after its lowest epoch in {len(rising)} of "
            f"{len(records)} runs; the training loss still falls in {falling} of these."
        )
    most = len(plots.LINES)
    drawn = study.leading(most)
    choice = (
        f" At most {most} configurations of each mode: those with the most seeds, then the highest "
        "validation F1."
    )
    return Section("Dynamics", [
        Table(["", "train loss", "validation loss", "validation EM, %", "validation F1, %",
               "scored"], rows,
              "Means over seeds. Scored: in how many runs this epoch had the highest validation "
              "F1."),
        Figure("dynamics", plots.dynamics(drawn, plots.colours(study)),
               "Losses, validation EM and F1 by epoch: means over seeds, the range of the seeds "
               f"shaded.{choice if len(drawn) < len(study.arms) else ''}"),
        Points(trends),
        Text("If the validation loss rises while the training loss falls, a mode learns what does "
             "not generalize. The training loss is the mean over the epoch's answer tokens while "
             "weights change and dropout is on; the validation loss is that of fixed weights "
             "without dropout. So the first can be above the second without meaning anything. Loss "
             "and EM need not move together: the loss is of the gold answer, token by token, EM of "
             "the generated answer. Validation scores choose the epoch, so they are a little too "
             "good; the test scores are not."),
    ])  # fmt: skip


def provenance(study: Study, command: str) -> Section:
    """Write the section on where each number comes from."""
    rows = []
    for arm in study.arms:
        for seed, run in arm.runs.items():
            e = run.record.environment
            commit, changed, _ = str(e.commit).partition("+")
            packages = ", ".join(f"{name} {number}" for name, number in e.packages.items())
            dirty = "+changes" if changed else ""
            rows.append([
                run.folder.name, arm.label, str(seed), commit[:12] + dirty,
                f"{e.device}, {e.cores} cores, {run.record.config.trainer.precision}",
                f"{e.machine}, Python {e.python}, {packages}",
                run.record.data.train.fingerprint, str(run.record.cost.samples),
            ])  # fmt: skip
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
    return Section("Provenance", [
        Table(["run", "arm", "seed", "commit", "hardware", "machine and versions",
               "training questions", "seen"], rows,
              "Training questions: fingerprint of those drawn for this seed. Seen: number of "
              "questions trained on, over all epochs."),
        Points(facts),
        Text("This command makes the report again:"),
        Code(command),
    ])  # fmt: skip
