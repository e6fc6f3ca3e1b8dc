"""The record of a run: what its folder holds, written whole or not at all."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Container, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "hydra-core")
PROJECT = Path(__file__).resolve().parents[2]
LOCK = ".lock"
PLAN = "sweep.json"  # in a sweep's folder: the runs that it is to hold
# Keys of a configuration that do not change what comes out.
PLACES = frozenset({
    "run_name", "resume", "study", "output_dir", "cache_dir", "checkpoint_minutes", "model.name",
    "data.path", "data.test_path", "trainer.enable_progress_bar", "trainer.log_every_n_steps",
})  # fmt: skip


def write_text(file: Path, text: str) -> None:
    """Write `text` so that the file is the old one or the new one, never a part.

    Half a character (a lone surrogate) is written as its escape, which JSON reads as the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with made.open("w", encoding="utf-8", errors="backslashreplace") as out:
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


def lock(folder: Path) -> FileLock:
    """What the process that works on a run holds; the system frees it however that one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCK)


def set_status(folder: Path, state: str, identity: str | None, **facts: Any) -> None:
    """Note in status.json that a run is 'running', 'interrupted', 'failed' or 'finished'.

    `identity` tells the same run again."""
    write_json(folder / "status.json", {"state": state, "identity": identity, **facts})


def status(folder: Path) -> dict[str, Any]:
    """What status.json says; nothing where there is none that can be read."""
    try:
        content = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def flat(config: Mapping[str, Any], whole: Container[str] = ()) -> dict[str, Any]:
    """The values of a nested configuration by dotted key; those in `whole` are not taken apart."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name not in whole:
            inner = {f"{name}.{key}": item for key, item in value.items()}
            values |= flat(inner, whole)
        else:
            values[name] = value
    return values


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


def code() -> str | None:
    """The commit, and a hash of what differs from it; None outside git."""
    try:
        changes = _git("diff", "HEAD")
        return _git("rev-parse", "HEAD") + hashlib.sha256(changes.encode()).hexdigest()[:8]
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(PROJECT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
