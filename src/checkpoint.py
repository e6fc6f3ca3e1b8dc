"""What of a run survives an interruption: the last state, the best weights, the answers so far."""

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lit_module import LitQuestionAnswering
from predictions import Prediction


class Interrupted(Exception):  # noqa: N818  # it is no error
    """The run was asked to stop (Ctrl-C, SIGTERM), and did so where it can go on."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a wish that is granted between two batches.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise SystemExit(128 + number)
        self.received = True
        print("\nStopping after this batch; once more to stop at once, losing up to a few minutes.")


class RunCheckpoint(Checkpoint):
    """Keeps checkpoints/last.ckpt (all that is needed to go on) and best.safetensors.

    The first is written at each epoch's end, before the last step of an epoch, every `interval`
    seconds and on a stop signal, always between two optimizer steps; the second whenever the
    validation loss is the lowest so far.
    """

    def __init__(self, folder: Path, interval: float, stop: StopSignal) -> None:
        self.last, self.best = folder / "last.ckpt", folder / "best.safetensors"
        self.interval, self.stop = interval, stop
        self.saved_at = time.monotonic()
        self.saved_to_stop = False

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
        # A validation can be long: what was trained before it is kept but for one step.
        due = left == parts or time.monotonic() - self.saved_at > self.interval
        if due or self.stop.received:
            self._save(trainer)
            self.saved_to_stop = self.stop.received

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        if self.saved_to_stop:  # here, not where it was saved: now that step is logged too
            raise Interrupted

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self.stop.received:
            raise Interrupted

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        if self.stop.received:
            raise Interrupted

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitQuestionAnswering)
        losses = [epoch["validation_loss"] for epoch in pl_module.epochs]
        if losses[-1] <= min(losses):
            self.best.parent.mkdir(parents=True, exist_ok=True)
            pl_module.save_trained(self.best)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.last)
        self.saved_at = time.monotonic()


class Journal:
    """Answers as they come, a batch a line, so that an interrupted test goes on behind the last."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.batches: list[list[Prediction]] = []
        if file.is_file():
            lines = file.read_text(encoding="utf-8").split("\n")
            self.batches = [json.loads(line) for line in lines[:-1]]  # the last one may be cut off
            file.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")

    def add(self, predictions: list[Prediction]) -> None:
        """Keep the predictions of one batch."""
        self.batches.append(predictions)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(predictions, ensure_ascii=False) + "\n")

    @property
    def predictions(self) -> list[Prediction]:
        return [prediction for batch in self.batches for prediction in batch]
