"""The sections on cost: measured, as chosen by the recipe, and as theory predicts it."""

from collections import Counter
from collections.abc import Callable
from statistics import fmean

from lora_or_full.report import plots, theory
from lora_or_full.report.formatting import MB, NONE, mean_of
from lora_or_full.report.render import Block, Figure, Points, Section, Table, Text
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Arm, Run, Study
from lora_or_full.runs.schema import Cost, StepProfile

RECIPE = (
    "lr", "rank", "adapter", "batch_size", "max_length", "mask_prompt", "optimizer", "model.config",
    "data.train_size", "data.draw_by", "trainer.max_epochs", "trainer.gradient_clip_val",
)  # fmt: skip


def cost(study: Study) -> Section:
    """Write the section on memory, time and size."""
    columns: dict[str, tuple[Callable[[Run], float], float, int]] = {  # value, unit, digits
        "train peak, MB": (lambda run: run.record.cost.peak_memory_bytes.train, MB, 0),
        "evaluation peak, MB": (lambda run: run.record.cost.peak_memory_bytes.evaluation, MB, 0),
        "s per step": (lambda run: run.seconds_per_step, 1, 3),
        "training, s": (lambda run: run.record.cost.train_seconds, 1, 0),
        "validation, s": (lambda run: run.record.cost.validation_seconds, 1, 0),
        "whole run, s": (lambda run: run.record.cost.session_seconds, 1, 0),
        "questions/s": (lambda run: run.record.cost.samples_per_second, 1, 1),
        "tokens/s": (lambda run: run.record.cost.tokens_per_second, 1, 0),
        "on disk, MB": (lambda run: run.record.cost.exported_bytes, MB, 1),
    }
    rows = [
        [arm.label, *(mean_of(arm, *column) for column in columns.values())] for arm in study.arms
    ]
    components = {arm.label: _memory(arm) for arm in study.arms}
    how = study.arms[0].any.record.cost.peak_memory_is
    return Section("Ablation: memory, time, size", [
        Table(["", *columns], rows,
              f"Means over seeds. Peak memory: {how}. Seconds per step: the median without the "
              "first step and without validation. The whole run includes the tests before and "
              "after; for an interrupted run it counts from the last start. Only the first run of "
              "a study scores the model before fine-tuning. Tokens: of prompts and answers, a "
              "shared context counted for each question. On disk: the weights that a run exports."),
        Table(["MB", *components[study.arms[0].label], "peak"],
              [[label, *(f"{size:,.1f}" for size in own.values()), f"{sum(own.values()):,.1f}"]
               for label, own in components.items()],
              "Components of the measured peak in training, means over seeds. Activations: the "
              "tensors that autograd saves for the backward pass of the largest of the first "
              "batches, including copies of weights in lower precision. The rest is what these do "
              "not explain: temporary tensors, the data, the allocator's reserve; it is below zero "
              "if the others were never in memory at the same time."),
        Figure("memory", plots.memory(components), "Components of the peak memory in training."),
    ])  # fmt: skip


def _memory(arm: Arm) -> dict[str, float]:
    """Components of an arm's peak memory in training (MB), means over seeds; they add up to it."""
    known = {
        "imports": arm.values(lambda record: record.cost.imports_bytes),
        "weights": arm.values(lambda record: record.cost.step.weights_bytes),
        "gradients": arm.values(lambda record: record.cost.step.gradients_bytes),
        "optimizer state": arm.values(lambda record: record.cost.step.optimizer_bytes),
        "activations": arm.values(lambda record: record.cost.step.activations_bytes),
    }
    sizes = {name: fmean(values) for name, values in known.items()}
    peak = fmean(arm.values(lambda record: record.cost.peak_memory_bytes.train))
    sizes["rest"] = peak - sum(sizes.values())
    return {name: size / MB for name, size in sizes.items()}


def recipe(study: Study, found: ArmComparison | None) -> Section:
    """Write the section on the recipe of each arm."""
    rows = []
    configs = [arm.any.config for arm in study.arms]
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key) for config in configs]
        if key.startswith(RECIPE) or any(value != values[0] for value in values):
            rows.append([key, *(NONE if value is None else str(value) for value in values)])
    evidence = [
        f"mode={mode}: {count} configurations were run; the best on validation among those with "
        "the most seeds was chosen."
        if count > 1
        else f"mode={mode}: one configuration was run. Nothing here says that it is the best one."
        for mode, count in Counter(arm.mode for arm in study.masked).items()
    ]
    blocks: list[Block] = [
        Table(["", *(arm.label for arm in study.arms)], rows),
        Points(evidence),
    ]
    if found is not None:
        steps, sizes = zip(*(
            (mean_of(arm, lambda run: run.seconds_per_step, 1, 3),
             mean_of(arm, lambda run: run.record.cost.exported_bytes, MB, 1))
            for arm in (found.adapter, found.full)
        ), strict=True)  # fmt: skip
        blocks.append(Text(
            f"What {found.adapter.any.record.config.label} adds to full fine-tuning. To tune: rank,"
            " alpha, dropout and layers, and its own learning rate. In code: a library (PEFT) with "
            "one call that inserts the adapters, and checkpoints that hold only them. In use: a "
            "second set of weights that has to be loaded with, or merged into, its base. In time "
            f"and size here: {steps[0]} s per step instead of {steps[1]} s, and {sizes[0]} MB on "
            f"disk instead of {sizes[1]} MB."
        ))  # fmt: skip
    return Section("The recipe", blocks)


def efficiency(study: Study, found: ArmComparison | None) -> Section | None:
    """Write the section on LoRA's theory beside measurement; None without a LoRA arm."""
    lora = found.adapter if found else study.compared()[0]
    adapter = lora.any.record.config.adapter if lora else None
    layers = theory.lora_layers(lora.any.record.shapes) if lora else []
    if lora is None or adapter is None or not layers:
        return None
    one, alpha, factor = layers[0], adapter.lora_alpha, ""
    if alpha is not None:  # else PEFT's default
        factor = f", alpha = {alpha:g}, r = {one.rank}, so a factor of {alpha / one.rank:g}"
    if lora.any.record.model.type == "gpt2":
        factor += "; GPT-2 keeps W transposed (in × out), so BA is added transposed"
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
            f"The layer computes W'x with W' = W + (alpha/r)·BA{factor}. With x of {one.inputs} "
            f"numbers, Ax has {one.rank} and B(Ax) {one.outputs}. Gradients reach A and B alone; "
            "that of x is still needed, for the adapters in the layers below. B starts at zero, so "
            "the first step's gradient of A is zero too, and the model starts as its base."
        ),
    ]  # fmt: skip
    for layer in layers:
        own, whole = layer.operations(lora=True), layer.operations(lora=False)
        blocks.append(Table(
            [f"operations of one {layer.name}, per token", "full fine-tuning", "LoRA",
             "LoRA / full"],
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

    def step(arm: Arm) -> StepProfile:
        return arm.runs[seed].record.cost.step

    def per_question(arm: Arm, operations: int) -> float:
        return operations / step(arm).questions / 1e9

    def above_imports(cost: Cost) -> int:
        return cost.peak_memory_bytes.train - cost.imports_bytes

    added = theory.total(layers)
    held = sum(x.count * x.full for x in layers)
    trained = added / found.full.any.record.parameters.trainable
    measured: list[tuple[str, Callable[[Arm], float], int, str]] = [  # ..., digits, expected
        ("forward, GFLOP per question", lambda a: per_question(a, step(a).forward_operations), 3,
         "above 1, by what A and B add"),
        ("backward, GFLOP per question", lambda a: per_question(a, step(a).backward_operations), 3,
         "about 0.5"),
        ("backward / forward", lambda a: step(a).backward_operations / step(a).forward_operations,
         2, "2 in full, 1 in LoRA"),
        ("trainable weights", lambda a: a.any.record.parameters.trainable, 0,
         f"{trained:.4f}, from A and B"),
        ("gradients and optimizer state, MB",
         lambda a: (step(a).gradients_bytes + step(a).optimizer_bytes) / MB, 2,
         "as trainable weights"),
        ("train peak above imports, MB",
         lambda a: fmean(a.values(lambda r: above_imports(r.cost))) / MB, 0,
         "above that: weights and activations remain"),
        ("seconds per step", lambda a: fmean(r.seconds_per_step for r in a.runs.values()), 3,
         "about 2/3 where products dominate"),
    ]  # fmt: skip
    rows = []
    for name, value, digits, expected in measured:
        adapter, full = value(found.adapter), value(found.full)
        share = f"{adapter / full:.3f}" if full else NONE
        rows.append([name, f"{full:,.{digits}f}", f"{adapter:,.{digits}f}", share, expected])
    return Table(
        ["measured", found.full.label, found.adapter.label, "LoRA / full", "expected"],
        rows,
        "Operations counted during a training step (matrix products; attention where it is not "
        f"fused), in the runs of seed {seed}, with shared contexts and logits only where there is "
        "a label, so a question costs less than its tokens would alone. In the adapted layers "
        f"A and B add {100 * added / held:.2f} % to the forward pass.",
    )
