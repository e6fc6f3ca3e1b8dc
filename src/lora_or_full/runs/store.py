"""Files of a run's folder: written atomically, checked by checksums, locked by one process."""

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
PARTIAL = ".partial"  # suffix of a file that is still being written
RESULTS = "results.json"
PLAN = "sweep.json"  # in a sweep's folder: the names of its runs, and the keys that it varies
CHECKSUMS = "SHA256SUMS"  # in the format of sha256sum


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it replaces `file` once all of it is on the disk.

    If the write fails, `file` keeps its old content.

    Raises:
        OSError: The file can't be written; names the file.
    """
    temporary = temporary_path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as content:
            os.fsync(content.fileno())
        temporary.replace(file)
    except OSError as error:
        error.filename = error.filename or str(file)  # a failed write does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(file: Path) -> Path:
    """Give a path beside `file` that no other process uses, on any machine that sees the disk."""
    return file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`."""
    for file in folder.rglob(f"*{PARTIAL}"):
        file.unlink()


def write_text(file: Path, text: str) -> None:
    """Write `text` atomically, without changing its line ends.

    A lone surrogate is written as its escape sequence, which JSON reads as the same.
    """
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(file: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_text(file, _json(content))


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_checksums(folder: Path, files: Mapping[str, Path]) -> None:
    """Write the SHA-256 of `files`, by their names in `folder`, to SHA256SUMS."""
    sums = [f"{_sha256(file)}  {name}\n" for name, file in files.items()]
    write_text(folder / CHECKSUMS, "".join(sums))


def damaged_files(folder: Path, among: str | tuple[str, ...] = "") -> list[str]:
    """List the files, of names that begin with `among`, that are missing or have other checksums.

    Returns:
        Their names; SHA256SUMS alone if it is damaged; none if there is no SHA256SUMS.
    """
    if not (folder / CHECKSUMS).is_file():
        return []
    text = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace")
    if not re.fullmatch(r"([0-9a-f]{64}  [^\n]+\n)+", text):
        return [CHECKSUMS]
    return [
        name
        for checksum, name in re.findall(r"(\w+)  (.+)\n", text)
        if name.startswith(among)
        and not ((folder / name).is_file() and _sha256(folder / name) == checksum)
    ]


def is_intact(folder: Path) -> bool:
    """Whether `folder` has checksums and all its files match them."""
    return (folder / CHECKSUMS).is_file() and not damaged_files(folder)


def write_results(folder: Path, results: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Write results.json last of all, with the checksums of it and of `files`.

    Where results.json is, the run is finished.
    """
    with atomic_write(folder / RESULTS) as temporary:
        temporary.write_text(_json(results), encoding="utf-8")
        names = {file.relative_to(folder).as_posix(): file for file in files}
        write_checksums(folder, names | {RESULTS: temporary})


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has ended successfully and its files are intact."""
    return (folder / RESULTS).is_file() and is_intact(folder)


def run_lock(folder: Path) -> FileLock:
    """Give the lock of a run, which the system releases however its process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCK)


def set_status(folder: Path, state: str, identity: str | None, **facts: Any) -> None:
    """Write status.json: `state` is waiting, running, interrupted, failed or finished.

    `identity` is that of `fingerprints.run_identity`, if known; `facts` are further entries.
    """
    write_json(folder / "status.json", {"state": state, "identity": identity, **facts})


def status(folder: Path) -> dict[str, Any]:
    """Read status.json; empty if it is missing or damaged."""
    try:
        content = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def swept_keys(folder: Path) -> list[str]:
    """Read the keys that the sweep of the run in `folder` varies; none if it is of no sweep."""
    try:
        plan = json.loads((folder.parent / PLAN).read_text(encoding="utf-8"))
        return [str(key) for key in plan["varies"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
