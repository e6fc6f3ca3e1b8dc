"""The record of a run: what its folder holds, written whole or not at all."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

LOCK = ".lock"
PARTIAL = ".partial"  # how the name of what is being written ends
RESULTS = "results.json"
PLAN = "sweep.json"  # in a sweep's folder: the runs that it is to hold
CHECKSUMS = "SHA256SUMS"  # of the files beside it, as sha256sum writes and checks it


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A place to write to: it becomes `file` when all of it is on the disk, else the old one stays.

    Raises:
        OSError: it can't be written; names the file.
    """
    made = temporary_path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield made
        with made.open("rb+") as content:
            os.fsync(content.fileno())
        made.replace(file)
    except OSError as error:
        error.filename = error.filename or str(file)  # a write that fails does not say where
        raise
    finally:
        made.unlink(missing_ok=True)


def temporary_path(file: Path) -> Path:
    """A place beside `file` that no other process writes to, of whatever machine sees the disk."""
    return file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")


def remove_partial_files(folder: Path) -> None:
    """Remove what processes that were killed left half written in `folder`."""
    for made in folder.rglob(f"*{PARTIAL}"):
        made.unlink()


def write_text(file: Path, text: str) -> None:
    """Write `text` as it is, whole or not at all.

    Half a character (a lone surrogate) is written as its escape, which JSON reads as the same."""
    with atomic_write(file) as made:
        made.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(file: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_text(file, _json(content))


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object a line, whole or not at all."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_checksums(folder: Path, files: Mapping[str, Path]) -> None:
    """Note the content of `files` by the names that they have in `folder`, for `damaged`."""
    sums = [f"{_sha256(file)}  {name}\n" for name, file in files.items()]
    write_text(folder / CHECKSUMS, "".join(sums))


def damaged_files(folder: Path, among: str | tuple[str, ...] = "") -> list[str]:
    """The sealed files, of names that begin as `among`, that are gone or hold something else.

    The seal itself where that can't be read; nothing where none was set.
    """
    if not (folder / CHECKSUMS).is_file():
        return []
    text = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace")
    if not re.fullmatch(r"([0-9a-f]{64}  [^\n]+\n)+", text):
        return [CHECKSUMS]
    lines = [line.partition("  ") for line in text.split("\n")[:-1]]
    return [
        name
        for noted, _, name in lines
        if name.startswith(among)
        and not ((folder / name).is_file() and _sha256(folder / name) == noted)
    ]


def is_intact(folder: Path) -> bool:
    """Whether all that was sealed in `folder` is as it was."""
    return (folder / CHECKSUMS).is_file() and not damaged_files(folder)


def write_results(folder: Path, results: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Write results.json, sealed with the `files` that belong to it, last of all: where it is, the
    run is finished."""
    with atomic_write(folder / RESULTS) as made:
        made.write_text(_json(results), encoding="utf-8")
        write_checksums(
            folder, {f.relative_to(folder).as_posix(): f for f in files} | {RESULTS: made}
        )


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has come to its end, and all it left is as it was."""
    return (folder / RESULTS).is_file() and is_intact(folder)


def run_lock(folder: Path) -> FileLock:
    """What the process that works on a run holds; the system frees it however that one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCK)


def set_status(folder: Path, state: str, identity: str | None, **facts: Any) -> None:
    """Note in status.json what a run is: waiting, running, interrupted, failed or finished.

    `identity` tells the same run again."""
    write_json(folder / "status.json", {"state": state, "identity": identity, **facts})


def status(folder: Path) -> dict[str, Any]:
    """What status.json says; nothing where there is none that can be read."""
    try:
        content = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
