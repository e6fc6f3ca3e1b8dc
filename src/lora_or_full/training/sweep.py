"""The jobs of a sweep, each in its own process; finished ones are not run again.

Hydra's launcher decides where and when a job runs: here one after another, or in workers, several
at once and on other machines. These share only the sweep's folder.
"""

import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_or_full.config.compose import PROJECT, path_override
from lora_or_full.config.schema import Config, typed
from lora_or_full.errors import UserError
from lora_or_full.processes import stop_signals_to
from lora_or_full.runs import store
from lora_or_full.training.console import duration, sweep_table

RUN = PROJECT / "src" / "run.py"
FOLLOWING = {"run_name", "label", "lr_by_mode"}  # keys that follow from others
INTERRUPTED = 130  # exit code after Ctrl-C


class Sweep:
    """The jobs of a sweep, each in its own folder. Each worker gets a copy of this."""

    def __init__(self, jobs: Sequence[Config], folder: Path) -> None:
        self.jobs, self.folder = list(jobs), folder.absolute()
        self.first = [self.jobs.index(config) for config in self.jobs]  # equal job of each job
        self.notes = self.folder / f".jobs-{time.time_ns()}-{os.getpid()}"  # how each job ended
        self.seconds: list[float] = []  # of the jobs that ran in this process

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Record which runs are planned; at the end show the results of all.

        Raises:
            UserError: Some jobs failed.
        """
        names = [self.jobs[number].run_name for number in sorted(set(self.first))]
        with store.run_lock(self.folder):
            plan = {"runs": names, "varies": self._varies()}
            store.write_json(self.folder / store.PLAN, plan)
        try:
            yield
            self._close()
        finally:
            shutil.rmtree(self.notes, ignore_errors=True)

    def run(self, number: int, overrides: list[str]) -> None:
        """Run a job by its command line, unless the same run is finished.

        A failure is reported now and at the end of the sweep.
        """
        config, title = self.jobs[number], f"Job {number + 1} of {len(self.jobs)}"
        if self.first[number] != number:
            print(f"{title} is job {self.first[number] + 1} again: run once.", flush=True)
            return
        from lora_or_full.data.fingerprints import run_identity  # late: it takes seconds

        try:
            identity, failed = run_identity(config), None
        except UserError as error:
            identity, failed = "", str(error)
        with store.run_lock(self.folder):  # two jobs of one name do not choose the same folder
            folder = self._run_folder(config.run_name, identity)
            if failed:
                store.set_status(folder, "failed", None, error=failed)
            elif store.status(folder).get("identity") != identity:
                store.set_status(folder, "waiting", identity)
        if not failed:
            with _acquired(title, FileLock(self.folder / f".{folder.name}.lock")):
                failed = self._run_in(folder, title, number, overrides)
        if failed:
            reason = failed.removesuffix(".")
            print(f"{title} failed: {reason}. The sweep continues.", file=sys.stderr, flush=True)
        store.write_json(self.notes / f"{number}.json", {"folder": folder.name, "failed": failed})

    def _varies(self) -> list[str]:
        """The keys that have several values, but those that only one mode has."""
        values: dict[str, set[str]] = {}
        for config in self.jobs:
            for key, value in config.flat().items():
                if value is not None and key.partition(".")[0] not in FOLLOWING:
                    values.setdefault(key, set()).add(typed(value))
        return [key for key, found in values.items() if len(found) > 1 and key != "adapter.r"]

    def _run_in(self, folder: Path, title: str, number: int, overrides: list[str]) -> str | None:
        """Run a job that no other process runs; give the reason if it failed."""
        with _acquired(title, store.run_lock(folder)):
            pass  # a run that a killed sweep had started has ended now
        if store.is_finished(folder):
            print(f"{title} finished before: {folder}", flush=True)
            return None
        left = ""
        if self.seconds:
            remaining = sum(other >= number for other in set(self.first))
            left = f", about {duration(statistics.mean(self.seconds) * remaining)} left"
        print(f"\n{title}{left}: {' '.join(overrides)}", flush=True)
        begun = (folder / "config.yaml").is_file()
        words = [
            *overrides,
            "hydra.sweeper.params=null",  # the preset's own sweep is this one
            f"run_name='{self.jobs[number].run_name}'",
            path_override("resume" if begun else "hydra.run.dir", folder),
        ]
        began = time.monotonic()
        code = _run_child(words)
        if not code and store.is_finished(folder):
            self.seconds.append(time.monotonic() - began)
            return None
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        reason = store.status(folder).get("error") if code > 0 else None
        return reason or ended

    def _run_folder(self, name: str, identity: str) -> Path:
        """The folder that holds this run already, or else one that holds no other."""
        for number in itertools.count(1):
            folder = self.folder / (name if number == 1 else f"{name}-{number}")
            owner = store.status(folder).get("identity")
            begun = (folder / "config.yaml").is_file() or (folder / store.RESULTS).is_file()
            if owner == identity or not (owner or begun):
                return folder
        raise AssertionError

    def _close(self) -> None:
        results: dict[str, dict[str, Any] | None] = {}
        failed = []
        for number in sorted(set(self.first)):
            note = {"folder": self.jobs[number].run_name, "failed": "its worker was lost"}
            if (file := self.notes / f"{number}.json").is_file():
                note = json.loads(file.read_text(encoding="utf-8"))
            if note["failed"]:
                failed.append(f"\n  {note['folder']}: {note['failed']}")
            record = self.folder / note["folder"] / store.RESULTS
            done = store.is_finished(record.parent)
            results[note["folder"]] = json.loads(record.read_text("utf-8")) if done else None
        sweep_table(results)
        print(f"to compare them: lora-or-full report {shlex.quote(str(self.folder))}", flush=True)
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.jobs)} jobs failed. The same command, with the same "
                f"study=<name>, repeats only these.{''.join(failed)}"
            )


def _acquired(title: str, lock: FileLock) -> AbstractContextManager[Any]:
    """Acquire a lock until its context ends; if another process holds it, say so and wait."""
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"{title} is running in another process: waiting for it.", flush=True)
        return lock.acquire()


def _run_child(words: list[str]) -> int:
    """Run a job in its own process and give its exit code; exit if it was stopped."""
    # As in an interactive session, also in a worker of SLURM: SLURM counts the processes of the
    # sweep, and a job starts those of its devices itself.
    environment = os.environ | {"SLURM_JOB_NAME": "interactive"}
    child = subprocess.Popen([sys.executable, str(RUN), *words], env=environment)
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the child by itself
            child.terminate()

    with stop_signals_to(stop):
        code = child.wait()
    if stopped or code == INTERRUPTED:
        print("Stopped. To resume: the same command, with the same study=<name>.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    return code
