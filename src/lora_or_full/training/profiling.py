"""What a run costs: seconds, questions, tokens, operations, and peak memory by phase."""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_or_full.modeling.kernels import onednn_is_faster
from lora_or_full.processes import is_first_process
from lora_or_full.training.console import profile_table
from lora_or_full.training.distributed import gathered
from lora_or_full.training.memory import ON_DEVICE, PeakMemory
from lora_or_full.training.memory_estimate import Model, largest_batch


class _Moment:
    """A moment, on a GPU that of its own work: Python runs ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.time = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def since(self, earlier: "_Moment") -> float:
        """Seconds since an earlier moment; on a GPU after it has been waited for."""
        if self.event is None or earlier.event is None:
            return self.time - earlier.time
        return earlier.event.elapsed_time(self.event) / 1000


class CostMonitor(L.Callback):
    """Measures training and evaluation separately, also across interruptions.

    A micro-batch lasts from the end of the one before, so that reading and copying it counts too.
    With several devices, questions and tokens are those of all, the peak is the largest of one, and
    seconds are those of the first, with which the others keep step.

    Args:
        earlier: Seconds that starts of the run before this one took, as far as they are known.
    """

    def __init__(self, earlier: float = 0.0) -> None:
        self.began, self.earlier = time.time(), earlier
        self.steps: list[float] = []  # seconds of each micro-batch, without validation
        self.moments: list[_Moment] = []  # not yet in `steps`
        self.samples = self.tokens = 0
        self.seconds = {"train": 0.0, "evaluation": 0.0}
        self.peak = {"train": 0, "evaluation": 0}
        self.memory = PeakMemory(torch.device("cpu"))
        self.imports = self.memory.read()  # what the process holds before there is a model

    @property
    def whole_seconds(self) -> float:
        """Seconds of all starts; of one that was killed those up to its last checkpoint."""
        return self.earlier + time.time() - self.began

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure."""
        self.memory = PeakMemory(pl_module.device)

    on_test_start = on_fit_start

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Note the time, where no micro-batch ended just now."""
        if not self.moments:
            self.moments.append(_Moment(self.memory.device))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, and add up questions and tokens."""
        self.moments.append(_Moment(self.memory.device))
        self.samples += batch["samples"]
        self.tokens += batch["tokens"]

    def on_validation_start(self, *_: Any) -> None:
        """Read seconds and peak of training."""
        self._read_moments()
        self._read_peak("train")
        self.evaluation_started = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        """Read seconds and peak of evaluation."""
        self.seconds["evaluation"] += time.perf_counter() - self.evaluation_started
        self._read_peak("evaluation")

    def on_test_end(self, *_: Any) -> None:
        """Read the peak of evaluation."""
        self._read_peak("evaluation")

    def state_dict(self) -> dict[str, Any]:
        """Measurements so far, over all devices."""
        self._read_moments()
        shares = gathered((self.samples, self.tokens, self.peak))
        return {
            "steps": self.steps,
            "samples": sum(samples for samples, _, _ in shares),
            "tokens": sum(tokens for _, tokens, _ in shares),
            "seconds": self.seconds,
            "peak": {phase: max(peak[phase] for *_, peak in shares) for phase in self.peak},
            "whole": self.whole_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the measurements of a checkpoint."""
        # A start that was stopped has noted more than its checkpoint, a killed one nothing.
        self.earlier = max(self.earlier, state_dict.pop("whole", 0.0))
        vars(self).update(state_dict)
        if not is_first_process():  # the first one counts for all
            self.samples = self.tokens = 0

    def summary(self) -> dict[str, Any]:
        """Give seconds, rates and peaks; the first micro-batch counts as warm-up."""
        total, devices, how = self.state_dict(), len(gathered(None)), self.memory.how
        busy = sum(self.steps[1:])
        rate = (len(self.steps) - 1) / len(self.steps) / busy if busy else 0.0
        return {
            "samples": total["samples"],
            "tokens": total["tokens"],
            "train_seconds": self.seconds["train"],
            "validation_seconds": self.seconds["evaluation"],
            "seconds_per_batch": statistics.median(self.steps[1:] or self.steps or [0.0]),
            "samples_per_second": total["samples"] * rate,
            "tokens_per_second": total["tokens"] * rate,
            "peak_memory_bytes": total["peak"],
            "reserved_bytes": self.memory.reserved(),
            "peak_memory_is": how + f", the largest of {devices} processes" * (devices > 1),
            "imports_bytes": self.imports if how not in ON_DEVICE.values() else 0,
        }

    def _read_moments(self) -> None:
        """Add the seconds between the moments. What follows, such as saving, is not counted."""
        if self.moments:
            _synchronize(self.memory.device)
        seconds = [end.since(begin) for begin, end in itertools.pairwise(self.moments)]
        self.steps += seconds
        self.seconds["train"] += sum(seconds)
        self.moments = []

    def _read_peak(self, phase: str) -> None:
        self.peak[phase] = max(self.peak[phase], self.memory.read())
        self.memory.reset()


class StepProfiler(L.Callback):
    """Profiles some training steps by torch's profiler.

    Args:
        save_dir: The run's folder, which gets profile.txt (all operations) and trace.json (for
            chrome://tracing or ui.perfetto.dev).
        warmup: Steps before the profiled ones.
        steps: Profiled steps.
    """

    def __init__(self, save_dir: str, warmup: int, steps: int) -> None:
        self.folder = Path(save_dir)
        plan = torch.profiler.schedule(wait=0, warmup=warmup, active=steps, repeat=1)
        self.profiler = torch.profiler.profile(schedule=plan, on_trace_ready=self.show)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start, on the first device."""
        if trainer.is_global_zero:
            self.profiler.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Go to the next step."""
        if trainer.is_global_zero:
            self.profiler.step()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop, and show what there is of fewer steps."""
        if trainer.is_global_zero:
            self.profiler.stop()

    def show(self, profiler: torch.profiler.profile) -> None:
        """Print the operations that took the most time, and write the files."""
        found = profiler.key_averages()
        on_gpu = any(event.self_device_time_total for event in found)
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        text = found.table(sort_by=order, row_limit=-1)
        (self.folder / "profile.txt").write_text(text, encoding="utf-8")
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        profile_table(found, order)


class OperationCounter(FlopCounterMode):
    """Counts the operations of matrix products, oneDNN's included.

    Torch counts none for the fused attention of CPUs. A call whose shapes its formulas do not know,
    such as attention with grouped heads on CUDA, is not counted: no run ends for a statistic.

    Attributes:
        missed: Number of calls that were not counted.
    """

    missed = 0

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super()._count_flops(func_packet, out, args, kwargs)
        except (AssertionError, TypeError, ValueError):
            self.missed += 1
            return out


def operation_counter() -> OperationCounter:
    """Give a counter of operations."""

    def product(left: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[0]

    own = {torch.ops.mkldnn._linear_pointwise: product} if onednn_is_faster() else {}
    return OperationCounter(display=False, custom_mapping=own)


def profile_step(
    module: L.LightningModule, data: L.LightningDataModule, trainer: L.Trainer
) -> dict[str, Any]:
    """Measure the memory and arithmetic of a training step, at the largest of the first batches.

    Returns:
        Bytes of the weights, their gradients, the optimizer's state, and the activations for the
        backward pass (the tensors that autograd saves, without weights); floating-point operations
        forward and backward; questions and tokens of the batch.
    """
    device = trainer.strategy.root_device
    module.to(device)  # Lightning moves it away at the end of a fit
    batch = module.transfer_batch_to_device(largest_batch(data), device, 0)
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in module.parameters()}
    saved: dict[int, int] = {}  # bytes of each storage

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
    module: L.LightningModule, data: L.LightningDataModule, trainer: L.Trainer, tests: int
) -> float:
    """Estimate the seconds of a run that answers the test set `tests` times, from a few batches."""
    device = trainer.strategy.root_device
    model = cast(Model, module.to(device))
    training, test = data.train_dataloader(), data.test_dataloader()

    def timed(batch: Any, work: Callable[[Any], Any]) -> float:
        batch = module.transfer_batch_to_device(batch, device, 0)
        started = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            work(batch)
        _synchronize(device)
        return time.perf_counter() - started

    seconds = [
        timed(batch, lambda b: model.loss_sum(b["sequences"])[0].backward())
        for batch in itertools.islice(training, 4)
    ]
    module.zero_grad()
    step = statistics.mean(seconds[1:] or seconds)  # the first one warms up
    module.eval()
    middle = test.collate_fn([test.dataset[n] for n in test.batch_sampler[len(test) // 2]])
    with torch.no_grad():
        answer = timed(middle, model.answers)
    module.train()
    epoch = step * len(training) + answer * len(data.val_dataloader())
    return (trainer.max_epochs or 1) * epoch + tests * answer * len(test)


def _synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that what it computes is timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
