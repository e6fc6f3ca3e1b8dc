"""A sweep's jobs: each in a process of its own, and what finished as the same run not again.

Hydra's launcher says where a job runs and when: here one after another, or in workers, several at
once and on other machines. They have nothing in common but the sweep's folder.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from lora_or_full.errors import UserError
from lora_or_full.runs import provenance, store
from lora_or_full.training.console import duration, sweep_table

RUN = provenance.PROJECT / "src" / "run.py"
INTERRUPTED = 130  # the exit code of what Ctrl-C ended


class Sweep:
    """`jobs` (the settings of each) in folders of their own in `place`.

    They are told as they go, and all of them at the end. A worker gets a copy of this.
    """

    def __init__(self, jobs: Sequence[dict[str, Any]], place: Path) -> None:
        self.jobs, self.place = list(jobs), place.absolute()
        self.notes = self.place / f".jobs-{time.time_ns()}-{os.getpid()}"  # how each of them ended
        self.seconds: list[float] = []  # of the jobs that ran in this process

    @contextmanager
    def told(self) -> Iterator[None]:
        """Note which runs are to come, so that the report can name what is missing; at the end show
        the results of all.

        Raises:
            UserError: some failed.
        """
        names = [str(self.jobs[number]["run_name"]) for number in self._different()]
        with store.run_lock(self.place):
            store.write_json(self.place / store.PLAN, {"runs": names})
        try:
            yield
            self._close()
        finally:
            shutil.rmtree(self.notes, ignore_errors=True)

    def run(self, number: int, overrides: list[str]) -> None:
        """Run a job, unless the same run is there, finished. One that fails is told, here and at
        the end."""
        settings = self.jobs[number]
        title = f"Job {number + 1} of {len(self.jobs)}"
        if (first := self.jobs.index(settings)) != number:
            print(f"{title} is job {first + 1} again: run once.", flush=True)
            return
        from lora_or_full.data.fingerprints import identity_of  # only now: it takes seconds

        try:
            identity = identity_of(settings)
        except UserError as error:
            with store.run_lock(self.place):
                folder = _folder(self.place, str(settings["run_name"]), "")
                store.set_status(folder, "failed", None, error=str(error))
            self._note(number, folder, str(error))
            return
        with store.run_lock(self.place):  # two jobs of one name do not choose the same folder
            folder = _folder(self.place, str(settings["run_name"]), identity)
            if store.status(folder).get("identity") != identity:
                store.set_status(folder, "waiting", identity)
        with _alone(title, FileLock(self.place / f".{folder.name}.lock")):
            self._note(number, folder, self._run_in(folder, number, title, overrides))

    def _run_in(self, folder: Path, number: int, title: str, overrides: list[str]) -> str | None:
        """Run a job that no other process runs; gives why it failed."""
        with _alone(title, store.run_lock(folder)):
            pass  # what a killed sweep left running has ended now
        if store.is_finished(folder):
            print(f"{title} finished before: {folder}", flush=True)
            return None
        left = ""
        if self.seconds:
            rest = sum(other >= number for other in self._different())
            left = f", about {duration(statistics.mean(self.seconds) * rest)} left"
        print(f"\n{title}{left}: {' '.join(overrides)}", flush=True)
        # The preset's own sweep is this one: a job of it has one value of each.
        words = [*overrides, "hydra.sweeper.params=null", word("hydra.run.dir", folder)]
        if (folder / "config.yaml").is_file():
            words = [word("resume", folder)]
        began = time.monotonic()
        code = _run_child(words)
        if not code and store.is_finished(folder):
            self.seconds.append(time.monotonic() - began)
            return None
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        told = store.status(folder).get("error") if code > 0 else None
        return told or ended

    def _different(self) -> list[int]:
        """The numbers of the jobs without those that are another one again."""
        return [n for n, settings in enumerate(self.jobs) if self.jobs.index(settings) == n]

    def _note(self, number: int, folder: Path, failed: str | None) -> None:
        if failed:
            title = f"Job {number + 1} of {len(self.jobs)}"
            print(f"{title} failed: {failed}. The sweep goes on.", file=sys.stderr, flush=True)
        note = {"folder": folder.name, "failed": failed}
        store.write_json(self.notes / f"{number}.json", note)

    def _close(self) -> None:
        results: dict[str, dict[str, Any] | None] = {}
        failed = []
        for number in self._different():
            note = {"folder": str(self.jobs[number]["run_name"]), "failed": "its worker was lost"}
            if (file := self.notes / f"{number}.json").is_file():
                note = json.loads(file.read_text(encoding="utf-8"))
            name, reason = note["folder"], note["failed"]
            if reason:
                failed.append(f"\n  {name}: {reason}")
            done = store.is_finished(folder := self.place / name)
            text = (folder / store.RESULTS).read_text(encoding="utf-8") if done else "null"
            results[name] = json.loads(text)
        sweep_table(results)
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.jobs)} jobs failed. The same command, with the same "
                f"study=<name>, redoes these alone.{''.join(failed)}"
            )


@contextmanager
def _alone(title: str, lock: FileLock) -> Iterator[None]:
    """Hold `lock`; where another process does, say so and wait for it."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{title} is at work in another process: waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def word(key: str, place: Path) -> str:
    """A path on Hydra's command line, whatever characters it has."""
    text = re.sub(r"(\\*)('|$)", r"\1\1\2", str(place)).replace("'", "\\'")
    return f"{key}='{text}'"


def _folder(place: Path, name: str, identity: str) -> Path:
    """Where the run is already, else a folder that is no other run's."""
    for folder in (place / name, *(place / f"{name}-{number}" for number in range(2, 10_000))):
        owner = store.status(folder).get("identity")
        begun = (folder / "config.yaml").is_file() or (folder / "results.json").is_file()
        if owner == identity or not (owner or begun):
            return folder
    raise UserError(f"{place} is full of runs called {name}.")


def _run_child(words: list[str]) -> int:
    """The exit code of a run in a process of its own; ends this one if it was stopped."""
    # As in an interactive session, in a worker of SLURM's too: what it counts are the processes of
    # the sweep, and a job starts those of its devices itself.
    environment = os.environ | {"SLURM_JOB_NAME": "interactive"}
    child = subprocess.Popen([sys.executable, str(RUN), *words], env=environment)
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
        print("Stopped. The same command, with the same study=<name>, goes on.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    return code
