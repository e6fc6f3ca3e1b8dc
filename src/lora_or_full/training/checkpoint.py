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
from typing import Any, Protocol

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lora_or_full.errors import UserError
from lora_or_full.evaluation.predictions import Prediction
from lora_or_full.modeling import trained_weights
from lora_or_full.processes import STOP_SIGNALS
from lora_or_full.runs import store

LAST, BEFORE, BEST = "last.ckpt", "before.ckpt", "best.safetensors"
BEST_BEFORE = "best.before.safetensors"  # of the epoch that was the best before: BEFORE may need it
MOMENT = 1.0  # seconds
Epochs = list[dict[str, float]]


class Model(Protocol):
    """What a checkpoint needs of the LightningModule."""

    epochs: Epochs

    def save_trained(self, file: Path) -> None:
        """Write the trained weights."""


def best_epoch(epochs: Epochs) -> dict[str, float]:
    """Choose the finished epoch to score and to keep.

    It has the highest validation F1; among equals the lowest validation loss; then it is the first.
    """
    return max(epochs, key=lambda epoch: (epoch["f1"], -epoch["validation_loss"]))


class Interrupted(Exception):  # noqa: N818  # it is no error
    """A run stopped at a stop signal (Ctrl-C, SIGTERM), in a state from which it can resume."""


class CheckedCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, verifies them, and keeps the previous one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: The file can't be written, or reads differently than it was written.
        """
        file = Path(path)
        with store.atomic_write(file) as temporary:
            with temporary.open("wb") as out:  # Lightning would copy all of it in memory first
                torch.save(checkpoint, out)
            if _read(temporary) is None:
                raise OSError(errno.EIO, "it reads differently than it was written", str(file))
            if file.exists():
                file.replace(file.with_name(BEFORE))


def resume_point(folder: Path) -> tuple[Path | None, int]:
    """Find the newest checkpoint from which a run can resume, and warn of damaged ones.

    A checkpoint after the first epoch needs the weights of its best epoch too. Without them an
    older one will do, from which training finds them again.

    Returns:
        The checkpoint and its optimizer step; None and 0 if the run starts from the beginning.
    """
    found, step, damaged = None, 0, dict[Path, None]()
    for file in filter(Path.exists, (folder / LAST, folder / BEFORE)):
        state = _read(file)
        if state is None:
            damaged[file] = None
            # Moved aside, or the next save would keep it as the previous checkpoint.
            file.replace(file.with_name(f"{file.name}.damaged"))
        elif state["epochs"] and not _has_best(folder, state["epochs"]):
            damaged[folder / BEST] = None
        else:
            found, step = file, state["global_step"]
            break
    if damaged:
        then = f"resumes from {found.name}, step {step}" if found else "starts from the beginning"
        names = ", ".join(map(str, damaged))
        print(f"Warning: damaged: {names}. The run {then}.", file=sys.stderr)
    return found, step


def _has_best(folder: Path, epochs: Epochs) -> bool:
    """Whether the weights of the best of these epochs are there; they get their name back."""
    for file in (folder / BEST, folder / BEST_BEFORE):
        saved = trained_weights.saved(file)
        if saved is not None and saved.epoch == best_epoch(epochs)["epoch"]:
            file.replace(folder / BEST)
            return True
    return False


def _read(file: Path) -> dict[str, Any] | None:
    """Read a checkpoint, its weights left on disk; None if it is damaged."""
    try:
        with zipfile.ZipFile(file) as records:  # torch writes checksums, but does not check them
            if records.testzip() is not None:
                return None
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        return state if {"epochs", "global_step", "state_dict"} <= state.keys() else None
    except Exception as error:  # there are as many kinds as ways to be damaged
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of an impossible offset
            raise
        return None


def check_room(folder: Path, trainable: int, exported: int, state: float) -> None:
    """Refuse a run that the disk has no room for.

    Args:
        folder: The run's folder.
        trainable: Number of trained weights.
        exported: Number of exported weights.
        state: Numbers that the optimizer keeps for each trained weight.

    Raises:
        UserError: With what is needed, and what is free.
    """
    # Float32: three training states while one is written, each of weights and optimizer state;
    # three times the best weights; and the export.
    needed = 4 * (3 * (1 + state) * trainable + 3 * trainable + exported)
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if needed > held + free:
        raise UserError(
            f"{folder}: the run needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free. "
            "Make room, or set output_dir to another disk."
        )


class RunCheckpoint(Checkpoint):
    """Keeps last.ckpt (all that is needed to resume), the previous one, and best.safetensors.

    last.ckpt is written at each epoch's end, before the last step of an epoch, every `interval`
    seconds or more and on a stop signal, always between two optimizer steps. best.safetensors is
    written whenever the validation F1 is the highest so far. The processes of all devices do this
    together.

    Args:
        folder: The run's checkpoints/.
        interval: Seconds between two checkpoints.

    A callback that stops the training (`trainer.should_stop`) does so after the epoch: each epoch
    has all questions.

    Attributes:
        stopping: Whether a stop signal has come.
        last_epoch: Whether a callback has stopped the training, which ends after this epoch.
        ended: Whether it has ended so.
    """

    def __init__(self, folder: Path, interval: float) -> None:
        self.last, self.best, self.interval = folder / LAST, folder / BEST, interval
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.stopping = self.saved_to_stop = False
        self.last_epoch = self.ended = False

    def request_stop(self, number: int, frame: Any) -> None:
        """Handle a stop signal: stop after the current batch; at a second signal, at once."""
        if self.stopping:
            raise SystemExit(128 + number)
        self.stopping = True
        print("\nStopping after this batch; once more to stop at once, losing up to a few minutes.")

    def state_dict(self) -> dict[str, Any]:
        """Whether a callback has stopped the training."""
        return {"last_epoch": self.last_epoch, "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        vars(self).update(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep a training that a callback has stopped at its end; handle stop signals.

        Lightning's handlers would end the run with exit code 0, and communicate with other devices
        while these compute together.
        """
        trainer.should_stop = self.ended
        self.on_test_start()

    def on_test_start(self, *_: Any, **__: Any) -> None:
        """Handle stop signals."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.request_stop)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two steps if it is time, or if the run is to stop."""
        self.last_epoch = self.last_epoch or trainer.should_stop
        trainer.should_stop = False
        micro_batches = trainer.accumulate_grad_batches
        left = int(trainer.num_training_batches) - (batch_idx + 1)
        # Validation follows an epoch's last step: Lightning would skip it on a resume.
        if left == 0 or left % micro_batches:
            return
        self._share_stop(trainer)
        # Where saving takes more than a moment, it takes at most a twentieth of the time.
        least = 20 * self.save_seconds if self.save_seconds > MOMENT else 0.0
        late = time.monotonic() - self.saved_at > max(self.interval, least)
        # Validation can be long: all training before it but one step is saved.
        due = left == micro_batches or trainer.strategy.reduce_boolean_decision(late, all=False)
        if due or self.stopping:
            self._save(trainer)
            self.saved_to_stop = self.stopping

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Stop if the state was saved in order to stop."""
        if self.saved_to_stop:  # here, so that the saved step is logged too
            raise Interrupted

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop between two batches if requested."""
        self._share_stop(trainer)
        if self.stopping:
            raise Interrupted

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: Model) -> None:  # type: ignore[override]
        """Save the weights of the best epoch so far."""
        if best_epoch(pl_module.epochs) is pl_module.epochs[-1] and trainer.is_global_zero:
            if self.best.exists():
                self.best.replace(self.best.with_name(BEST_BEFORE))
            pl_module.save_trained(self.best)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the state at each epoch's end."""
        self.ended = trainer.should_stop = self.last_epoch or trainer.should_stop
        self._save(trainer)

    def _share_stop(self, trainer: L.Trainer) -> None:
        """Make a stop signal to one process a signal to all."""
        self.stopping = trainer.strategy.reduce_boolean_decision(self.stopping, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        began = time.monotonic()
        trainer.save_checkpoint(self.last)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began


class Journal:
    """Stores answers batch by batch, one line each, so that an interrupted test resumes.

    A line starts with the CRC-32 of its rest. From a cut or damaged line on, answers are dropped
    and their questions answered again.

    Attributes:
        batches: Predictions by batch.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.batches: list[list[Prediction]] = []
        good = 0
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else []:
            checksum, _, text = line.partition(b" ")
            if checksum != _checksum(text):
                os.truncate(file, good)
                break
            self.batches.append(json.loads(text))
            good += len(line)

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
