"""The memory of a step that is computed, against what torch's own profiler counts."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import FULL
from torch.profiler import ProfilerActivity, profile

import experiment
from lora_or_full.config.compose import compose
from lora_or_full.config.schema import validate
from lora_or_full.errors import UserError
from lora_or_full.modeling.precision import autocast_for
from lora_or_full.training import memory_estimate

BUILTIN = Path(__file__).parents[2] / "assets" / "model"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def built(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Data and module, with dense gradients, as on a GPU."""
    data, module, _ = experiment.build(validate(settings))
    for layer in module.modules():
        if isinstance(layer, torch.nn.Embedding):
            layer.sparse = False
    return data, module


def trainer_on(device: torch.device) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=device), world_size=1)


def allocated(module: Any, sequences: Any, precision: str, file: Path) -> int:
    """Bytes that a real step has allocated at its peak, as torch's profiler counts them."""

    def step() -> None:
        with autocast_for(precision, CPU):
            loss, _ = module.loss_sum(sequences)
        loss.backward()

    step()  # what is made once, such as the position table
    module.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    module.zero_grad()
    found.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


BF16 = {"trainer": {"precision": "bf16-mixed"}}
AGAIN = {"model": {"gradient_checkpointing": True}}


@pytest.mark.parametrize(
    ("mode", "rows", "change"),
    [
        ("lora", True, {}), ("lora", True, BF16), ("lora", True, BF16 | AGAIN),
        ("lora", False, AGAIN), ("full", True, BF16), ("full", True, AGAIN), ("full", False, {}),
        ("full", False, {"packing": False}),
    ],
    ids=str,
)  # fmt: skip
def test_the_bytes_of_a_step_are_those_that_it_allocates(
    mode: str, rows: bool, change: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """On the built-in model: in a tiny one a mask weighs as much as an activation."""
    settings = copy.deepcopy(settings) | (FULL if mode == "full" else {})
    settings["model"]["name"] = str(BUILTIN)
    for key, value in change.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    data, module = built(settings)
    data.in_rows = rows
    sequences = memory_estimate.largest_batch(data)["sequences"]
    precision = settings["trainer"]["precision"]
    before = [p.clone() for p in module.parameters()]
    found = memory_estimate.tensor_bytes(module, sequences, precision)
    assert all(p.grad is None for p in module.parameters())
    assert all(map(torch.equal, before, module.parameters()))
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in before}
    held = sum(sizes.values()) + 2 * sum(
        p.nbytes for p in module.trainable_parameters().values()
    )  # weights, and two moments
    expected = held + allocated(module, sequences, precision, tmp_path / "trace.json")
    assert found == pytest.approx(expected, rel=memory_estimate.ACCURACY / 2)


def test_a_step_in_half_precision_has_half_the_weights(settings: dict[str, Any]) -> None:
    settings["model"]["name"] = str(BUILTIN)
    data, module = built(settings | FULL)
    sequences = memory_estimate.largest_batch(data)["sequences"]
    whole, half = (
        memory_estimate.tensor_bytes(module, sequences, p) for p in ("32-true", "bf16-true")
    )
    assert 0.5 < half / whole < 0.6  # the loss is computed in float32
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_another_optimizer_needs_memory_for_its_own_state(settings: dict[str, Any]) -> None:
    found = []
    for name in ("adamw", "sgd"):  # two moments, one
        settings["optimizer"] = compose([f"optimizer={name}"])["optimizer"]
        data, module = built(settings | FULL)
        sequences = memory_estimate.largest_batch(data)["sequences"]
        found.append(memory_estimate.tensor_bytes(module, sequences, "32-true"))
    assert found[0] - found[1] == 4 * module.size["trainable"]


def test_what_does_not_fit_on_a_gpu_is_refused_with_the_keys_that_help(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, module = built(settings | FULL)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a small card")
    assert memory_estimate.check_memory(module, data, trainer_on(CPU)) is None
    needed = memory_estimate.needed_bytes(module, data, 1)
    for free, fits in ((needed, True), (0.9 * needed, True), (0.8 * needed, False)):
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 2 * needed)
        )
        if fits:
            assert memory_estimate.check_memory(module, data, trainer_on(GPU)) == (
                needed,
                int(free),
            )
            continue
        with pytest.raises(UserError) as refusal:
            memory_estimate.check_memory(module, data, trainer_on(GPU))
        text = str(refusal.value)
        assert text.startswith(f"Training needs about {needed / 1e9:.1f} GB of memory, and a small")
        for key in (
            "trainer.accumulate_grad_batches=2", "model.gradient_checkpointing=true",
            "trainer.precision=bf16-mixed", "a mode with an adapter", "max_length",
        ):  # fmt: skip
            assert key in text


def test_memory_that_runs_out_is_explained(settings: dict[str, Any]) -> None:
    config = validate(settings)
    with (
        pytest.raises(UserError, match=r"^CUDA out of memory.*accumulate_grad_batches=2"),
        memory_estimate.memory_explained(config),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
