"""Arguments that several commands share."""

import argparse
import os
import sys
from pathlib import Path

from lora_or_full.errors import UserError
from lora_or_full.runs import store
from lora_or_full.runs.reader import not_a_run

# What a folder has that can be asked: a finished run, an adapter, a model.
ANSWERS = (store.RESULTS, "adapter_config.json", "config.json")


def existing_folder(text: str) -> Path:
    """Give the path of a folder; a missing one is refused before anything slow is imported.

    Raises:
        UserError: There is no such folder.
    """
    if not os.path.isdir(text):  # Path.is_dir raises on a name that is too long
        raise UserError(f"There is no folder {text}.")
    return Path(text)


def finished_of(folders: list[Path]) -> list[Path]:
    """Leave out the runs among several folders that are not finished, and name them.

    Raises:
        UserError: None is left, or one is neither a run, an adapter nor a model.
    """
    kept, left_out = [], []
    for folder in folders:
        if any((folder / name).is_file() for name in ANSWERS):
            kept.append(folder)
            continue
        problem = not_a_run(folder, f"{', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}")
        if not (folder / "status.json").is_file():
            raise problem
        left_out.append(problem)
    if not kept:
        raise left_out[0]
    for problem in left_out:
        print(f"Left out: {problem}", file=sys.stderr)
    return kept


def add_base_model(parser: argparse.ArgumentParser) -> None:
    """Declare --model, the base model of a run or an adapter."""
    parser.add_argument(
        "--model", help="folder or hub id of the base model, if RUN names another or none"
    )
