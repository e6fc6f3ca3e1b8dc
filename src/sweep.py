"""A sweep's jobs: each in a process of its own, and what finished as the same run not again."""

import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import Timeout

from errors import UserError
from study import record
from terminal import duration, sweep_table

RUN = Path(__file__).with_name("run.py")
INTERRUPTED = 130  # the exit code of what Ctrl-C ended


class Sweep:
    """So many `jobs`, told as they go, and all of them at the end; none of a single run."""

    def __init__(self) -> None:
        self.jobs = self.number = 0
        self.names: list[str] = []  # of the runs that differ
        self.folders: dict[str, Path] = {}  # of each run, by its identity
        self.failed: list[tuple[str, str]] = []  # which, and why
        self.seconds: list[float] = []

    def plan(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Take the settings of all jobs that will come."""
        self.jobs = len(jobs)
        self.names = list({json.dumps(job): str(job["run_name"]) for job in jobs}.values())

    def run(self, settings: dict[str, Any], overrides: list[str], place: Path) -> None:
        """Run a job in a folder of its own in `place`, unless the same run is there, finished.

        One that fails is told, here and at the end.
        """
        from identity import identity_of  # only now: it takes seconds

        if not self.number:
            # For the report, to name the runs that a killed sweep did not begin.
            record.write_json(place / record.PLAN, {"runs": self.names})
        self.number += 1
        title, name = f"Job {self.number} of {self.jobs}", str(settings["run_name"])
        try:
            identity = identity_of(settings)
        except UserError as error:
            folder = _folder(place, name, "")
            record.set_status(folder, "failed", None, error=str(error))
            self._fail(title, folder.name, str(error))
            return
        if identity in self.folders:
            print(f"{title} is the one in {self.folders[identity].name} again: run once.")
            return
        folder = _folder(place, name, identity)
        self.folders[identity] = folder
        self._wait(title, folder)
        if (folder / "results.json").is_file():
            print(f"{title} finished before: {folder}")
            return
        left = ""
        if self.seconds:
            rest = len(self.names) - len(self.folders) + 1
            left = f", about {duration(statistics.mean(self.seconds) * rest)} left"
        print(f"\n{title}{left}: {' '.join(overrides)}", flush=True)
        # The preset's own sweep is this one: a job of it has one value of each.
        words = [*overrides, "hydra.sweeper.params=null", word("hydra.run.dir", folder)]
        if (folder / "checkpoints" / "last.ckpt").is_file():
            words = [word("resume", folder)]
        elif (folder / "config.yaml").is_file():
            shutil.rmtree(folder)
        began = time.monotonic()
        code = _run_child(words)
        if code:
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self._fail(title, folder.name, record.status(folder).get("error") or ended)
        else:
            self.seconds.append(time.monotonic() - began)

    def _wait(self, title: str, folder: Path) -> None:
        """Wait for another process that works on the run, such as one that a killed sweep left."""
        lock = record.lock(folder)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"{title} is at work in another process: waiting for it.", flush=True)
            lock.acquire()
        lock.release()

    def _fail(self, title: str, name: str, reason: str) -> None:
        self.failed.append((name, reason))
        print(f"{title} failed: {reason}. The sweep goes on.", file=sys.stderr)

    def close(self) -> None:
        """Show the results of all jobs.

        Raises:
            UserError: some failed.
        """
        if not self.number:
            return
        results: dict[str, dict[str, Any] | None] = {name: None for name, _ in self.failed}
        for folder in self.folders.values():
            file = folder / "results.json"
            results[folder.name] = json.loads(file.read_text()) if file.is_file() else None
        sweep_table(results)
        if self.failed:
            lines = [f"\n  {name}: {reason}" for name, reason in self.failed]
            raise UserError(
                f"{len(self.failed)} of {self.jobs} jobs failed. The same command, with the same "
                f"study=<name>, redoes these alone.{''.join(lines)}"
            )


def word(key: str, place: Path) -> str:
    """A path on Hydra's command line, whatever characters it has."""
    text = re.sub(r"(\\*)('|$)", r"\1\1\2", str(place)).replace("'", "\\'")
    return f"{key}='{text}'"


def _folder(place: Path, name: str, identity: str) -> Path:
    """Where the run is already, else a folder in which none ever began."""
    for folder in (place / name, *(place / f"{name}-{number}" for number in range(2, 10_000))):
        begun = (folder / "config.yaml").is_file() or (folder / "results.json").is_file()
        if not begun or record.status(folder).get("identity") == identity:
            return folder
    raise UserError(f"{place} is full of runs called {name}.")


def _run_child(words: list[str]) -> int:
    """The exit code of a run in a process of its own; ends this one if it was stopped."""
    child = subprocess.Popen([sys.executable, str(RUN), *words])
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the child by itself
            child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if stopped or code == INTERRUPTED:
        sys.exit(INTERRUPTED)
    return code
