"""What survives an interruption: the last state, the best weights, the answers so far."""

import errno
import json
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lora_or_full.errors import UserError
from lora_or_full.evaluation.predictions import Prediction
from lora_or_full.modeling import trained_weights
from lora_or_full.runs import store
from lora_or_full.training.distributed import STOPS

LAST, BEFORE, BEST = "last.ckpt", "before.ckpt", "best.safetensors"


class Checkpointed(Protocol):
    """What a checkpoint needs of the LightningModule."""

    epochs: list[dict[str, float]]

    @property
    def best_epoch(self) -> dict[str, float]:
        """The finished epoch with the best validation scores."""

    def save_trained(self, file: Path) -> None:
        """Write the trained weights."""


class Interrupted(Exception):  # noqa: N818  # it is no error
    """A run that was asked to stop (Ctrl-C, SIGTERM) has stopped where it can resume."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a request that is met between two batches.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.getsignal(number) for number in STOPS}
        self.listen()
        return self

    def listen(self) -> None:
        """Install the handlers, whatever handlers there are now."""
        for number in STOPS:
            signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise SystemExit(128 + number)
        self.received = True
        print("\nStopping after this batch; once more to stop at once, losing up to a few minutes.")


class CheckedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint atomically, reads it back, and keeps the one before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: The file can't be written, or reads differently than it was written.
        """
        file = Path(path)
        with store.atomic_write(file) as made:
            with made.open("wb") as out:  # Lightning would hold all of it in memory once more
                torch.save(checkpoint, out)
            if not _is_undamaged(made):
                raise OSError(errno.EIO, "it reads differently than it was written", str(file))
            if file.exists():
                file.replace(file.with_name(BEFORE))


def resume_point(folder: Path) -> tuple[Path | None, int]:
    """Find the newest checkpoint from which a run can resume, and warn of damaged ones.

    Without the best weights a checkpoint is useless, unless it is older than these: training then
    finds them again.

    Args:
        folder: The run's checkpoints/.

    Returns:
        The checkpoint and its optimizer step; None and 0 if the run starts from the beginning.
    """
    damaged = []
    for file in (folder / LAST, folder / BEFORE):
        if not file.exists():
            continue
        state = _read(file)
        if state is None:
            damaged.append(file)
            # Moved aside, or it would become the one before.
            file.replace(file.with_name(f"{file.name}.damaged"))
        elif state["epochs"] and trained_weights.saved(folder / BEST) is None:
            damaged.append(folder / BEST)
        else:
            _warn(damaged, f"resumes from {file.name}, step {state['global_step']}")
            return file, state["global_step"]
    _warn(damaged, "starts from the beginning")
    return None, 0


def _warn(damaged: list[Path], then: str) -> None:
    if damaged:
        names = ", ".join(dict.fromkeys(map(str, damaged)))
        print(f"Warning: damaged: {names}. The run {then}.", file=sys.stderr)


def _is_undamaged(file: Path) -> bool:
    """Whether the checksums that torch writes into a file, but does not check, are right."""
    try:
        with zipfile.ZipFile(file) as records:
            return records.testzip() is None
    except OSError as error:
        if error.errno == errno.EINVAL:  # an impossible offset
            return False
        raise
    except Exception:  # there are as many kinds as ways to be damaged
        return False


def _read(file: Path) -> dict[str, Any] | None:
    """The checkpoint in a file, its weights left on disk; None if it is damaged."""
    if not _is_undamaged(file):
        return None
    try:
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        return state if {"epochs", "global_step", "state_dict"} <= state.keys() else None
    except Exception:  # it holds something else, or what weights_only refuses
        return None


def check_room(folder: Path, trainable: int, exported: int) -> None:
    """Refuse a run that the disk has no room for.

    Args:
        folder: The run's folder.
        trainable: Number of trainable weights.
        exported: Number of exported weights.

    Raises:
        UserError: With what is needed, and what is free.
    """
    # Float32: three training states while one is written, each of weights and two moments; twice
    # the best weights; and the export.
    needed = 4 * (3 * 3 * trainable + 2 * trainable + exported)
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if needed > held + free:
        raise UserError(
            f"{folder}: the run needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free. "
            "Make room, or set output_dir to another disk."
        )


class RunCheckpoint(Checkpoint):
    """Keeps last.ckpt (all that is needed to resume), the one before it, and best.safetensors.

    last.ckpt is written at each epoch's end, before the last step of an epoch, every `interval`
    seconds and on a stop signal, always between two optimizer steps. best.safetensors is written
    whenever the validation F1 is the highest so far. The processes of all devices do this together.

    Args:
        folder: The run's checkpoints/.
        interval: Seconds between two checkpoints.
        stop: The stop signal to obey.
    """

    def __init__(self, folder: Path, interval: float, stop: StopSignal) -> None:
        self.last, self.best = folder / LAST, folder / BEST
        self.interval, self.stop = interval, stop
        self.saved_at = time.monotonic()
        self.saved_to_stop = False

    def on_train_start(self, *_: Any) -> None:
        """Take the signals back from Lightning.

        Its own handler would end the run with exit code 0, and communicate with other devices in
        the middle of what they compute together.
        """
        self.stop.listen()

    def on_test_start(self, *_: Any) -> None:
        """Take the signals back from Lightning."""
        self.stop.listen()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save between two steps if it is time, or if the run is to stop."""
        micro_batches = trainer.accumulate_grad_batches
        left = int(trainer.num_training_batches) - (batch_idx + 1)
        # Validation follows an epoch's last step: Lightning would skip it on a resume.
        if left == 0 or left % micro_batches:
            return
        self._share_stop(trainer)
        late = time.monotonic() - self.saved_at > self.interval
        # Validation can be long: all training before it but one step is saved.
        due = left == micro_batches or trainer.strategy.reduce_boolean_decision(late, all=False)
        if due or self.stop.received:
            self._save(trainer)
            self.saved_to_stop = self.stop.received

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Stop if the state was saved in order to stop."""
        if self.saved_to_stop:  # here, so that the saved step is logged too
            raise Interrupted

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop between two batches if requested."""
        self._share_stop(trainer)
        if self.stop.received:
            raise Interrupted

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: Checkpointed) -> None:  # type: ignore[override]
        """Save the weights of the best epoch so far."""
        if pl_module.best_epoch is pl_module.epochs[-1] and trainer.is_global_zero:
            pl_module.save_trained(self.best)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state at each epoch's end."""
        self._save(trainer)

    def _share_stop(self, trainer: L.Trainer) -> None:
        """Make a stop signal to the process of one device one to all."""
        stop = self.stop
        stop.received = trainer.strategy.reduce_boolean_decision(stop.received, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.last)
        self.saved_at = time.monotonic()


class Journal:
    """Keeps answers as they come, one batch per line, so that an interrupted test resumes.

    A line starts with the checksum of its rest. From a cut or damaged line on, answers are dropped
    and their questions answered again.

    Attributes:
        batches: Predictions by batch.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.batches: list[list[Prediction]] = []
        if not file.is_file():
            return
        good = 0
        for line in file.read_bytes().splitlines(keepends=True):
            noted, _, text = line.partition(b" ")
            if noted != _checksum(text):
                break
            self.batches.append(json.loads(text))
            good += len(line)
        os.truncate(file, good)

    def add(self, predictions: list[Prediction]) -> None:
        """Append the predictions of a batch."""
        self.batches.append(predictions)
        text = json.dumps(predictions, ensure_ascii=False).encode() + b"\n"
        with self.file.open("ab") as out:
            out.write(_checksum(text) + b" " + text)

    @property
    def predictions(self) -> list[Prediction]:
        """All predictions in the order of their batches."""
        return [prediction for batch in self.batches for prediction in batch]


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
