"""Arguments that several commands share."""

import argparse
import os
from pathlib import Path

from lora_or_full.errors import UserError


def existing_folder(text: str) -> Path:
    """Give the path of a folder; a missing one is refused before anything slow is imported.

    Raises:
        UserError: There is no such folder.
    """
    if not os.path.isdir(text):  # Path.is_dir raises on a name that is too long
        raise UserError(f"There is no folder {text}.")
    return Path(text)


def add_base_model(parser: argparse.ArgumentParser) -> None:
    """Declare --model, the base model of a run or an adapter."""
    parser.add_argument(
        "--model", help="folder or hub id of the base model, if RUN names another or none"
    )
