"""The memory of a step that is computed, against what torch's own profiler counts; peaks."""

import copy
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import FULL
from torch.profiler import ProfilerActivity, profile

import experiment
from lora_or_full.config.schema import validate
from lora_or_full.errors import UserError
from lora_or_full.modeling.precision import autocast_for
from lora_or_full.training import memory
from lora_or_full.training.memory import PeakMemory

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
    sequences = memory.largest_batch(data)["sequences"]
    precision = settings["trainer"]["precision"]
    before = [p.clone() for p in module.parameters()]
    found = memory.tensor_bytes(module, sequences, precision)
    assert all(p.grad is None for p in module.parameters())
    assert all(map(torch.equal, before, module.parameters()))
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in before}
    held = sum(sizes.values()) + 2 * sum(
        p.nbytes for p in module.trainable_parameters().values()
    )  # weights, and two moments
    expected = held + allocated(module, sequences, precision, tmp_path / "trace.json")
    assert found == pytest.approx(expected, rel=memory.ACCURACY / 2)


def test_a_step_in_half_precision_has_half_the_weights(settings: dict[str, Any]) -> None:
    settings["model"]["name"] = str(BUILTIN)
    data, module = built(settings | FULL)
    sequences = memory.largest_batch(data)["sequences"]
    whole, half = (memory.tensor_bytes(module, sequences, p) for p in ("32-true", "bf16-true"))
    assert 0.5 < half / whole < 0.6  # the loss is computed in float32
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_what_does_not_fit_on_a_gpu_is_refused_with_the_keys_that_help(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["optimizer"]["warmup_steps"] = 0
    data, module = built(settings | FULL)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a small card")
    assert memory.check_memory(module, data, trainer_on(CPU)) is None
    needed = memory.needed_bytes(module, data, 1)
    for free, fits in ((needed, True), (0.9 * needed, True), (0.8 * needed, False)):
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 2 * needed)
        )
        if fits:
            assert memory.check_memory(module, data, trainer_on(GPU)) == (needed, int(free))
            continue
        with pytest.raises(UserError) as refusal:
            memory.check_memory(module, data, trainer_on(GPU))
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
        memory.memory_explained(config),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")


def test_memory_is_read_from_the_moment_of_the_reset() -> None:
    peak = PeakMemory(CPU)
    before = peak.read()
    taken = torch.ones(50_000_000)
    assert peak.read() - before > 0.9 * taken.nbytes
    del taken
    peak.reset()
    assert peak.read() - before < 100_000_000


def test_on_metal_memory_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 123)
    peak = PeakMemory(torch.device("mps"))
    assert (peak.how, peak.read(), peak.reserved(), freed) == (
        memory.ON_DEVICE["mps"],
        123,
        0,
        [True],
    )


def test_free_memory_is_returned_before_each_step_that_is_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    returned: list[int] = []
    callback = memory.FreeMemory()
    for device in (CPU, GPU):
        for number, length in enumerate((5, 3, 5, 8, 2)):
            monkeypatch.setattr(memory, "return_free_memory", partial(returned.append, number))
            batch = {"sequences": SimpleNamespace(input_ids=torch.zeros(1, length))}
            module: Any = SimpleNamespace(device=device)
            trainer: Any = None
            callback.on_train_batch_start(trainer, module, batch, number)
        callback.largest = 0
    assert returned == [0, 3]
