"""What a run costs: seconds, samples, tokens, operations, and peak memory by phase."""

import ctypes
import gc
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lora_or_full.modeling.kernels import onednn_is_faster
from lora_or_full.processes import is_first_process
from lora_or_full.training.distributed import gathered


class Model(Protocol):
    """What profiling needs of the LightningModule besides Lightning's own."""

    def loss_sum(self, sequences: Any, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the loss over labels, and count them."""

    def answers(self, batch: Any, /) -> Any:
        """Answer a batch."""


class Data(Protocol):
    """What profiling needs of the LightningDataModule."""

    devices: int

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of an epoch."""

    def val_dataloader(self) -> DataLoader:
        """Validation batches."""

    def test_dataloader(self, skip: int = 0) -> DataLoader:
        """Test batches without the first `skip`."""


ON_CUDA = "allocated on CUDA"
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Peak memory since the last `reset`, in bytes.

    On CUDA it is what torch allocated on the device; elsewhere the resident set of the process.
    Only Linux can reset the latter; elsewhere the peak is that of the whole process so far. A reset
    first returns free memory to the system, so that a phase does not count what the one before it
    used.

    Attributes:
        how: How the peak is measured, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.how = ON_CUDA if device.type == "cuda" else "resident set"
        if device.type != "cuda" and not self._reset_resident():
            self.how = "resident set, of the whole process so far"

    def reset(self) -> None:
        """Start to measure anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._reset_resident()

    def read(self) -> int:
        """Give the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if STATUS.is_file():
            line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def now(self) -> int:
        """Reset, and give the memory in use in bytes."""
        self.reset()
        return self.read()

    def _reset_resident(self) -> bool:
        gc.collect()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        try:
            CLEAR.write_text("5")  # proc(5): resets VmHWM
        except OSError:
            return False
        return True


class CostMonitor(L.Callback):
    """Measures training and evaluation separately, also across interruptions.

    With several devices, questions and tokens are those of all, the peak is the largest of one, and
    seconds are the first one's, with which the others keep step.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []  # seconds of each micro-batch, without validation
        self.samples = self.tokens = 0
        self.seconds = {"train": 0.0, "evaluation": 0.0}
        self.peak = {"train": 0, "evaluation": 0}
        self.how = ""
        # What the process holds before there is a model.
        self.imports = PeakMemory(torch.device("cpu")).now()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure."""
        self._start(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure."""
        self._start(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        self.started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add up seconds, questions and tokens."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self.started
        self.steps.append(seconds)
        self.seconds["train"] += seconds
        self.samples += batch["samples"]
        self.tokens += batch["tokens"]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the peak of training."""
        self._read("train")
        self.evaluation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read seconds and peak of evaluation."""
        self.seconds["evaluation"] += time.perf_counter() - self.evaluation_started
        self._read("evaluation")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the peak of evaluation."""
        self._read("evaluation")

    def state_dict(self) -> dict[str, Any]:
        """Measurements so far, over all devices."""
        shares = gathered((self.samples, self.tokens, self.peak))
        return {
            "steps": self.steps,
            "samples": sum(samples for samples, _, _ in shares),
            "tokens": sum(tokens for _, tokens, _ in shares),
            "seconds": self.seconds,
            "peak": {phase: max(peak[phase] for *_, peak in shares) for phase in self.peak},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the measurements of a checkpoint."""
        for name, value in state_dict.items():
            setattr(self, name, value)
        if not is_first_process():  # the first one counts for all
            self.samples = self.tokens = 0

    def summary(self) -> dict[str, Any]:
        """Give seconds, rates and peaks; the first micro-batch counts as warm-up."""
        of_all = self.state_dict()
        busy = sum(self.steps[1:])
        devices = len(gathered(None))
        of_one = f", the largest of {devices} processes" if devices > 1 else ""
        rate = (len(self.steps) - 1) / len(self.steps) / busy if busy else 0.0
        return {
            "samples": of_all["samples"],
            "tokens": of_all["tokens"],
            "train_seconds": self.seconds["train"],
            "validation_seconds": self.seconds["evaluation"],
            "seconds_per_batch": statistics.median(self.steps[1:] or self.steps or [0.0]),
            "samples_per_second": of_all["samples"] * rate,
            "tokens_per_second": of_all["tokens"] * rate,
            "peak_memory_bytes": of_all["peak"],
            "peak_memory_is": self.how + of_one,
            "imports_bytes": self.imports if self.how != ON_CUDA else 0,
        }

    def _start(self, pl_module: L.LightningModule) -> None:
        self.memory = PeakMemory(pl_module.device)
        self.how = self.memory.how
        self.memory.reset()

    def _read(self, phase: str) -> None:
        self.peak[phase] = max(self.peak[phase], self.memory.read())
        self.memory.reset()


def operation_counter() -> FlopCounterMode:
    """Give a counter of the operations of matrix products, oneDNN's included.

    Torch counts none for the fused attention of CPUs.
    """

    def product(left: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[0]

    own = {torch.ops.mkldnn._linear_pointwise: product} if onednn_is_faster() else {}
    return FlopCounterMode(display=False, custom_mapping=own)


def profile_step(module: L.LightningModule, data: Data, trainer: L.Trainer) -> dict[str, Any]:
    """Measure the memory and arithmetic of a training step, at the largest of the first batches.

    Returns:
        Bytes of the weights, their gradients, the optimizer's state, and the activations for the
        backward pass (the tensors that autograd saves, without weights); floating-point operations
        forward and backward; questions and tokens of the batch.
    """
    device = trainer.strategy.root_device
    module.to(device)  # Lightning moves it away at the end of a fit
    first = itertools.islice(data.train_dataloader(), 200)
    batch = max(first, key=lambda batch: int(batch["tokens"]))
    batch = module.transfer_batch_to_device(batch, device, 0)
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in module.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.train()
    module.zero_grad()
    with trainer.precision_plugin.forward_context(), operation_counter() as forward:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = cast(Model, module).loss_sum(batch["sequences"])
        activations = sum(saved.values())
    with operation_counter() as backward:
        loss.backward()
    gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    module.zero_grad()
    states = [value for o in trainer.optimizers for s in o.state.values() for value in s.values()]
    return {
        "weights_bytes": sum(storage.nbytes() for storage in weights.values()),
        "gradients_bytes": gradients,
        "optimizer_bytes": sum(v.nbytes for v in states if isinstance(v, torch.Tensor)),
        "activations_bytes": activations,
        "forward_operations": forward.get_total_flops(),
        "backward_operations": backward.get_total_flops(),
        "questions": batch["samples"],
        "tokens": batch["tokens"],
    }


def estimate_duration(
    module: L.LightningModule, data: Data, trainer: L.Trainer, tests: int
) -> float:
    """Estimate the seconds of the whole run from a few batches timed now.

    Args:
        module: The model.
        data: Its data.
        trainer: The trainer of the run.
        tests: How often the test set will be answered.
    """
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    model = cast(Model, module.to(device))
    training, test = data.train_dataloader(), data.test_dataloader()

    def timed(batch: Any, work: Callable[[Any], Any]) -> float:
        batch = module.transfer_batch_to_device(batch, device, 0)
        started = time.perf_counter()
        with precision.forward_context():
            work(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds = [
        timed(batch, lambda b: model.loss_sum(b["sequences"])[0].backward())
        for batch in itertools.islice(training, 4)
    ]
    module.zero_grad()
    step = statistics.mean(seconds[1:] or seconds)
    module.eval()
    middle = next(iter(data.test_dataloader(skip=data.devices * (len(test) // 2))))
    with torch.no_grad():
        answer = timed(middle, model.answers)
    module.train()
    validation = answer * len(data.val_dataloader())
    epochs = trainer.max_epochs or 1
    return epochs * (step * len(training) + validation) + tests * answer * len(test)
