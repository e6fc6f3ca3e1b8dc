"""The sections on cost: measured, as chosen by the recipe, and as theory predicts it."""

from collections import Counter
from collections.abc import Callable
from statistics import fmean

from lora_or_full.report import plots, theory
from lora_or_full.report.formatting import MB, NONE, mean_of
from lora_or_full.report.render import Block, Figure, Points, Section, Table, Text
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Arm, Study
from lora_or_full.runs.schema import Cost

RECIPE = (
    "lr", "rank", "adapter", "batch_size", "max_length", "mask_prompt", "optimizer", "model.config",
    "data.train_size", "data.draw_by", "trainer.max_epochs", "trainer.gradient_clip_val",
)  # fmt: skip


def cost(study: Study) -> Section:
    """Write the section on memory, time and size."""
    head = ["", "train peak, MB", "evaluation peak, MB", "s per step", "training, s",
            "validation, s", "whole run, s", "questions/s", "tokens/s", "on disk, MB"]  # fmt: skip
    rows = [
        [
            arm.label,
            mean_of(arm.values(lambda r: r.cost.peak_memory_bytes.train), MB, 0),
            mean_of(arm.values(lambda r: r.cost.peak_memory_bytes.evaluation), MB, 0),
            mean_of([run.seconds_per_step for run in arm.runs.values()], 1, 3),
            mean_of(arm.values(lambda r: r.cost.train_seconds), 1, 0),
            mean_of(arm.values(lambda r: r.cost.validation_seconds), 1, 0),
            mean_of(arm.values(lambda r: r.cost.session_seconds), 1, 0),
            mean_of(arm.values(lambda r: r.cost.samples_per_second), 1, 1),
            mean_of(arm.values(lambda r: r.cost.tokens_per_second), 1, 0),
            mean_of(arm.values(lambda r: r.cost.exported_bytes), MB, 1),
        ]
        for arm in study.arms
    ]
    parts = {arm.label: memory_parts(arm) for arm in study.arms}
    names = list(next(iter(parts.values())))
    how = study.arms[0].any.record.cost.peak_memory_is
    return Section("Ablation: memory, time, size", [
        Table(head, rows,
              f"Means over seeds. Peak memory: {how}. Seconds per step: the median without the "
              "first step and without validation. The whole run includes the tests before and "
              "after; for an interrupted run it counts from the last start. Only the first run of "
              "a study scores the model before fine-tuning. Tokens: of prompts and answers, a "
              "shared context counted for each question. On disk: the weights that a run exports."),
        Table(["MB", *names, "peak"],
              [[label, *(f"{size:,.1f}" for size in own.values()), f"{sum(own.values()):,.1f}"]
               for label, own in parts.items()],
              "Components of the measured peak in training, means over seeds. Activations: the "
              "tensors that autograd saves for the backward pass of the largest of the first "
              "batches, including copies of weights in lower precision. The rest is what these do "
              "not explain: temporary tensors, the data, the allocator's reserve; it is below zero "
              "if the others were never in memory at the same time."),
        Figure("memory", plots.memory(parts), "Components of the peak memory in training."),
    ])  # fmt: skip


def memory_parts(arm: Arm) -> dict[str, float]:
    """Components of an arm's peak memory in training (MB), means over seeds; they add up to it."""

    def mean(value: Callable[[Cost], float]) -> float:
        return fmean(arm.values(lambda record: value(record.cost)))

    known = {
        "imports": mean(lambda cost: cost.imports_bytes),
        "weights": mean(lambda cost: cost.step.weights_bytes),
        "gradients": mean(lambda cost: cost.step.gradients_bytes),
        "optimizer state": mean(lambda cost: cost.step.optimizer_bytes),
        "activations": mean(lambda cost: cost.step.activations_bytes),
    }
    rest = mean(lambda cost: cost.peak_memory_bytes.train) - sum(known.values())
    return {name: size / MB for name, size in (known | {"rest": rest}).items()}


def recipe(study: Study, found: ArmComparison | None) -> Section:
    """Write the section on the recipe of each arm."""
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
    tried = Counter(arm.mode for arm in study.arms if arm.any.record.config.mask_prompt)
    evidence = [
        f"mode={mode}: {count} configurations were run; the best on validation among those with "
        "the most seeds was chosen."
        if count > 1
        else f"mode={mode}: one configuration was run. Nothing here says that it is the best one."
        for mode, count in tried.items()
    ]
    blocks: list[Block] = [
        Table(["", *(arm.label for arm in study.arms)], rows),
        Points(evidence),
    ]
    if found is not None:
        blocks.append(_added(found.adapter, found.full))
    return Section("The recipe", blocks)


def _added(adapter: Arm, full: Arm) -> Text:
    """What an adapter adds to full fine-tuning."""
    name = adapter.any.record.config.label

    def size(arm: Arm) -> str:
        return mean_of(arm.values(lambda r: r.cost.exported_bytes), MB, 1)

    def step(arm: Arm) -> str:
        return mean_of([run.seconds_per_step for run in arm.runs.values()], 1, 3)

    return Text(
        f"What {name} adds to full fine-tuning. To tune: rank, alpha, dropout and layers, and its "
        "own learning rate. In code: a library (PEFT) with one call that inserts the adapters, and "
        "checkpoints that hold only them. In use: a second set of weights that has to be loaded "
        f"with, or merged into, its base. In time and size here: {step(adapter)} s per step "
        f"instead of {step(full)} s, and {size(adapter)} MB on disk instead of {size(full)} MB."
    )


def efficiency(study: Study, found: ArmComparison | None) -> Section | None:
    """Write the section on LoRA's theory beside measurement; None without a LoRA arm."""
    lora = found.adapter if found else study.compared()[0]
    layers = theory.lora_layers(lora.any.record.shapes) if lora else []
    adapter = lora.any.record.config.adapter if lora else None
    if lora is None or adapter is None or not layers:
        return None
    alpha = adapter.lora_alpha
    one = layers[0]
    transposed = (
        "; GPT-2 keeps W transposed (in × out), so BA is added transposed"
        if lora.any.record.model.type == "gpt2"
        else ""
    )
    blocks: list[Block] = [
        Table(["layer", "how many", "W", "A", "B", "weights of W", "of A and B", "share, %",
               "r/d, %"],
              [[x.name, str(x.count), f"{x.inputs} × {x.outputs}", f"{x.rank} × {x.inputs}",
                f"{x.outputs} × {x.rank}", f"{x.full:,}", f"{x.lora:,}", f"{x.share:.2f}",
                f"{x.claimed:.2f}"] for x in layers],
              f"In all {theory.total(layers):,} weights of LoRA; the record counted "
              f"{lora.any.record.parameters.trainable:,}. The share is r·(in + out) / "
              "(in · out); the often quoted r/d ignores that A and B are two matrices."),
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
            [f"operations of one {layer.name}, per token", "full", "LoRA", "LoRA / full"],
            [[name, f"{whole[name]:,}", f"{own[name]:,}", f"{own[name] / whole[name]:.3f}"]
             for name in own],
        ))  # fmt: skip
    blocks.append(Text(
        "From the shapes: 2 operations per weight and product. So the weights' gradients and the "
        "optimizer shrink to about the share above. Forward and the gradients of the inputs do not "
        "shrink but grow a little: LoRA adds O(n·d·r) to O(n·d²), it does not replace it. Of the "
        "three products of a layer (forward, backward to the inputs, backward to the weights) LoRA "
        "saves about the last; below the lowest adapter the second too."
    ))  # fmt: skip
    if found is not None:
        blocks.append(_measured(found, layers))
    return Section("Efficiency and theory", blocks)


def _measured(found: ArmComparison, layers: list[theory.Layer]) -> Table:
    seed = found.seeds[0]

    def step(arm: Arm, key: str) -> float:
        own = arm.runs[seed].record.cost.step
        return float(getattr(own, key)) / own.questions / 1e9

    def pair(name: str, value: Callable[[Arm], float], digits: int, expected: str) -> list[str]:
        adapter, full = value(found.adapter), value(found.full)
        share = f"{adapter / full:.3f}" if full else NONE
        return [name, f"{full:,.{digits}f}", f"{adapter:,.{digits}f}", share, expected]

    def backward(arm: Arm) -> float:
        return step(arm, "backward_operations") / step(arm, "forward_operations")

    added = sum(x.count * x.lora for x in layers)
    held = sum(x.count * x.full for x in layers)
    trained = theory.total(layers) / found.full.any.record.parameters.trainable
    rows = [
        pair("forward, GFLOP per question", lambda a: step(a, "forward_operations"), 3,
             "above 1, by what A and B add"),
        pair("backward, GFLOP per question", lambda a: step(a, "backward_operations"), 3,
             "about 0.5"),
        pair("backward / forward", backward, 2, "2 in full, 1 in LoRA"),
        pair("trainable weights", lambda a: a.any.record.parameters.trainable, 0,
             f"{trained:.4f}, from A and B"),
        pair("gradients and optimizer state, MB", lambda a: (
            a.runs[seed].record.cost.step.gradients_bytes
            + a.runs[seed].record.cost.step.optimizer_bytes) / MB, 2,
            "as trainable weights"),
        pair("train peak above imports, MB", lambda a: (
            fmean(a.values(lambda r: r.cost.peak_memory_bytes.train))
            - fmean(a.values(lambda r: r.cost.imports_bytes))) / MB, 0,
            "above that: weights and activations remain"),
        pair("seconds per step", lambda a: fmean(r.seconds_per_step for r in a.runs.values()), 3,
             "about 2/3 where products dominate"),
    ]  # fmt: skip
    return Table(
        ["measured", found.full.label, found.adapter.label, "LoRA / full", "expected"],
        rows,
        "Operations counted during a training step (matrix products; attention where it is not "
        f"fused), in the runs of seed {seed}, with shared contexts and logits only where there is "
        "a label, so a question costs less than its tokens would alone. In the adapted layers "
        f"A and B add {100 * added / held:.2f} % to the forward pass.",
    )
