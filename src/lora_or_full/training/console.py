"""What a run prints on the terminal: what will run, and its results."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.console import Console
from rich.table import Table

from lora_or_full.evaluation.metrics import labels
from lora_or_full.runs.schema import metric_names

PROFILED = 20  # operations in the table of a profile
LEFT = ("run", "operation")  # columns of words


def print_rows(title: str, macro: str, **facts: Any) -> None:
    """Print the table that `macro` of console.jinja makes of facts, and the lines below it."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, trim_blocks=True, autoescape=select_autoescape())
    environment.filters["duration"] = duration
    text = getattr(environment.get_template("console.jinja").module, macro)(**facts)
    # The lines below are not in the table, which would cut a long path.
    rows, _, below = text.strip("\n").partition("\n\n")
    _print_table(title, (row.partition(": ")[::2] for row in rows.split("\n")))
    print(below, flush=True)


def close(results: dict[str, Any], folder: Path) -> None:
    """Print the results of a run, and where its files are."""
    metrics = labels(metric_names(results["test"]))
    epochs = [
        [
            f"{epoch['epoch']}{' *' if epoch['epoch'] == results['best_epoch'] else ''}",
            *(f"{epoch[name]:.4f}" for name in ("train_loss", "validation_loss")),
            *(f"{epoch[name]:.1f}" for name in metrics),
        ]
        for epoch in results["epochs"]
    ]
    columns = ("epoch", "train loss", "validation loss", *metrics.values())
    _print_table("Epochs", epochs, *columns)
    print_rows("Result", "result", results=results, folder=folder, labels=metrics)


def sweep_table(jobs: Mapping[str, dict[str, Any] | None]) -> None:
    """Print the results of each job of a sweep by name; None for one without results."""
    finished = [results for results in jobs.values() if results]
    metrics = labels(name for results in finished for name in metric_names(results["test"]))
    rows = [
        [
            name,
            f"{results['epochs'][results['best_epoch'] - 1]['f1']:.1f}",
            *(
                f"{results['test'][metric]:.1f}" if metric in results["test"] else ""
                for metric in metrics
            ),
            f"{results['cost']['peak_memory_bytes']['train'] / 1e6:,.0f}",
            duration(results["cost"]["train_seconds"]),
        ]
        if results
        else [name, "no results"]
        for name, results in jobs.items()
    ]
    _print_table("Sweep", rows, "run", "val. F1", *metrics.values(), "train MB", "training")


def profile_table(operations: Iterable[Any], order: str) -> None:
    """Print the operations of torch's profiler that took the most time by themselves.

    Args:
        operations: Its averages by operation.
        order: The time that counts: self_cpu_time_total or self_device_time_total (microseconds).
    """
    times = {one: getattr(one, order) for one in operations}
    ranked = sorted(times, key=lambda one: -times[one])[:PROFILED]
    total = sum(times.values()) or 1
    rows = [
        [one.key, f"{one.count:,}", f"{times[one] / 1e3:,.1f}", f"{100 * times[one] / total:.1f}"]
        for one in ranked
    ]
    columns = ("operation", "calls", "CPU ms" if "cpu" in order else "GPU ms", "share, %")
    _print_table("Where the time went, each operation without those it calls", rows, *columns)


def duration(seconds: float) -> str:
    """A duration in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _print_table(title: str, rows: Iterable[Iterable[str]], *columns: str) -> None:
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Without markup: a model's name may have any brackets and colons.
    Console(markup=False, emoji=False).print(table)
