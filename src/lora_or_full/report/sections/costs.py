"""The sections on cost: measured, as chosen by the recipe, and as theory predicts it."""

from collections import Counter
from collections.abc import Callable
from statistics import fmean

from lora_or_full.report import plots, theory
from lora_or_full.report.formatting import MB, NONE, cell, mean_of
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Arm, Run, Study

RECIPE = (
    "lr", "rank", "adapter", "batch_size", "max_length", "mask_prompt", "optimizer", "model.config",
    "data.train_size", "data.draw_by", "trainer.max_epochs", "trainer.gradient_clip_val",
)  # fmt: skip
# What `_measured` gives: its name, digits, and what theory expects of LoRA's divided by full's.
MEASURED = (
    ("forward, GFLOP per question", 3, "above 1, by what A and B add"),
    ("backward, GFLOP per question", 3, "about 0.5"),
    ("backward / forward", 2, "2 in full, 1 in LoRA"),
    ("trainable weights", 0, "{trained:.4f}, from A and B"),
    ("gradients and optimizer state, MB", 2, "as trainable weights"),
    ("train peak above imports, MB", 0, "above that: weights and activations remain"),
    ("seconds per step", 3, "about 2/3 where products dominate"),
)


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
    components = {arm.label: _memory(arm) for arm in study.arms}
    return section(
        "cost",
        measured=[
            {"": arm.label} | {name: mean_of(arm, *column) for name, column in columns.items()}
            for arm in study.arms
        ],
        components=[
            {"MB": label}
            | {name: f"{size:,.1f}" for name, size in (own | {"peak": sum(own.values())}).items()}
            for label, own in components.items()
        ],
        peak_memory_is=study.arms[0].any.record.cost.peak_memory_is,
        plot=plots.memory(components),
    )


def _memory(arm: Arm) -> dict[str, float]:
    """Components of an arm's peak memory in training (MB), means over seeds; they add up to it."""
    sizes = {
        "imports": fmean(arm.values(lambda record: record.cost.imports_bytes)),
        "weights": fmean(arm.values(lambda record: record.cost.step.weights_bytes)),
        "gradients": fmean(arm.values(lambda record: record.cost.step.gradients_bytes)),
        "optimizer state": fmean(arm.values(lambda record: record.cost.step.optimizer_bytes)),
        "activations": fmean(arm.values(lambda record: record.cost.step.activations_bytes)),
    }
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
            rows.append([key, *map(cell, values)])
    compared = (found.adapter, found.full) if found else ()
    return section(
        "recipe",
        head=["", *(arm.label for arm in study.arms)],
        rows=rows,
        evidence=[
            f"mode={mode}: {count} configurations were run; the best on validation among those "
            "with the most seeds was chosen."
            if count > 1
            else f"mode={mode}: one configuration was run. Nothing here says that it is the best "
            "one."
            for mode, count in Counter(arm.mode for arm in study.masked).items()
        ],
        found=found,
        steps=[mean_of(arm, lambda run: run.seconds_per_step, 1, 3) for arm in compared],
        sizes=[mean_of(arm, lambda run: run.record.cost.exported_bytes, MB, 1) for arm in compared],
    )


def efficiency(study: Study, found: ArmComparison | None) -> Section | None:
    """Write the section on LoRA's theory beside measurement; None without a LoRA arm."""
    lora = found.adapter if found else study.compared()[0]
    adapter = lora.any.record.config.adapter if lora else None
    layers = theory.lora_layers(lora.any.record.shapes) if lora else []
    if lora is None or adapter is None or not layers:
        return None
    weights = theory.total(layers)
    measured = []
    if found is not None:
        arms = (found.full, found.adapter)
        numbers = zip(MEASURED, *(_measured(arm, found.seeds[0]) for arm in arms), strict=True)
        trained = weights / found.full.any.record.parameters.trainable
        measured = [
            [
                name,
                f"{full:,.{digits}f}",
                f"{own:,.{digits}f}",
                f"{own / full:.3f}" if full else NONE,
                expected.format(trained=trained),
            ]
            for (name, digits, expected), full, own in numbers
        ]
    return section(
        "efficiency",
        found=found,
        record=lora.any.record,
        alpha=adapter.lora_alpha,
        layer=layers[0],
        weights=weights,
        shapes=[
            {
                "layer": layer.name,
                "how many": layer.count,
                "W": f"{layer.inputs} × {layer.outputs}",
                "A": f"{layer.rank} × {layer.inputs}",
                "B": f"{layer.outputs} × {layer.rank}",
                "weights of W": f"{layer.full:,}",
                "of A and B": f"{layer.lora:,}",
                "share, %": f"{layer.share:.2f}",
                "r/d, %": f"{layer.claimed:.2f}",
            }
            for layer in layers
        ],
        operations=[
            [
                {
                    f"operations of one {layer.name}, per token": name,
                    "full fine-tuning": f"{full:,}",
                    "LoRA": f"{own:,}",
                    "LoRA / full": f"{own / full:.3f}",
                }
                for (name, own), full in zip(
                    layer.operations(lora=True).items(),
                    layer.operations(lora=False).values(),
                    strict=True,
                )
            ]
            for layer in layers
        ],
        measured=measured,
        added=100 * weights / sum(layer.count * layer.full for layer in layers),
    )


def _measured(arm: Arm, seed: int) -> tuple[float, ...]:
    step = arm.runs[seed].record.cost.step
    return (
        step.forward_operations / step.questions / 1e9,
        step.backward_operations / step.questions / 1e9,
        step.backward_operations / step.forward_operations,
        arm.any.record.parameters.trainable,
        (step.gradients_bytes + step.optimizer_bytes) / MB,
        fmean(arm.values(lambda r: r.cost.peak_memory_bytes.train - r.cost.imports_bytes)) / MB,
        fmean(run.seconds_per_step for run in arm.runs.values()),
    )
