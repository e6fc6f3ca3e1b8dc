"""The sections on cost: measured, as chosen by the recipe, and as theory predicts it."""

from collections import Counter
from statistics import fmean

from lora_or_full.report import plots, theory
from lora_or_full.report.formatting import MB
from lora_or_full.report.render import Section, section
from lora_or_full.report.stats.comparison import ArmComparison
from lora_or_full.report.study import Arm, Study

RECIPE = (
    "lr", "rank", "adapter", "batch_size", "max_length", "mask_prompt", "optimizer", "model.config",
    "data.train_size", "data.draw_by", "trainer.max_epochs", "trainer.gradient_clip_val",
)  # fmt: skip


def cost(study: Study) -> Section:
    """Write the section on memory, time and size."""
    components = {arm.label: _memory(arm) for arm in study.arms}
    return section("cost", study=study, components=components, plot=plots.memory(components))


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
    configs = [arm.any.config for arm in study.arms]
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


def efficiency(study: Study, found: ArmComparison | None) -> Section | None:
    """Write the section on LoRA's theory beside measurement; None without a LoRA arm."""
    lora = found.adapter if found else study.compared()[0]
    layers = theory.lora_layers(lora.any.record.shapes) if lora else []
    if lora is None or not lora.has_adapter or not layers:
        return None
    measured = (
        [_measured(arm, found.seeds[0]) for arm in (found.full, found.adapter)] if found else []
    )
    return section(
        "efficiency",
        found=found,
        lora=lora,
        layers=layers,
        added=theory.total(layers),
        held=sum(layer.count * layer.full for layer in layers),
        measured=list(zip(*measured, strict=True)),
    )


def _measured(arm: Arm, seed: int) -> tuple[float, ...]:
    """What the last table of the section on efficiency compares."""
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
