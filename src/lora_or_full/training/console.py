"""What a run prints on the terminal: what will run, and its results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.console import Console
from rich.table import Table


def announce(resumed: bool, **facts: Any) -> None:
    """Print what will run, on which device, and for about how many seconds.

    Args:
        resumed: Whether the run continues an earlier one.
        facts: Arguments of console.jinja:will_run; data, model and parameters as in results.json.
    """
    _print_rows("Resumes" if resumed else "Will run", "will_run", **facts)


def close(results: dict[str, Any], folder: Path) -> None:
    """Print the results of a run, and where its files are."""
    epochs = _table("Epochs", "epoch", "train loss", "validation loss", "EM", "F1")
    for epoch in results["epochs"]:
        best = " *" if epoch["epoch"] == results["best_epoch"] else ""
        losses = [f"{epoch[name]:.4f}" for name in ("train_loss", "validation_loss")]
        scores = [f"{epoch[name]:.1f}" for name in ("exact_match", "f1")]
        epochs.add_row(f"{epoch['epoch']}{best}", *losses, *scores)
    _console().print(epochs)
    _print_rows("Result", "result", results=results, folder=folder)


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
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _print_rows(title: str, macro: str, **facts: Any) -> None:
    """Print the table that a macro of console.jinja gives, and the lines below it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(),
        trim_blocks=True,
    )  # fmt: skip
    environment.filters["duration"] = duration
    text = getattr(environment.get_template("console.jinja").module, macro)(**facts)
    # The lines below are not in the table, which would cut a long path.
    rows, _, below = text.strip("\n").partition("\n\n")
    table = _table(title)
    for row in rows.split("\n"):
        name, _, value = row.partition(": ")
        table.add_row(name, value)
    _console().print(table)
    print(below, flush=True)
