"""The sections on cost: measured, as chosen by the recipe, and as theory predicts it."""

from collections import Counter
from statistics import fmean

from lora_or_full.report import plots, theory
from lora_or_full.report.formatting import MB
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats.comparison import Comparison
from lora_or_full.report.study import Arm, Study

RECIPE = (
    "lr", "rank", "adapter", "batch_size", "max_length", "mask_prompt", "optimizer", "scheduler",
    "callbacks", "model.config", "data.train_size", "data.draw_by", "trainer.max_epochs",
    "trainer.gradient_clip_val",
)  # fmt: skip


def cost(study: Study) -> Section:
    """Write the section on memory, time and size."""
    arms = study.by_hardware
    components = {arm.label: _memory(arm) for arm in arms}
    ways = dict.fromkeys(arm.any.record.cost.peak_memory_is for arm in arms)
    return section(
        "cost", arms=arms, ways=ways, components=components, plot=plots.memory(components)
    )


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


def recipe(study: Study, found: Comparison | None) -> Section:
    """Write the section on the recipe of each arm."""
    configs = [arm.config for arm in study.arms]
    keys = dict.fromkeys(key for config in configs for key in config)
    settings = {key: [config.get(key) for config in configs] for key in keys}
    return section(
        "recipe",
        study=study,
        found=found,
        settings={
            key: values
            for key, values in settings.items()
            if key.startswith(RECIPE) or any(value != values[0] for value in values)
        },
        configurations=Counter(arm.mode for arm in study.masked),
    )


def efficiency(study: Study, found: Comparison | None) -> Section | None:
    """Write the section on LoRA's theory beside measurement; None without a LoRA arm.

    It is on the first arm that trains nothing but LoRA's two matrices.
    """
    for lora in found.arms if found else study.arms:
        layers = theory.lora_layers(lora.any.record.shapes)
        if layers and theory.total(layers) == lora.any.record.parameters.trainable:
            break
    else:
        return None
    pair = next((pair for pair in found.pairs if pair.arm is lora), None) if found else None
    # LoRA against full fine-tuning, on the same hardware.
    alike = None if pair is None or pair.reference.has_adapter else pair.alike
    return section(
        "efficiency",
        alike=alike,
        lora=lora,
        adamw=lora.any.record.config.optimizer.target == "torch.optim.AdamW",
        layers=layers,
        added=theory.total(layers),
        held=sum(layer.count * layer.full for layer in layers),
        measured=list(zip(*map(_measured, reversed(alike)), strict=True)) if alike else [],
    )


def _measured(arm: Arm) -> tuple[float, ...]:
    """What the last table of the section on efficiency compares."""
    step = arm.any.record.cost.step
    return (
        step.forward_operations / step.questions / 1e9,
        step.backward_operations / step.questions / 1e9,
        step.backward_operations / step.forward_operations,
        arm.any.record.parameters.trainable,
        (step.gradients_bytes + step.optimizer_bytes) / MB,
        fmean(arm.values(lambda r: r.cost.peak_memory_bytes.train - r.cost.imports_bytes)) / MB,
        fmean(run.seconds_per_step for run in arm.runs.values()),
    )
