"""Memory: the measured peak, and what is free returned to the system."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

ON_DEVICE = {"cuda": "allocated on CUDA", "mps": "allocated by Metal's driver"}
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def return_free_memory() -> None:
    """Give memory that the C library keeps for later back to the system (glibc on Linux)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


class FreeMemory(L.Callback):
    """Returns free memory before each step that is larger than all before.

    What shorter steps have left free is in pieces that its tensors do not fit into: the peak of
    LoRA on all layers of SmolLM2 would be a third higher. On a CPU only.
    """

    largest = 0  # computed tokens

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Return it, if this step is the largest so far."""
        size = batch["sequences"].input_ids.numel()
        if size > self.largest and pl_module.device.type == "cpu":
            return_free_memory()
        self.largest = max(size, self.largest)


class PeakMemory:
    """Peak memory since the last `reset`, in bytes.

    On CUDA it is what torch allocated on the device, with Metal (MPS) what the driver did;
    elsewhere the resident set of the process, which only Linux can reset. A reset first returns
    free memory to the system, so that a phase does not count what the one before it used.

    Attributes:
        how: How the peak is measured, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        can_reset = self.reset()
        self.how = ON_DEVICE.get(device.type, "resident set")
        self.how += "" if can_reset else ", of the whole process so far"

    def reset(self) -> bool:
        """Set the peak to the memory in use; whether the system can do that."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        gc.collect()
        if self.device.type == "mps":
            torch.mps.empty_cache()
            return True
        return_free_memory()
        try:
            CLEAR.write_text("5")  # proc(5): resets VmHWM
        except OSError:
            return False
        return True

    def read(self) -> int:
        """Give the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()  # it keeps what was used, so it is the peak
        if STATUS.is_file():
            line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        if sys.platform == "win32":
            import psutil

            return psutil.Process().memory_info().peak_wset
        import resource  # which Windows does not have

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def reserved(self) -> int:
        """Give the most that torch has reserved on CUDA so far, in bytes; 0 elsewhere."""
        on_cuda = self.device.type == "cuda"
        return torch.cuda.max_memory_reserved(self.device) if on_cuda else 0
