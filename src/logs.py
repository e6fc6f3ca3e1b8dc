"""What a run logs beside Lightning's TensorBoard scalars: metrics.csv, and answers as text."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lit_module import LitQuestionAnswering
from predictions import Prediction

COLUMNS = (
    "epoch",
    "step",
    "lr-AdamW",
    "train/loss",
    "train/epoch_loss",
    "validation/loss",
    "validation/exact_match",
    "validation/f1",
)
SHOWN = 8  # answers in TensorBoard each epoch


class MetricsFile(Logger):
    """metrics.csv, a row each time something is logged.

    A resumed run keeps the rows up to its first `step` and goes on behind them.
    """

    def __init__(self, file: Path, step: int) -> None:
        super().__init__()
        self.file = file
        rows = []
        if file.is_file():
            with file.open(newline="") as old:
                rows = [row for row in csv.DictReader(old) if int(row["step"]) < step]
        with file.open("w", newline="") as new:
            writer = csv.DictWriter(new, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.file.open("a", newline="") as out:
            csv.DictWriter(out, COLUMNS).writerow({**metrics, "step": step})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""


class SampleAnswers(L.Callback):
    """Shows some answers of each epoch's validation as text in TensorBoard."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitQuestionAnswering)
        shown = sorted(pl_module.samples, key=lambda prediction: prediction["id"])[:SHOWN]
        pl_module.samples = []
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                table = answers_table(shown)
                logger.experiment.add_text("validation answers", table, trainer.global_step)


def answers_table(predictions: list[Prediction]) -> str:
    """Questions, gold answers and predictions as Markdown."""
    lines = ["| question | answers | prediction | F1 |", "|---|---|---|---|"]
    for p in predictions:
        cells = [
            p["question"],
            " / ".join(dict.fromkeys(p["answers"])),
            p["prediction"],
            f"{p['f1']:.0f}",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)
