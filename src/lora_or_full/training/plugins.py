"""What a run takes from conf/ by `_target_`: loggers, callbacks, the optimizer and its schedule."""

from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    Checkpoint,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger
from torch.optim.lr_scheduler import LRScheduler

from lora_or_full.config.schema import Config
from lora_or_full.config.targets import build
from lora_or_full.errors import UserError, first_line

# Callbacks that would change what a run does itself, and what there is instead.
RESERVED: dict[type[Callback], str] = {
    Checkpoint: "It saves every checkpoint_minutes, and exports the epoch with the best F1.",
    GradientAccumulationScheduler: "Micro-batches of a step: trainer.accumulate_grad_batches.",
    BatchSizeFinder: "Questions per step: batch_size.",
    LearningRateFinder: "Learning rates: a sweep, -m lr=1e-4,1e-3.",
    StochasticWeightAveraging: "The weights of the best epoch are scored, not an average.",
    WeightAveraging: "The weights of the best epoch are scored, not an average.",
}


def logged(config: Config) -> list[str]:
    """Give the names that a run logs by itself, but the learning rate's."""
    return [
        "train/loss", "train/epoch_loss", "validation/loss",
        *(f"validation/{metric}" for metric in config.metrics),
    ]  # fmt: skip


def loggers(config: Config, folder: Path, step: int) -> list[Logger]:
    """Build the loggers for the run in `folder`, to resume from an optimizer step.

    Raises:
        UserError: One of them can't be built.
    """
    given = {"save_dir": str(folder), "name": folder.name, "run_name": folder.name}
    return [
        build(f"logger.{name}", settings, Logger, **given, purge_step=step)
        for name, settings in config.logger.items()
    ]


def callbacks(config: Config, folder: Path) -> list[Callback]:
    """Build the callbacks for the run in `folder`.

    Raises:
        UserError: One of them can't be built, or does what a run does itself.
    """
    built = []
    for name, settings in config.callbacks.items():
        key = f"callbacks.{name}"
        callback = build(key, settings, Callback, save_dir=str(folder))
        for kind, way in RESERVED.items():
            if isinstance(callback, kind):
                target = settings["_target_"]
                raise UserError(f"{key}._target_={target}: a run does this itself. {way}")
        # Where another callback logs too, it may be one of its names.
        names, monitor = logged(config), getattr(callback, "monitor", None)
        if len(config.callbacks) == 1 and monitor not in (None, *names):
            raise UserError(f"{key}.monitor={monitor}: must be one of {', '.join(names)}.")
        built.append(callback)
    return built


def optimizer(
    config: Config, weights: Iterable[torch.nn.Parameter], scaled: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer of some weights.

    Args:
        config: The run's configuration.
        weights: What it updates.
        scaled: Whether gradients are scaled: a fused optimizer unscales them only after they are
            clipped.

    Raises:
        UserError: It can't be built for these weights.
    """
    settings = config.optimizer.model_dump(by_alias=True, exclude_unset=True)
    if scaled and settings.get("fused"):
        settings["fused"] = False
    kind = torch.optim.Optimizer
    return build("optimizer", settings, kind, params=list(weights), lr=config.lr)


def schedule(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Build the learning-rate schedule of a training of so many optimizer steps.

    Raises:
        UserError: It can't be built.
    """
    settings = config.scheduler.model_dump(by_alias=True, exclude_unset=True)
    length = dict.fromkeys(("num_training_steps", "total_steps", "T_max"), steps)
    return build("scheduler", settings, None, optimizer=optimizer, **length)


def state_share(config: Config) -> float:
    """Give the size of the optimizer's state in sizes of the weights: 2 for AdamW's two moments.

    It is measured in a step of a small weight.

    Raises:
        UserError: The optimizer or its schedule can't be built, or can't take a step.
    """
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    tried = optimizer(config, [weight])
    planned = schedule(config, tried, 10)
    for key, one in (("optimizer", tried), ("scheduler", planned)):
        try:
            one.step()
        except Exception as error:  # some need more than a gradient: a closure, sparse ones, a loss
            name = getattr(config, key).target
            raise UserError(f"{key}._target_={name} can't be used: {first_line(error)}") from None
    state = [value for value in tried.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in state if value.dim()) / weight.nbytes
