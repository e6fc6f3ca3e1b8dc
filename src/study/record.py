"""The record of a run: what its folder holds, written whole or not at all."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "hydra-core")
PROJECT = Path(__file__).resolve().parents[2]


def write_text(file: Path, text: str) -> None:
    """Write `text` so that the file is the old one or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with made.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    made.replace(file)


def write_json(file: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object a line, whole or not at all."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def set_status(folder: Path, state: str, **facts: Any) -> None:
    """Note in status.json that a run is 'running', 'interrupted', 'failed' or 'finished'."""
    write_json(folder / "status.json", {"state": state, **facts})


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """Where a number comes from: versions, commit, machine."""
    return {
        "device": device,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit,
    }


def commit() -> str | None:
    """The project's git commit, '+changes' behind it if files differ from it; None outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + "+changes" * bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(PROJECT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
