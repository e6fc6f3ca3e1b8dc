"""What a run logs besides Lightning's scalars: metrics.csv, answers as text, and results."""

import csv
import html
import io
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lora_or_full.config.schema import FIELDS, Config, is_neutral, typed
from lora_or_full.evaluation.predictions import Prediction
from lora_or_full.processes import is_first_process
from lora_or_full.runs import store

FIRST = ("mode", "lr", "rank", "seed")  # keys that HPARAMS shows in any case
SHOWN = 8  # answers in TensorBoard per epoch


class MetricsFile(Logger):
    """Writes metrics.csv, one row each time something is logged; a new name adds a column.

    Lightning's CSVLogger deletes its file when a run resumes; this one keeps the rows before the
    optimizer step that the run resumes from.

    Args:
        file: The file.
        step: The step from which the run resumes.
        names: What a run always logs: its columns after epoch and step.
    """

    name = "metrics"
    version = ""

    def __init__(self, file: Path, step: int, names: Sequence[str]) -> None:
        super().__init__()
        self.file, self.columns = file, ["epoch", "step", *names]
        if is_first_process():
            head, _, body = file.read_bytes().partition(b"\r\n") if file.is_file() else [b""] * 3
            found = next(csv.reader([head.decode(errors="replace")]), [])
            if found[: len(self.columns)] == self.columns:
                self.columns = found
            cells = len(self.columns) - 2
            row = re.compile(rb"^[\w.+-]*,(\d+)(,[\w.+-]*){%d}\r\n" % cells, re.M)  # undamaged
            kept = [one[0].decode() for one in row.finditer(body) if int(one[1]) < step]
            self._rewrite("".join(kept))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row, and add columns for new names."""
        if not is_first_process():
            return
        if new := [name for name in metrics if name not in self.columns]:
            self.columns += new
            rows = self.file.read_bytes().decode().split("\r\n")[1:-1]
            self._rewrite("".join(f"{row}{',' * len(new)}\r\n" for row in rows))
        with self.file.open("a", newline="") as out:
            csv.DictWriter(out, self.columns).writerow({**metrics, "step": step})

    def _rewrite(self, rows: str) -> None:
        head = io.StringIO()
        csv.writer(head).writerow(self.columns)
        store.write_text(self.file, head.getvalue() + rows)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: config.yaml has them."""


class TrainingCurves(TensorBoardLogger):
    """TensorBoard's logger, so named that TensorBoard, which sorts by name, opens on the losses."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars; the epoch is a value beside others, and no curve of its own."""
        named = {
            f"train/{name}" if name.startswith("lr-") else name: value
            for name, value in metrics.items()
            if name != "epoch"
        }
        super().log_metrics(named, step)


class CalmProgressBar(RichProgressBar):
    """Lightning's progress bar, which would make a GPU wait for the loss of each step.

    There it shows the loss of one step in `every`.
    """

    shown: dict[str, Any] | None = None

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Give what the bar shows beside its progress."""
        waits = trainer.training and trainer.strategy.root_device.type != "cpu"
        if self.shown is None or not (waits and trainer.global_step % self.every):
            self.shown = super().get_metrics(trainer, pl_module)
        return self.shown


class SampleAnswers(L.Callback):
    """Shows some answers of each epoch's validation as text in TensorBoard."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take the module's `samples` (predictions) and show the first ones by id."""
        shown = sorted(pl_module.samples, key=lambda prediction: prediction["id"])[:SHOWN]
        pl_module.samples = []
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                table = answers_table(shown)
                logger.experiment.add_text("validation answers", table, trainer.global_step)


def log_configuration(trainer: L.Trainer, config: Config) -> None:
    """Log the configuration; TensorBoard gets it at the end, with the results."""
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(config.to_dict())


def log_results(
    trainer: L.Trainer,
    config: Config,
    results: dict[str, Any],
    wrong: list[Prediction],
    varied: Iterable[str],
) -> None:
    """Fill TensorBoard's HPARAMS tab with results.json, and show wrong answers as text.

    `varied` are the keys that the run's sweep varies.
    """
    best = results["epochs"][results["best_epoch"] - 1]
    # Named so that TensorBoard, which sorts by name, opens on the curves.
    metrics = {
        **{f"whole_run/test_{name}": results["test"][name] for name in config.metrics},
        "whole_run/test_f1_before": results["before"]["f1"],
        "whole_run/best_validation_loss": best["validation_loss"],
        "whole_run/best_validation_f1": best["f1"],
        "whole_run/train_seconds": results["cost"]["train_seconds"],
        "whole_run/peak_memory_MB": max(results["cost"]["peak_memory_bytes"].values()) / 1e6,
        "whole_run/trainable_weights": results["parameters"]["trainable"],
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_metrics(metrics)
            writer = logger.experiment._get_file_writer()
            for summary in hyperparameters(config, metrics, {*FIRST, *varied}):
                writer.add_summary(summary)
            logger.experiment.add_text("test failures", answers_table(wrong), trainer.global_step)
            logger.finalize("success")
        elif not isinstance(logger, MetricsFile):
            logger.log_metrics(metrics, trainer.global_step)


def hyperparameters(config: Config, metrics: dict[str, float], shown: Container[str]) -> list[Any]:
    """Give TensorBoard's summaries of a run: what there is, and its hyperparameters.

    TensorBoard takes the names from any one run of several, so each has those of all keys. At first
    it shows a few: those that are said to differ.

    Args:
        config: The run's configuration.
        metrics: Its results, by the names of scalars.
        shown: The keys that are said to differ.
    """
    from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_FLOAT64
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    values = {
        key: value if isinstance(value, (bool, int, float, str)) else typed(value)
        for key, value in config.flat().items()
        if value is not None and (key in shown or not is_neutral(key))
    }
    experiment, start, end = hparams(values, metrics)
    plugin = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for key in sorted(key for key in FIELDS.keys() - values.keys() if not is_neutral(key)):
        content.experiment.hparam_infos.add(name=key, type=DATA_TYPE_FLOAT64)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in shown
    for info in content.experiment.metric_infos:
        info.display_name = info.name.tag.partition("/")[2].replace("_", " ")
    plugin.content = content.SerializeToString()
    return [experiment, start, end]


def answers_table(predictions: list[Prediction]) -> str:
    """Format questions, gold answers and predictions as Markdown, their own markup escaped."""
    lines = ["| question | answers | prediction | F1 |", "|---|---|---|---|"]
    for p in predictions:
        answers = " / ".join(dict.fromkeys(p["answers"]))
        cells = [p["question"], answers, p["prediction"], f"{p['f1']:.0f}"]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
