"""The measured peak, and free memory that is returned."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_or_full.training import memory
from lora_or_full.training.memory import PeakMemory

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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
