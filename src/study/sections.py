"""What the report says, a section after the other, each from the records of a study."""

from collections import Counter
from collections.abc import Callable, Mapping
from statistics import fmean

from study import comparison, figures, theory
from study.document import Block, Code, Figure, Points, Section, Table, Text
from study.failure_cases import failure_cases
from study.runs import Arm, Run, Study
from study.verdict import Contrast, conclusion, significance
from study.wording import MB, METRICS, NONE, mean_of, shown_interval, signed, spread


def all_sections(
    study: Study, found: Contrast | None, contexts: Mapping[str, str], command: str
) -> list[Section]:
    """The whole report."""
    return [
        section
        for section in (
            conclusion(study, found),
            results(study),
            dynamics(study),
            cost(study),
            significance(study, found),
            failure_cases(study, found, contexts),
            recipe(study, found),
            efficiency(study, found),
            masking(study),
            swept(study),
            provenance(study, command),
        )
        if section is not None
    ]


# Results


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
            "of the mean over seeds; before: the model untrained. Losses in nats a label token, "
            "at the epoch that was scored.",
        ),
        Figure("scores", figures.scores(study.arms),
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
    rising = [arm.label for arm in study.arms if _rises(arm)]
    overfit = (
        f"The validation loss of {', '.join(rising)} rises in the last epoch in most seeds, while "
        "the training loss falls: there it learns what does not carry over."
        if rising
        else "In no arm does the validation loss of most seeds rise in the last epoch."
    )
    return Section("Dynamics", [
        Table(
            ["", "train loss", "validation loss", "validation EM, %", "validation F1, %", "scored"],
            rows,
            "Means over seeds. Scored: in how many runs this epoch had the lowest validation loss.",
        ),
        Figure("dynamics", figures.dynamics(study.arms),
               "Losses and validation F1 by epoch: means over seeds, the range of the seeds "
               "shaded."),
        Text(overfit),
        Text(
            "The training loss is the mean over the epoch's label tokens while the weights move "
            "and dropout is on; the validation loss is that of fixed weights without dropout. So "
            "the first may lie above the second without meaning anything. Loss and EM need not "
            "move together: the loss is of the gold answer, token by token, EM of the answer that "
            "was generated. Validation scores choose the epoch, hence flatter it a little; the "
            "test scores do not."
        ),
    ])  # fmt: skip


def _rises(arm: Arm) -> bool:
    rising = [
        len(e := run.results["epochs"]) > 1
        and e[-1]["validation_loss"] > e[-2]["validation_loss"]
        and e[-1]["train_loss"] < e[-2]["train_loss"]
        for run in arm.runs.values()
    ]
    return sum(rising) * 2 > len(rising)


# Cost


def cost(study: Study) -> Section:
    head = ["", "train peak, MB", "evaluation peak, MB", "s a step", "train, s", "validation, s",
            "questions/s", "on disk, MB"]  # fmt: skip
    rows = [
        [
            arm.label,
            mean_of(arm.values("cost", "peak_memory_bytes", "train"), MB, 0),
            mean_of(arm.values("cost", "peak_memory_bytes", "evaluation"), MB, 0),
            mean_of(arm.values("cost", "seconds_per_batch"), 1, 3),
            mean_of(arm.values("cost", "train_seconds"), 1, 0),
            mean_of(arm.values("cost", "validation_seconds"), 1, 0),
            mean_of(arm.values("cost", "samples_per_second"), 1, 1),
            mean_of(arm.values("cost", "exported_bytes"), MB, 1),
        ]
        for arm in study.arms
    ]
    parts = {arm.label: memory_parts(arm.any) for arm in study.arms}
    names = list(next(iter(parts.values())))
    how = study.arms[0].any.results["cost"]["peak_memory_is"]
    return Section("Ablation: memory, time, size", [
        Table(head, rows,
              f"Means over seeds. Peak memory: {how}. Seconds a step: the median without the "
              "first step and without validation. On disk: the weights that a run leaves to be "
              "used."),
        Table(["MB", *names, "peak"],
              [[label, *(f"{size:,.1f}" for size in own.values()), f"{sum(own.values()):,.1f}"]
               for label, own in parts.items()],
              "What the peak in training consists of, in the first seed's run. Activations: the "
              "tensors that autograd saves for the backward pass of the largest of the first "
              "batches. The rest is what these do not explain: temporary tensors, the data, the "
              "allocator's spare."),
        Figure("memory", figures.memory(parts), "The parts of the peak memory in training."),
    ])  # fmt: skip


def memory_parts(run: Run) -> dict[str, float]:
    """The peak in training, in MB, by what it holds."""
    own = run.results["cost"]
    step = own["step"]
    known = {
        "imports": own["imports_bytes"],
        "weights": step["weights_bytes"],
        "gradients": step["gradients_bytes"],
        "optimizer state": step["optimizer_bytes"],
        "activations": step["activations_bytes"],
    }
    rest = own["peak_memory_bytes"]["train"] - sum(known.values())
    return {name: size / MB for name, size in (known | {"rest": max(0, rest)}).items()}


# Recipe, efficiency, theory


def recipe(study: Study, found: Contrast | None) -> Section:
    rows = []
    keys = ("lr", "rank", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules",
            "batch_size", "trainer.max_epochs", "data.train_size", "data.draw_by",
            "optimizer.weight_decay", "optimizer.warmup_steps", "mask_prompt")  # fmt: skip
    for key in keys:
        values = [arm.any.config.get(key) for arm in study.arms]
        rows.append([key, *(NONE if value is None else str(value) for value in values)])
    tried = Counter(arm.mode for arm in study.arms)
    evidence = [
        f"mode={mode}: {count} configurations were run; the best on validation was taken."
        if count > 1
        else f"mode={mode}: one configuration was run. Nothing here says that it is the best one."
        for mode, count in tried.items()
    ]
    blocks: list[Block] = [
        Table(["", *(arm.label for arm in study.arms)], rows),
        Points(evidence),
    ]
    if found is not None:
        full, lora = found.full, found.lora
        blocks.append(Text(
            "What LoRA adds to full fine-tuning: the choice of rank, alpha, dropout and layers; "
            "a learning rate of its own; a second set of weights that has to be loaded with, or "
            f"folded into, its base. Here {mean_of(lora.values('cost', 'exported_bytes'), MB, 1)} "
            f"MB on disk in place of {mean_of(full.values('cost', 'exported_bytes'), MB, 1)} MB, "
            f"and {mean_of(lora.values('cost', 'seconds_per_batch'), 1, 3)} s a step in place of "
            f"{mean_of(full.values('cost', 'seconds_per_batch'), 1, 3)} s."
        ))  # fmt: skip
    return Section("The recipe", blocks)


def efficiency(study: Study, found: Contrast | None) -> Section | None:
    lora = found.lora if found else study.best("lora")
    layers = theory.lora_layers(lora.any.results["shapes"]) if lora else []
    if lora is None or not layers:
        return None
    alpha = lora.any.config["lora.lora_alpha"]
    blocks: list[Block] = [
        Table(["layer", "how many", "W", "A", "B", "weights of W", "of A and B", "share, %",
               "r/d, %"],
              [[x.name, str(x.count), f"{x.inputs} × {x.outputs}", f"{x.rank} × {x.inputs}",
                f"{x.outputs} × {x.rank}", f"{x.full:,}", f"{x.lora:,}", f"{x.share:.2f}",
                f"{x.claimed:.2f}"] for x in layers],
              f"In all {theory.total(layers):,} weights of LoRA; the record counted "
              f"{lora.any.results['parameters']['trainable']:,}. The share is r·(in + out) / "
              "(in · out); the often quoted r/d leaves out that A and B are two."),
        Text(
            f"The layer computes W'x with W' = W + (alpha/r)·BA, alpha = {alpha:g}, r = "
            f"{layers[0].rank}, so a factor of {alpha / layers[0].rank:g}; GPT-2 keeps W "
            f"transposed (in × out), so BA is added transposed. With x of {layers[0].inputs} "
            f"numbers, Ax has {layers[0].rank} and B(Ax) {layers[0].outputs}. Gradients reach A "
            "and B alone; that of x is still needed, for the layers below. B starts at zero, so "
            "the first step's gradient of A is zero too, and the model starts as its base."
        ),
    ]  # fmt: skip
    one = layers[0]
    own, whole = one.operations(lora=True), one.operations(lora=False)
    blocks.append(Table(
        [f"operations of one {one.name}, a token", "full", "LoRA", "LoRA / full"],
        [[name, f"{whole[name]:,}", f"{own[name]:,}", f"{own[name] / whole[name]:.3f}"]
         for name in own],
        "From the shapes, 2 operations a weight and product. So the weights' gradients and the "
        "optimizer shrink to about the share above, while forward and the gradients of the "
        "inputs do not shrink but grow a little: O(n·d·r) is what LoRA adds to O(n·d²), it does "
        "not take its place. At most the third of the arithmetic that makes gradients of weights "
        "is saved.",
    ))  # fmt: skip
    if found is not None:
        blocks.append(_measured(found))
    return Section("Efficiency and theory", blocks)


def _measured(found: Contrast) -> Table:
    def pair(name: str, value: Callable[[Arm], float], digits: int) -> list[str]:
        lora, full = value(found.lora), value(found.full)
        return [name, f"{full:,.{digits}f}", f"{lora:,.{digits}f}", f"{lora / full:.3f}"]

    def step(arm: Arm, key: str) -> float:
        own = arm.any.results["cost"]["step"]
        return float(own[key]) / float(own["questions"]) / 1e9

    rows = [
        pair("forward, GFLOP a question", lambda a: step(a, "forward_operations"), 2),
        pair("backward, GFLOP a question", lambda a: step(a, "backward_operations"), 2),
        pair("seconds a step", lambda a: fmean(a.values("cost", "seconds_per_batch")), 3),
        pair("train peak above imports, MB", lambda a: (
            fmean(a.values("cost", "peak_memory_bytes", "train"))
            - fmean(a.values("cost", "imports_bytes"))) / MB, 0),
        pair("trainable weights", lambda a: a.any.results["parameters"]["trainable"], 0),
    ]  # fmt: skip
    return Table(
        ["measured", found.full.label, found.lora.label, "LoRA / full"],
        rows,
        "Operations counted while a training step ran (matrix products and attention), with "
        "shared contexts and logits only where there is a label, so that a question costs less "
        "than its tokens would alone.",
    )


# Where there are such runs


def masking(study: Study) -> Section | None:
    open_arms = [arm for arm in study.arms if not arm.any.config["mask_prompt"]]
    rows = []
    for arm in open_arms:
        wanted = {**arm.any.config, "mask_prompt": True}
        masked = next((other for other in study.arms if other.any.config == wanted), None)
        if masked is None:
            continue
        seeds = sorted(arm.runs.keys() & masked.runs.keys())
        for metric, name in METRICS.items():
            apart = [
                float((masked.runs[s].scores(metric) - arm.runs[s].scores(metric)).mean())
                for s in seeds
            ]
            if apart:
                mean, _, interval = comparison.mean_over_seeds(apart)
                rows.append(
                    [
                        f"{masked.label}, {name}",
                        signed(mean),
                        shown_interval(interval),
                        str(len(apart)),
                    ]
                )
    if not rows:
        return None
    return Section("Masking the prompt", [
        Table(["masked minus not", "mean", "95 % t interval", "seeds"], rows,
              "Loss on the answer only (mask_prompt=true) against loss on every token, paired "
              "by seed, percentage points."),
    ])  # fmt: skip


def swept(study: Study) -> Section | None:
    masked = [arm for arm in study.arms if arm.any.config["mask_prompt"]]
    blocks: list[Block] = []
    for key, title in (("lr", "learning rate"), ("rank", "rank")):
        arms = [arm for arm in masked if arm.any.config.get(key) is not None]
        by_mode = {
            mode: {a.any.config[key] for a in arms if a.mode == mode} for mode in ("lora", "full")
        }
        moving = [arm for arm in arms if len(by_mode.get(arm.mode, ())) > 1]
        if moving:
            blocks.append(Figure(
                f"by_{key}", figures.sweep(moving, key, title),
                f"F1 on the validation questions by {title}: means over seeds, 95 % t intervals.",
            ))  # fmt: skip
        for mode, values in by_mode.items():
            best = study.best(mode)
            if best and len(values) > 1:
                chosen = best.any.config[key]
                edge = (
                    "; it lies at the edge of the grid, so a better one may lie beyond."
                    if chosen in (min(values), max(values))
                    else "."
                )
                tried = ", ".join(f"{v:g}" for v in sorted(values))
                blocks.append(Text(
                    f"mode={mode}: the best {title} on validation is {chosen:g} of {tried}{edge}"
                ))  # fmt: skip
    return Section("Rank and learning rate", blocks) if blocks else None


def provenance(study: Study, command: str) -> Section:
    rows = []
    for arm in study.arms:
        for seed, run in arm.runs.items():
            r = run.results
            e = r["environment"]
            rows.append([
                run.folder.name, arm.label, str(seed), str(e["commit"])[:12],
                f"{e['device']}, {e['cores']} cores, {r['config']['trainer']['precision']}",
                r["data"]["train"]["fingerprint"], str(r["cost"]["samples"]),
            ])  # fmt: skip
    first = study.arms[0].any.results
    packages = ", ".join(f"{k} {v}" for k, v in first["environment"]["packages"].items())
    facts = [
        f"model {first['model']['name']}, weights {first['model']['fingerprint']}",
        f"data source {first['data']['source'][:16]}; test "
        f"{first['data']['test']['fingerprint']}, validation "
        f"{first['data']['validation']['fingerprint']}",
        f"{first['environment']['machine']}, Python {first['environment']['python']}, {packages}",
    ]
    return Section("Provenance", [
        Table(["run", "arm", "seed", "commit", "hardware", "training questions", "seen"], rows,
              "Training questions: the fingerprint of those drawn for this seed. Seen: how many "
              "were trained on, over all epochs."),
        Points(facts),
        Text("This report is made again by:"),
        Code(command),
    ])  # fmt: skip
