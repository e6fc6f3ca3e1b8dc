"""The report's sections on what each mode costs: measured, chosen, and as theory has it."""

from collections import Counter
from collections.abc import Callable
from statistics import fmean

from lora_or_full.report import plots, theory
from lora_or_full.report.formatting import MB, NONE, mean_of
from lora_or_full.report.render import Block, Figure, Points, Section, Table, Text
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Arm, Study

RECIPE = (
    "lr", "rank", "lora", "batch_size", "max_length", "mask_prompt", "optimizer", "model.config",
    "data.train_size", "data.draw_by", "trainer.max_epochs", "trainer.gradient_clip_val",
)  # fmt: skip


def cost(study: Study) -> Section:
    head = ["", "train peak, MB", "evaluation peak, MB", "s a step", "training, s",
            "validation, s", "whole run, s", "questions/s", "tokens/s", "on disk, MB"]  # fmt: skip
    rows = [
        [
            arm.label,
            mean_of(arm.values("cost", "peak_memory_bytes", "train"), MB, 0),
            mean_of(arm.values("cost", "peak_memory_bytes", "evaluation"), MB, 0),
            mean_of([run.seconds_per_step for run in arm.runs.values()], 1, 3),
            mean_of(arm.values("cost", "train_seconds"), 1, 0),
            mean_of(arm.values("cost", "validation_seconds"), 1, 0),
            mean_of(arm.values("cost", "session_seconds"), 1, 0),
            mean_of(arm.values("cost", "samples_per_second"), 1, 1),
            mean_of(arm.values("cost", "tokens_per_second"), 1, 0),
            mean_of(arm.values("cost", "exported_bytes"), MB, 1),
        ]
        for arm in study.arms
    ]
    parts = {arm.label: memory_parts(arm) for arm in study.arms}
    names = list(next(iter(parts.values())))
    how = study.arms[0].any.results["cost"]["peak_memory_is"]
    return Section("Ablation: memory, time, size", [
        Table(head, rows,
              f"Means over seeds. Peak memory: {how}. Seconds a step: the median without the "
              "first step and without validation. The whole run has the tests before and after in "
              "it, and of one that was interrupted what came since its last start; the first run "
              "of a study alone has to score the model before fine-tuning. "
              "Tokens: of prompts and answers, a shared context counted for each question. On "
              "disk: the weights that a run leaves to be used."),
        Table(["MB", *names, "peak"],
              [[label, *(f"{size:,.1f}" for size in own.values()), f"{sum(own.values()):,.1f}"]
               for label, own in parts.items()],
              "What the measured peak in training consists of, means over seeds. "
              "Activations: the tensors that autograd saves for the backward pass of the largest "
              "of the first batches, copies of weights in lower precision among them. The rest is "
              "what these do not explain: temporary tensors, the data, the allocator's spare; "
              "below zero if the others never stood together."),
        Figure("memory", plots.memory(parts), "The parts of the peak memory in training."),
    ])  # fmt: skip


def memory_parts(arm: Arm) -> dict[str, float]:
    """The peak in training, in MB, by what it holds, means over seeds; the sum is the peak."""

    def mean(*path: str) -> float:
        return fmean(arm.values("cost", *path))

    known = {
        "imports": mean("imports_bytes"),
        "weights": mean("step", "weights_bytes"),
        "gradients": mean("step", "gradients_bytes"),
        "optimizer state": mean("step", "optimizer_bytes"),
        "activations": mean("step", "activations_bytes"),
    }
    rest = mean("peak_memory_bytes", "train") - sum(known.values())
    return {name: size / MB for name, size in (known | {"rest": rest}).items()}


def recipe(study: Study, found: ArmComparison | None) -> Section:
    rows = []
    configs = [arm.any.config for arm in study.arms]
    shown_keys = [
        key
        for key in dict.fromkeys(key for config in configs for key in config)
        if key.startswith(RECIPE)
        or any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    for key in shown_keys:
        values = [config.get(key) for config in configs]
        rows.append([key, *(NONE if value is None else str(value) for value in values)])
    tried = Counter(arm.mode for arm in study.arms if arm.any.config["mask_prompt"])
    evidence = [
        f"mode={mode}: {count} configurations were run; of those with the most seeds "
        "the best on validation was taken."
        if count > 1
        else f"mode={mode}: one configuration was run. Nothing here says that it is the best one."
        for mode, count in tried.items()
    ]
    blocks: list[Block] = [
        Table(["", *(arm.label for arm in study.arms)], rows),
        Points(evidence),
    ]
    if found is not None:
        blocks.append(_added(found.lora, found.full))
    return Section("The recipe", blocks)


def _added(lora: Arm, full: Arm) -> Text:
    """What LoRA adds to full fine-tuning."""

    def size(arm: Arm) -> str:
        return mean_of(arm.values("cost", "exported_bytes"), MB, 1)

    def step(arm: Arm) -> str:
        return mean_of([run.seconds_per_step for run in arm.runs.values()], 1, 3)

    return Text(
        "What LoRA adds to full fine-tuning. To tune: rank, alpha, dropout and layers, and a "
        "learning rate of its own. In code: a library (PEFT) with one call that puts the adapters "
        "in, and checkpoints that hold them alone. In use: a second set of weights that has to be "
        "loaded with, or folded into, its base. In time and size here: "
        f"{step(lora)} s a step in place of {step(full)} s, and {size(lora)} MB on disk in place "
        f"of {size(full)} MB."
    )


def efficiency(study: Study, found: ArmComparison | None) -> Section | None:
    lora = found.lora if found else study.best("lora")
    layers = theory.lora_layers(lora.any.results["shapes"]) if lora else []
    if lora is None or not layers:
        return None
    alpha = lora.any.config["lora.lora_alpha"]
    one = layers[0]
    transposed = (
        "; GPT-2 keeps W transposed (in × out), so BA is added transposed"
        if lora.any.results["model"]["type"] == "gpt2"
        else ""
    )
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
            f"{one.rank}, so a factor of {alpha / one.rank:g}{transposed}. With x of "
            f"{one.inputs} numbers, Ax has {one.rank} and B(Ax) {one.outputs}. Gradients reach A "
            "and B alone; that of x is still needed, for the adapters in the layers below. B "
            "starts at zero, so the first step's gradient of A is zero too, and the model starts "
            "as its base."
        ),
    ]  # fmt: skip
    for layer in layers:
        own, whole = layer.operations(lora=True), layer.operations(lora=False)
        blocks.append(Table(
            [f"operations of one {layer.name}, a token", "full", "LoRA", "LoRA / full"],
            [[name, f"{whole[name]:,}", f"{own[name]:,}", f"{own[name] / whole[name]:.3f}"]
             for name in own],
        ))  # fmt: skip
    blocks.append(Text(
        "From the shapes: 2 operations a weight and product. So the weights' gradients and the "
        "optimizer shrink to about the share above, while forward and the gradients of the inputs "
        "do not shrink but grow a little: O(n·d·r) is what LoRA adds to O(n·d²), it does not take "
        "its place. Of the three products of a layer, forward, backward to the inputs and backward "
        "to the weights, LoRA saves about the last; below the lowest adapter the second too."
    ))  # fmt: skip
    if found is not None:
        blocks.append(_measured(found, layers))
    return Section("Efficiency and theory", blocks)


def _measured(found: ArmComparison, layers: list[theory.Layer]) -> Table:
    seed = found.seeds[0]

    def step(arm: Arm, key: str) -> float:
        own = arm.runs[seed].results["cost"]["step"]
        return float(own[key]) / float(own["questions"]) / 1e9

    def pair(name: str, value: Callable[[Arm], float], digits: int, expected: str) -> list[str]:
        lora, full = value(found.lora), value(found.full)
        share = f"{lora / full:.3f}" if full else NONE
        return [name, f"{full:,.{digits}f}", f"{lora:,.{digits}f}", share, expected]

    def backward(arm: Arm) -> float:
        return step(arm, "backward_operations") / step(arm, "forward_operations")

    added = sum(x.count * x.lora for x in layers)
    held = sum(x.count * x.full for x in layers)
    trained = theory.total(layers) / found.full.any.results["parameters"]["trainable"]
    rows = [
        pair("forward, GFLOP a question", lambda a: step(a, "forward_operations"), 3,
             "above 1, by what A and B add"),
        pair("backward, GFLOP a question", lambda a: step(a, "backward_operations"), 3,
             "about 0.5"),
        pair("backward / forward", backward, 2, "2 in full, 1 in LoRA"),
        pair("trainable weights", lambda a: a.any.results["parameters"]["trainable"], 0,
             f"{trained:.4f}, from A and B"),
        pair("gradients and optimizer state, MB", lambda a: (
            a.runs[seed].results["cost"]["step"]["gradients_bytes"]
            + a.runs[seed].results["cost"]["step"]["optimizer_bytes"]) / MB, 2,
            "as trainable weights"),
        pair("train peak above imports, MB", lambda a: (
            fmean(a.values("cost", "peak_memory_bytes", "train"))
            - fmean(a.values("cost", "imports_bytes"))) / MB, 0,
            "above that: weights and activations stay"),
        pair("seconds a step", lambda a: fmean(r.seconds_per_step for r in a.runs.values()), 3,
             "about 2/3 where products take the time"),
    ]  # fmt: skip
    return Table(
        ["measured", found.full.label, found.lora.label, "LoRA / full", "expected of it"],
        rows,
        "Operations counted while a training step ran (matrix products; of attention what is not "
        f"fused), in the runs of seed {seed}, with shared contexts and logits only where there is "
        "a label, so that a question costs less than its tokens would alone. In the adapted layers "
        f"A and B add {100 * added / held:.2f} % to the forward pass.",
    )
