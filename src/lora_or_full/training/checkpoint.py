"""What of a run survives an interruption: the last state, the best weights, the answers so far."""

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
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lit_module import LitQuestionAnswering
from lora_or_full.errors import UserError
from lora_or_full.evaluation.predictions import Prediction
from lora_or_full.modeling import trained_weights
from lora_or_full.runs import store
from lora_or_full.training.distributed import STOPS

LAST, BEFORE, BEST = "last.ckpt", "before.ckpt", "best.safetensors"


class Interrupted(Exception):  # noqa: N818  # it is no error
    """The run was asked to stop (Ctrl-C, SIGTERM), and did so where it can go on."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a wish that is granted between two batches.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.getsignal(number) for number in STOPS}
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, from whoever has them now."""
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
    """Writes a checkpoint whole, checks it, and keeps the one before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        file = Path(path)
        with store.atomic_write(file) as made:
            with made.open("wb") as out:  # Lightning would hold all of it in memory once more
                torch.save(checkpoint, out)
            if not _whole(made):
                raise OSError(errno.EIO, "it reads otherwise than it was written", str(file))
            if file.exists():
                file.replace(file.with_name(BEFORE))


def resume_point(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint in `folder` from which a run can go on, and its step; None and 0 where
    it begins anew.

    What is damaged is told. Without the best weights a checkpoint is of no use unless it is older
    than these: training finds them again.
    """
    damaged = []
    for file in (folder / LAST, folder / BEFORE):
        if not file.exists():
            continue
        state = _read(file)
        if state is None:
            damaged.append(file)
            # Put aside, or it would become the one before.
            file.replace(file.with_name(f"{file.name}.damaged"))
        elif state["epochs"] and trained_weights.saved(folder / BEST) is None:
            damaged.append(folder / BEST)
        else:
            _warn(damaged, f"goes on from {file.name}, step {state['global_step']}")
            return file, state["global_step"]
    _warn(damaged, "begins anew")
    return None, 0


def _warn(damaged: list[Path], then: str) -> None:
    if damaged:
        names = ", ".join(dict.fromkeys(map(str, damaged)))
        print(f"Warning: damaged: {names}. The run {then}.", file=sys.stderr)


def _whole(file: Path) -> bool:
    """Whether the checksums that torch writes into a file, but does not look at, are right."""
    try:
        with zipfile.ZipFile(file) as records:
            return records.testzip() is None
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset that can't be
            return False
        raise
    except Exception:  # there are as many as ways to be damaged
        return False


def _read(file: Path) -> dict[str, Any] | None:
    """The checkpoint in `file`, its weights left on the disk; None if it is damaged."""
    if not _whole(file):
        return None
    try:
        state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        return state if {"epochs", "global_step", "state_dict"} <= state.keys() else None
    except Exception:  # it holds something else, or what weights_only refuses
        return None


def check_room(folder: Path, trainable: int, exported: int) -> None:
    """Refuse a run of so many trainable and exported weights that the disk has no room for.

    Raises:
        UserError: with what it needs, and what there is.
    """
    # Three states of training while one is written, each of weights and two moments; twice the
    # best weights; and what is exported.
    needed = 4 * (3 * 3 * trainable + 2 * trainable + exported)
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if needed > held + free:
        raise UserError(
            f"{folder}: the run needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free. "
            "Make room, or set output_dir to another disk."
        )


class RunCheckpoint(Checkpoint):
    """Keeps checkpoints/last.ckpt (all that is needed to go on), the one before it, and
    best.safetensors.

    The first is written at each epoch's end, before the last step of an epoch, every `interval`
    seconds and on a stop signal, always between two optimizer steps; the second whenever the
    validation F1 is the highest so far. The processes of all devices do this together.
    """

    def __init__(self, folder: Path, interval: float, stop: StopSignal) -> None:
        self.last, self.best = folder / LAST, folder / BEST
        self.interval, self.stop = interval, stop
        self.saved_at = time.monotonic()
        self.saved_to_stop = False

    def on_train_start(self, *_: Any) -> None:
        # Lightning has put a handler of its own before: it would end the run with exit code 0, and
        # talk to other devices in the middle of what they compute together.
        self.stop.listen()

    def on_test_start(self, *_: Any) -> None:
        self.stop.listen()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        parts = trainer.accumulate_grad_batches
        left = int(trainer.num_training_batches) - (batch_idx + 1)
        # Behind an epoch's last step its validation comes: Lightning would skip that on a resume.
        if left == 0 or left % parts:
            return
        self._heed_all(trainer)
        late = time.monotonic() - self.saved_at > self.interval
        # A validation can be long: what was trained before it is kept but for one step.
        due = left == parts or trainer.strategy.reduce_boolean_decision(late, all=False)
        if due or self.stop.received:
            self._save(trainer)
            self.saved_to_stop = self.stop.received

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        if self.saved_to_stop:  # here, not where it was saved: now that step is logged too
            raise Interrupted

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._heed_all(trainer)
        if self.stop.received:
            raise Interrupted

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._heed_all(trainer)
        if self.stop.received:
            raise Interrupted

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitQuestionAnswering)
        if pl_module.best_epoch is pl_module.epochs[-1] and trainer.is_global_zero:
            pl_module.save_trained(self.best)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _heed_all(self, trainer: L.Trainer) -> None:
        """A stop signal to the process of one device is one to all."""
        stop = self.stop
        stop.received = trainer.strategy.reduce_boolean_decision(stop.received, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.last)
        self.saved_at = time.monotonic()


class Journal:
    """Answers as they come, a batch a line, so that an interrupted test goes on behind the last.

    A line begins with the checksum of its rest: from one that is cut off or damaged on, what was
    answered is dropped, and asked again.
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
        """Keep the predictions of one batch."""
        self.batches.append(predictions)
        text = json.dumps(predictions, ensure_ascii=False).encode() + b"\n"
        with self.file.open("ab") as out:
            out.write(_checksum(text) + b" " + text)

    @property
    def predictions(self) -> list[Prediction]:
        return [prediction for batch in self.batches for prediction in batch]


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
