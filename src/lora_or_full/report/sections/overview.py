"""What the report says, a section after the other, each from the records of a study."""

from statistics import fmean

from lora_or_full.report import plots
from lora_or_full.report.formatting import METRICS, spread
from lora_or_full.report.render import Block, Code, Figure, Points, Section, Table, Text
from lora_or_full.report.sections.conclusion import conclusion
from lora_or_full.report.sections.configurations import alternatives
from lora_or_full.report.sections.costs import cost, efficiency, recipe
from lora_or_full.report.sections.failures import failure_cases
from lora_or_full.report.sections.other_test_sets import elsewhere
from lora_or_full.report.sections.significance import significance
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Arm, Study, shown


def all_sections(study: Study, found: ArmComparison | None, command: str) -> list[Section]:
    """The whole report."""
    return [
        section
        for section in (
            conclusion(study, found),
            results(study),
            dynamics(study),
            cost(study),
            significance(found),
            elsewhere(study, found),
            failure_cases(study, found),
            recipe(study, found),
            efficiency(study, found),
            alternatives(study),
            swept(study),
            provenance(study, command),
        )
        if section is not None
    ]


def results(study: Study) -> Section:
    rows = []
    for arm in study.arms:
        r = arm.any.results
        rows.append([
            arm.label,
            str(len(arm.runs)),
            f"{r['parameters']['trainable']:,}",
            f"{r['parameters']['percent']:.4f}",
            *(f"{r['before'][metric]:.1f}" for metric in METRICS),
            *(spread(arm.values("test", metric)) for metric in METRICS),
            *(
                f"{fmean(run.best[key] for run in arm.runs.values()):.4f}"
                for key in ("train_loss", "validation_loss")
            ),
        ])  # fmt: skip
    test = study.arms[0].any.results["data"]["test"]
    return Section("Results", [
        Table(
            ["", "seeds", "trainable", "% of all", "EM before", "F1 before", "EM", "F1",
             "train loss", "validation loss"],
            rows,
            "EM and F1 in percent: mean ± standard deviation over seeds, and the 95 % t interval "
            "of the mean over seeds; before: the model before fine-tuning. Losses in nats a label "
            "token, at the epoch that was scored; with mask_prompt=false the training loss is over "
            "all tokens, and not to be held against the others.",
        ),
        Figure("scores", plots.scores(study.arms),
               "EM and F1 on the test questions: a dot each seed, a bar the mean, a line its 95 "
               "% t interval over seeds."),
        Text(
            f"Each run is scored on the same {test['questions']:,} questions over "
            f"{test['paragraphs']:,} paragraphs, by SQuAD v1.1's rules against all gold answers; "
            "answers are greedy. The interval of a single run over paragraphs is in its "
            "results.json."
        ),
    ])  # fmt: skip


def dynamics(study: Study) -> Section:
    rows = []
    for arm in study.arms:
        epochs = [run.results["epochs"] for run in arm.runs.values()]
        for number, each in enumerate(zip(*epochs, strict=False), 1):
            chosen = sum(run.results["best_epoch"] == number for run in arm.runs.values())
            rows.append([
                f"{arm.label}, epoch {number}",
                *(
                    f"{fmean(epoch[key] for epoch in each):.{digits}f}"
                    for key, digits in (
                        ("train_loss", 4), ("validation_loss", 4), ("exact_match", 1), ("f1", 1)
                    )
                ),
                f"{chosen} of {len(arm.runs)}",
            ])  # fmt: skip
    trends = [
        f"{arm.label}: the validation loss rises behind its lowest epoch in {rising} of "
        f"{len(arm.runs)} runs, while the training loss falls on in {falling} of these."
        for arm in study.arms
        for rising, falling in (_after_the_best(arm),)
    ]
    most = len(plots.LINES)
    drawn = study.leading(most)
    return Section("Dynamics", [
        Table(
            ["", "train loss", "validation loss", "validation EM, %", "validation F1, %", "scored"],
            rows,
            "Means over seeds. Scored: in how many runs this epoch had the highest validation F1.",
        ),
        Figure("dynamics", plots.dynamics(drawn),
               "Losses, validation EM and F1 by epoch: means over seeds, the range of the seeds "
               "shaded." + (
                   f" At most {most} configurations of each mode: those with the most seeds, of "
                   "equals the highest validation F1." if len(drawn) < len(study.arms) else "")),
        Points(trends),
        Text(
            "A validation loss that rises while the training loss falls is where a mode learns "
            "what does not carry over. The training loss is the mean over the epoch's label "
            "tokens while the weights move and dropout is on; the validation loss is that of fixed "
            "weights without dropout. So the first may lie above the second without meaning "
            "anything. Loss and EM need not move together: the loss is of the gold answer, token "
            "by token, EM of the answer that was generated. Validation scores choose the epoch, "
            "hence flatter it a little; the test scores do not."
        ),
    ])  # fmt: skip


def _after_the_best(arm: Arm) -> tuple[int, int]:
    """In how many runs the validation loss ends above its lowest, and in how many of these the
    training loss fell from there."""
    rising = falling = 0
    for run in arm.runs.values():
        last = run.results["epochs"][-1]
        lowest = min(run.results["epochs"], key=lambda epoch: epoch["validation_loss"])
        if last["validation_loss"] > lowest["validation_loss"]:
            rising += 1
            falling += last["train_loss"] < lowest["train_loss"]
    return rising, falling


def swept(study: Study) -> Section | None:
    masked = [arm for arm in study.arms if arm.any.config["mask_prompt"]]
    blocks: list[Block] = []
    for key, title in (("lr", "learning rate"), ("rank", "rank")):
        arms = [arm for arm in masked if arm.any.config.get(key) is not None]
        by_mode = {
            mode: {a.any.config[key] for a in arms if a.mode == mode} for mode in ("lora", "full")
        }
        moving = [arm for arm in arms if len(by_mode[arm.mode]) > 1]
        if moving:
            blocks.append(Figure(
                f"by_{key}", plots.sweep(moving, key, title),
                f"F1 on the validation questions by {title}: means over seeds, 95 % t intervals.",
            ))  # fmt: skip
        for best in filter(None, map(study.best, by_mode)):
            values = {arm.any.config[key] for arm in arms if _apart_in(key, arm, best)}
            if len(values) > 1:
                chosen = best.any.config[key]
                edge = (
                    "; it lies at the edge of the grid, so a better one may lie beyond."
                    if chosen in (min(values), max(values))
                    else "."
                )
                tried = ", ".join(f"{v:g}" for v in sorted(values))
                blocks.append(Text(
                    f"mode={best.mode}: the best {title} on validation is {chosen:g} of "
                    f"{tried}{edge}"
                ))  # fmt: skip
    return Section("Rank and learning rate", blocks) if blocks else None


def _apart_in(key: str, arm: Arm, best: Arm) -> bool:
    """Whether `arm` was chosen among with `best`, and has its configuration but for `key`."""
    own, others = dict(arm.any.config), dict(best.any.config)
    own[key] = others[key] = None
    return arm.mode == best.mode and own == others and len(arm.runs) == len(best.runs)


def provenance(study: Study, command: str) -> Section:
    rows = []
    for arm in study.arms:
        for seed, run in arm.runs.items():
            r = run.results
            e = r["environment"]
            commit, changed, _ = str(e["commit"]).partition("+")
            packages = ", ".join(f"{name} {number}" for name, number in e["packages"].items())
            dirty = "+changes" if changed else ""
            rows.append([
                run.folder.name, arm.label, str(seed), commit[:12] + dirty,
                f"{e['device']}, {e['cores']} cores, {r['config']['trainer']['precision']}",
                f"{e['machine']}, Python {e['python']}, {packages}",
                run.trained_on, str(r["cost"]["samples"]),
            ])  # fmt: skip
    first = study.arms[0].any.results
    data = first["data"]
    facts = [
        f"model {study.arms[0].any.model}, weights {first['model']['fingerprint']}",
        f"data files {data['source'][:16]}; test {data['test']['fingerprint']}, validation "
        f"{data['validation']['fingerprint']}",
    ]
    facts += [
        f"{arm.label}: "
        + ", ".join(f"{key}={shown(value)}" for key, value in arm.any.config.items())
        for arm in study.arms
    ]
    return Section("Provenance", [
        Table(["run", "arm", "seed", "commit", "hardware", "machine and versions",
               "training questions", "seen"], rows,
              "Training questions: the fingerprint of those drawn for this seed. Seen: how many "
              "were trained on, over all epochs."),
        Points(facts),
        Text("This report is made again by:"),
        Code(command),
    ])  # fmt: skip
