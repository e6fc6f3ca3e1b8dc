"""What a run prints on the terminal: what will run, and its results."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lora_or_full.config.schema import Config

if TYPE_CHECKING:
    import lightning as L  # seconds, which a sweep's own process need not spend


def announce(
    config: Config,
    folder: Path,
    data: dict[str, Any],
    model: dict[str, Any],
    parameters: dict[str, float],
    trainer: "L.Trainer",
    resumed: bool,
    seconds: float,
) -> None:
    """Print what will run, on which device, and for about how many `seconds`.

    `data`, `model` and `parameters` are as in results.json.
    """
    mode = config.mode if config.rank is None else f"{config.mode}, rank {config.rank}"
    rows = {"model": f"{config.model.name}, {mode}", "parameters": _parameters(parameters)}
    sizes = (config.data.train_size, config.data.validation_size, config.data.test_size)
    for name, size in zip(("train", "validation", "test"), sizes, strict=True):
        rows[name] = _split(data[name], size)
    if found := {key: count for key, count in data["train"]["in_all_files"].items() if count}:
        counts = (f"{count:,} {key.replace('_', ' ')}" for key, count in found.items())
        rows["in all files"] = ", ".join(counts)
    rows["recipe"] = (
        f"lr {config.lr:g}, {config.trainer.max_epochs} epochs, "
        f"batch {config.batch_size}, seed {config.seed}"
    )
    rows["packing"] = _packing(config, model)
    rows["device"] = f"{trainer.strategy.root_device}, precision {trainer.precision}"
    if trainer.world_size > 1:
        rows["devices"] = (
            f"{trainer.world_size}, which share the {config.batch_size} questions of a step: "
            f"the effective batch stays {config.batch_size}, lr {config.lr:g}"
        )
    rows["time"] = f"about {duration(seconds)} (an estimate from a few batches)"
    _print_rows("Resumes" if resumed else "Will run", rows)
    print(f"folder: {folder}", flush=True)


def close(results: dict[str, Any], folder: Path) -> None:
    """Print the results of a run, and where its files are."""
    epochs = _table("Epochs", "epoch", "train loss", "validation loss", "EM", "F1")
    for epoch in results["epochs"]:
        best = " *" if epoch["epoch"] == results["best_epoch"] else ""
        losses = [f"{epoch[name]:.4f}" for name in ("train_loss", "validation_loss")]
        scores = [f"{epoch[name]:.1f}" for name in ("exact_match", "f1")]
        epochs.add_row(f"{epoch['epoch']}{best}", *losses, *scores)
    _console().print(epochs)
    cost = results["cost"]
    peaks = [f"{name} {size / 1e6:,.0f} MB" for name, size in cost["peak_memory_bytes"].items()]
    rows = {
        "parameters": _parameters(results["parameters"]),
        "before training": _scores(results["before"]),
        "after (epoch *)": _scores(results["test"]),
        "time": f"{duration(cost['session_seconds'])}, of it {duration(cost['train_seconds'])} "
        f"training ({cost['samples_per_second']:.1f} questions/s)",
        "peak memory": f"{', '.join(peaks)} ({cost['peak_memory_is']})",
    }
    _print_rows("Result", rows)
    # Not in the table, which would cut a long path.
    for name, file in (("results", "results.json"), ("answers", "predictions.jsonl")):
        print(f"{name + ':':<10}{folder / file}")
    print(f"{results['exported'] + ':':<10}{folder / results['exported']}")
    print(f"dashboard: tensorboard --logdir {folder.parent}")
    print(f"to ask it: lora-or-full page {folder}")


def sweep_table(jobs: Mapping[str, dict[str, Any] | None]) -> None:
    """Print the results of each job of a sweep by name; None for one without results."""
    table = _table("Sweep", "run", "val. F1", "EM", "F1", "train MB", "training")
    table.columns[0].justify = "left"
    for name, results in jobs.items():
        if results is None:
            table.add_row(name, "no results")
            continue
        cost, test = results["cost"], results["test"]
        table.add_row(
            name,
            f"{results['epochs'][results['best_epoch'] - 1]['f1']:.1f}",
            f"{test['exact_match']:.1f}",
            f"{test['f1']:.1f}",
            f"{cost['peak_memory_bytes']['train'] / 1e6:,.0f}",
            duration(cost["train_seconds"]),
        )
    _console().print(table)


def duration(seconds: float) -> str:
    """A duration in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _console() -> Console:
    return Console(markup=False, emoji=False)  # a model's name may have any brackets and colons


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _print_rows(title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    _console().print(table)


def _parameters(parameters: dict[str, float]) -> str:
    return (
        f"{parameters['trainable']:,} of {parameters['total']:,} trainable "
        f"({parameters['percent']:.4f} %)"
    )


def _packing(config: Config, model: dict[str, Any]) -> str:
    if not config.packing:
        return "off: each question is computed with a context of its own"
    if not model["shares_context"]:
        return f"not exact for model type {model['type']}, so each question has its own context"
    if not config.mask_prompt:
        return "in evaluation; in training a shared context would count once, so each has its own"
    return "questions of a batch share their context"


def _split(facts: dict[str, Any], size: int | None) -> str:
    few = f" of {size:,} requested" if size and facts["questions"] < size else ""
    counts = "".join(f", {facts[key]} {key}" for key in ("truncated", "dropped") if facts[key])
    return (
        f"{facts['questions']:,} questions{few}, {facts['paragraphs']:,} paragraphs, "
        f"{facts['articles']:,} articles{counts}"
    )


def _scores(scores: dict[str, Any]) -> str:
    def one(name: str, key: str) -> str:
        low, high = scores[f"{key}_interval"]
        return f"{name} {scores[key]:.1f} [{low:.1f}, {high:.1f}]"

    return f"{one('EM', 'exact_match')}  {one('F1', 'f1')}  ({scores['questions']:,} questions)"
