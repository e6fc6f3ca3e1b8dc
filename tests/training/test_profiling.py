"""What a step consists of: bytes and operations, against what the shapes say."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from configs import FULL

import experiment
from lora_or_full.config.schema import validate
from lora_or_full.training import profiling
from lora_or_full.training.profiling import CostMonitor, profile_step


def parts_of(settings: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Any]:
    """The profile_step of a module that was trained for an epoch, and the module."""
    data, module, _ = experiment.build(validate(settings))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    parts = profile_step(module, data, trainer)
    for name, weight in module.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.grad is None
    return parts, module


@pytest.fixture
def full(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | FULL


def test_lora_and_full_have_the_bytes_that_their_weights_say(
    settings: dict[str, Any], full: dict[str, Any], tmp_path: Path
) -> None:
    for own in (settings, full):
        parts, module = parts_of(own, tmp_path)
        trained = sum(4 * p.numel() for p in module.trainable_parameters().values())
        assert parts["gradients_bytes"] == trained
        # two moments, and a counter each weight
        assert parts["optimizer_bytes"] == 2 * trained + 4 * len(module.trainable_parameters())
        assert parts["weights_bytes"] == sum(4 * p.numel() for p in module.parameters())
        assert parts["activations_bytes"] > 0


def test_lora_saves_the_gradients_of_weights_and_no_other_arithmetic(
    settings: dict[str, Any], full: dict[str, Any], tmp_path: Path
) -> None:
    lora, whole = parts_of(settings, tmp_path)[0], parts_of(full, tmp_path)[0]
    assert lora["tokens"] == whole["tokens"]
    assert lora["questions"] == whole["questions"] == 4
    assert lora["forward_operations"] >= whole["forward_operations"]
    # Less than a product for each forward: the first layer's input needs no gradient.
    assert 0.5 < lora["backward_operations"] / lora["forward_operations"] < 1.3
    assert 1.5 < whole["backward_operations"] / whole["forward_operations"] < 2.3


def test_the_times_of_all_starts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(profiling.time, "time", lambda: now)
    first = CostMonitor()
    now += 50
    saved = first.state_dict()
    now += 10
    stopped = first.whole_seconds
    for noted, whole in ((stopped, 60), (0.0, 50)):  # stopped, or killed after the checkpoint
        resumed = CostMonitor(noted)
        now += 3
        resumed.load_state_dict(dict(saved))
        now += 4
        assert resumed.whole_seconds == whole + 7
