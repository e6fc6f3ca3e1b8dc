"""Injects faults into runs, sweeps and reports at random moments, and checks that nothing is lost.

python tests/faults/harness.py --count=200 --seed=0

After each fault: no finished run has changed, one line says what happened and what to do, and the
same command or resume= gives the numbers of an undisturbed run. TABLE lists which fault comes at
which moment, and what is then checked. A case is a fork of this process, in which everything is
imported already, so that it takes seconds; a case that fails keeps its folder.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import WORK, Commands, Done  # first: it says where the project is
from forks import Fork, Job
from strikes import (
    AMID,
    DAMAGE,
    ERRORS,
    FULL,
    LIMIT,
    MEMORY,
    SIGNALS,
    STEPS,
    Places,
    Strike,
    damage,
)
from templates import KILLED, MODES, SWEEP, Templates, key_of, outcome, tree, weights_of

from lora_or_full.cli import main as cli
from lora_or_full.runs import store

BETWEEN = {
    "newest checkpoint": ["checkpoints/last.ckpt"],
    "both checkpoints": ["checkpoints/last.ckpt", "checkpoints/before.ckpt"],
    "best weights": ["checkpoints/best.safetensors"],
    "answers so far": ["predictions.partial.jsonl"],
    "metrics.csv": ["metrics.csv"],
}
OF_REPORT = ("results.json", "predictions.jsonl", "contexts.json")
OF_RUN = (*OF_REPORT, "weights", "SHA256SUMS")


@dataclass
class Case:
    """One fault: the row of TABLE, the dice, a folder of its own, and the templates."""

    fault: str
    moment: str
    rng: random.Random
    place: Path
    made: Templates

    def __post_init__(self) -> None:
        self.mode = self.rng.choice(MODES)
        self.command = Commands(self.place)

    def strike(self, places: Places, counts: dict[str, int]) -> Strike:
        number = self.rng.randint(1, counts[self.moment])
        return Strike(self.fault, self.moment, number, places, self.rng)

    def strike_any_time(self, fork: Fork, seconds: float, group: bool) -> bool:
        """Send the signal at a moment of so many `seconds`; whether the process still was there."""
        time.sleep(self.rng.uniform(0.02, seconds))  # from when it is at its own work
        if os.waitid(os.P_PID, fork.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        (os.killpg if group else os.kill)(fork.pid, signal.Signals[self.fault])
        return True


# What is checked. Each gives what does not hold, or None where the process ended before its moment.
Check = Callable[[Case], list[str] | None]


def resumes(case: Case) -> list[str] | None:
    """Resume a run after a fault, beside a finished run."""
    with disk(case) as place:
        folder, cache = place / "runs" / "run", case.place / "cache"
        other = place / "runs" / "finished"
        shutil.copytree(case.made.place / case.mode, other)
        finished = tree(other)
        words = case.made.words(case.mode, folder, cache)
        if case.moment == "any time":
            fork = case.command.start(words)
            met = case.strike_any_time(fork, case.made.seconds[case.mode], group=True)
            done = case.command.end(fork)
        else:
            strike = case.strike(Places(folder, cache), case.made.counts[case.mode])
            done = case.command(words, strike.install)
            met = strike.met
        if not met:
            return None
        (place / "filler").unlink(missing_ok=True)
        problems = wrong_ending(case.fault, done, store.is_finished(folder))
        if not store.is_finished(folder):
            resumable = (folder / "config.yaml").is_file()
            saved = any((folder / "checkpoints").glob("*.ckpt"))
            again = case.command([f"resume={folder}"] if resumable else words)
            problems += not_successful(again)
            if left := [file.name for file in folder.rglob(f"*{store.PARTIAL}")]:
                problems.append(f"left half written: {', '.join(left)}")
            if "Warning" in again.err:
                problems.append(f"something was left damaged: {again.err}")
            if saved != ("Resumes" in again.out):
                problems.append("it does not resume from its checkpoint")
        problems += differences(case.made, folder, f"{case.mode} 1")
        if tree(other) != finished:
            problems.append("a finished run has changed")
        return problems


def falls_back(case: Case) -> list[str] | None:
    """Resume an interrupted run with a damaged file."""
    names = BETWEEN[case.moment]
    fits = [k for k in KILLED if (case.made.interrupted(case.mode, k) / names[0]).is_file()]
    folder = case.place / "run"
    shutil.copytree(case.made.interrupted(case.mode, case.rng.choice(fits)), folder)
    for name in names:
        damage(folder / name, case.fault, case.rng)
    done = case.command([f"resume={folder}"])
    problems = not_successful(done)
    reported = "Warning: damaged: " in done.err and all(Path(n).name in done.err for n in names)
    if names[0].startswith("checkpoints") and not reported:
        problems.append(f"the damage is not reported: {done.err}")
    return problems + differences(case.made, folder, f"{case.mode} 1", but=names[0])


def rebuilds(case: Case) -> list[str] | None:
    """Run with a damaged file in the cache."""
    folder, cache = case.place / "run", case.place / "cache"
    shutil.copytree(case.made.place / f"cache_{case.mode}", cache)
    kind = {"tokens": "data", "scores before training": "before"}[case.moment]
    files = [f for f in (cache / kind).rglob("*") if f.is_file() and f.stat().st_size]
    damage(case.rng.choice(sorted(files)), case.fault, case.rng)
    done = case.command(case.made.words(case.mode, folder, cache))
    problems = not_successful(done)
    if "is damaged; it is" not in done.err:
        problems.append(f"the damage is not reported: {done.err}")
    return problems + differences(case.made, folder, f"{case.mode} 1")


def repeats(case: Case) -> list[str] | None:
    """Repeat a sweep in which a finished run has a damaged file."""
    study, words = own_study(case)
    struck = study / case.rng.choice(case.made.runs).name
    key, others = key_of(struck), {f: tree(f) for f in study.iterdir() if f.is_dir()}
    del others[struck]
    damage(file_of(struck, case.moment), case.fault, case.rng)
    done = case.command(words)
    problems = not_successful(done)
    if "Warning: damaged in" not in done.err or done.out.count("finished before") != 3:
        problems.append(f"other runs than the damaged one are repeated: {done}")
    problems += differences(case.made, struck, key)
    return problems + changed(others)


def leaves_out(case: Case) -> list[str] | None:
    """Report on a study in which a run has a damaged file."""
    study, _ = own_study(case)
    struck = study / case.rng.choice(case.made.runs).name
    damage(file_of(struck, case.moment), case.fault, case.rng)
    before = tree(study)
    done = case.command(["report", "study", "--output=report"], main=cli.main)
    problems = not_successful(done)
    named = json.loads((case.place / "report" / "report.json").read_text())["left_out"]
    if len(named) != 1 or struck.name not in named[0] or "damaged" not in named[0]:
        problems.append(f"the damaged run is not named: {named}")
    if tree(study) != before:
        problems.append("the report has changed a run")
    return problems


def others_continue(case: Case) -> list[str] | None:
    """Repeat a sweep of which one job met a fault."""
    study, words = own_study(case)
    struck = study / case.rng.choice(case.made.runs).name
    key = key_of(struck)
    shutil.rmtree(struck)
    others = {f: tree(f) for f in study.iterdir() if f.is_dir()}
    counts = case.made.counts[key.split()[0]]
    # The scores before training are in the cache: of the two tests there is one.
    strike = case.strike(Places(), counts | {"test": counts["test"] // 2})
    done = case.command(words, lambda: setattr(Job, "before", lambda _: strike.install()))
    name = "killed by SIGKILL" if case.fault == "OOM killer" else "The memory is full"
    problems = [] if done.code == 1 and "Traceback" not in done.err else [f"ended so: {done}"]
    for text in (f"failed: {name}", f"{struck.name}: {name}", "1 of 4 jobs failed"):
        if text not in done.err:
            problems.append(f"it does not say '{text}': {done.err}")
    problems += not_successful(case.command(words))
    problems += differences(case.made, struck, key)
    return problems + changed(others)


def sweep_resumes(case: Case) -> list[str] | None:
    """Repeat a sweep that met a fault itself, with its job."""
    study, words = own_study(case)
    gone = {study / folder.name: key_of(folder) for folder in case.rng.sample(case.made.runs, 2)}
    for folder in gone:
        shutil.rmtree(folder)
    others = {f: tree(f) for f in study.iterdir() if f.is_dir()}
    fork = case.command.start(words)
    seconds = sum(case.made.seconds[mode] for mode in MODES)
    met = case.strike_any_time(fork, seconds, group=case.fault != "SIGTERM")
    done = case.command.end(fork)
    if not met:
        return None
    problems = wrong_ending(case.fault, done, all(map(store.is_finished, gone)))
    problems += not_successful(case.command(words))
    for folder, key in gone.items():
        problems += differences(case.made, folder, key)
    return problems + changed(others)


def writes_again(case: Case) -> list[str] | None:
    """Repeat a report that met a fault while it was written."""
    study, _ = own_study(case)
    before = tree(study)
    words, folder = ["report", "study", "--output=report"], case.place / "report"
    strike = case.strike(Places(report=folder), case.made.counts["report"])
    done = case.command(words, strike.install, cli.main)
    if not strike.met:
        return None
    whole = done.code == 0 and same_report(folder, case.made.report)
    problems = wrong_ending(case.fault, done, whole)
    problems += not_successful(case.command(words, main=cli.main))
    if not same_report(folder, case.made.report):
        problems.append("another report came of it")
    if tree(study) != before:
        problems.append("the report has changed a run")
    return problems


def rows(
    faults: Sequence[str], moments: Sequence[str], check: Check
) -> list[tuple[str, str, Check]]:
    return [(fault, moment, check) for fault in faults for moment in moments]


FILES = ("checkpointing", "records", "cache")
TABLE = [
    *rows(SIGNALS, (*STEPS, *FILES, AMID, "any time"), resumes),
    *rows((LIMIT, FULL), ("training", "test", "checkpointing", "records"), resumes),
    (FULL, AMID, resumes),
    *rows(tuple(ERRORS), ("training", "test", *FILES), resumes),
    *rows(DAMAGE, tuple(BETWEEN), falls_back),
    *rows(DAMAGE, ("tokens", "scores before training"), rebuilds),
    *rows(DAMAGE, OF_RUN, repeats),
    *rows(DAMAGE, OF_REPORT, leaves_out),
    *rows(MEMORY, ("training", "validation", "test"), others_continue),
    *rows(SIGNALS, ("any time of a sweep",), sweep_resumes),
    *rows((*SIGNALS, *ERRORS), ("report",), writes_again),
]


@contextlib.contextmanager
def disk(case: Case) -> Iterator[Path]:
    """The folder of a case; for a full disk, one of a few MB."""
    if case.fault != FULL:
        yield case.place
        return
    place = case.place / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def own_study(case: Case) -> tuple[Path, list[str]]:
    """A copy of the finished sweep, and the command that makes it."""
    study = case.place / "study"
    shutil.copytree(case.made.study, study)
    cache = case.made.place / "cache"
    return study, [*SWEEP, f"output_dir={case.place}", f"cache_dir={cache}"]


def file_of(folder: Path, name: str) -> Path:
    return weights_of(folder) if name == "weights" else folder / name


def wrong_ending(fault: str, done: Done, finished: bool) -> list[str]:
    """What is wrong with how a command ended after a fault, and with its message."""
    if "Traceback" in done.err + done.out:
        return [f"a trace: {done.err}"]
    if fault == "SIGKILL":
        right = done.code == -signal.SIGKILL
    elif done.code == 0:  # the fault came too late to matter
        right = finished
    elif fault in SIGNALS:
        # Before a run listens, SIGTERM ends it as it does any process.
        unheard = fault == "SIGTERM" and done.code == -signal.SIGTERM
        right = unheard or (done.code == 130 and "Stopped." in done.err)
    else:
        words = {LIMIT: "File too large", "EROFS": "Read-only file system"}
        errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
        right = done.code == 1 and len(errors) == 1 == len(done.err.splitlines())
        right = right and words.get(fault, "No space left on device") in errors[0]
    return [] if right else [f"ended so: {done}"]


def not_successful(done: Done) -> list[str]:
    """What is wrong with a command that had to succeed."""
    fine = done.code == 0 and "Traceback" not in done.err and "Error" not in done.err
    return [] if fine else [f"failed: {done}"]


def differences(made: Templates, folder: Path, key: str, but: str = "") -> list[str]:
    """What differs between a run and the undisturbed one of the same key."""
    if not store.is_finished(folder):
        return [f"{folder} is not finished: {store.damaged_files(folder)}"]
    found, wanted = outcome(folder, but), made.outcomes[key]
    expected = {name: text for name, text in wanted.files.items() if name != but}
    differ = [name for name in expected if found.files.get(name) != expected[name]]
    if "metrics.csv" in differ and log_misses_a_row(found.files["metrics.csv"], expected):
        differ.remove("metrics.csv")
    differ += [
        name
        for name in ("epochs", "before", "test", "samples")
        if getattr(found, name) != getattr(wanted, name)
    ]
    return [f"other than in an undisturbed run: {', '.join(differ)}"] if differ else []


def log_misses_a_row(log: bytes, expected: dict[str, bytes]) -> bool:
    """Whether metrics.csv misses only the row that was to be written at the fault.

    No checkpoint has it, and results.json holds its numbers too.
    """
    rows = iter(wanted := expected["metrics.csv"].splitlines())
    return all(row in rows for row in log.splitlines()) and len(wanted) - log.count(b"\n") == 1


def changed(others: dict[Path, Any]) -> list[str]:
    return [f"{folder} has changed" for folder, before in others.items() if tree(folder) != before]


def same_report(folder: Path, wanted: Path) -> bool:
    """Whether two reports have the same content, but for what a kill left half written."""
    found, expected = (
        {name: text for name, (_, text) in tree(f).items() if not name.endswith(store.PARTIAL)}
        for f in (folder, wanted)
    )
    return found == expected


def can_mount() -> bool:
    place = WORK / "mounted"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", place], check=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="faults in all (200)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--only", type=int, help="the number of the one case to do")
    args = parser.parse_args()
    table = list(TABLE)
    if not can_mount():
        print(f"Left out: {FULL}, since a small disk can't be mounted here.")
        table = [row for row in table if row[0] != FULL]
    random.Random(args.seed).shuffle(table)
    began = time.monotonic()
    made = Templates()
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in made.seconds.items())
    print(f"Templates made in {time.monotonic() - began:.0f} s ({took}).", flush=True)
    held: Counter[tuple[str, str]] = Counter()
    broken: Counter[tuple[str, str]] = Counter()
    for number in range(args.count) if args.only is None else [args.only]:
        fault, moment, check = table[number % len(table)]
        rng = random.Random(f"{args.seed} {number}")
        for attempt in range(10):  # a moment may lie behind the end: another is drawn
            case = Case(fault, moment, rng, WORK / f"case{number}_{attempt}", made)
            try:
                problems = check(case)
            except Exception:
                problems = [traceback.format_exc()]
            if problems is not None:
                break
            shutil.rmtree(case.place)
        else:
            problems = ["it never came to its moment"]
        (broken if problems else held)[(fault, moment)] += 1
        if problems:
            print(f"\nCase {number}: {fault}, {moment} ({case.mode}), in {case.place}:")
            print("\n".join(problems), flush=True)
        else:
            shutil.rmtree(case.place)
        if (number + 1) % 20 == 0:
            print(f"{number + 1} faults, of which {held.total()} held", flush=True)
    show(held, broken, time.monotonic() - began)
    if broken:
        sys.exit(1)
    shutil.rmtree(WORK)


def show(held: Counter[tuple[str, str]], broken: Counter[tuple[str, str]], seconds: float) -> None:
    """A line a kind, and the sum."""
    print(f"\n{'fault':<15}{'moment or what it hits':<26}{'faults':>7}{'held':>6}{'not':>5}")
    for key in sorted(held | broken):
        print(f"{key[0]:<15}{key[1]:<26}{held[key] + broken[key]:>7}{held[key]:>6}{broken[key]:>5}")
    total = held.total() + broken.total()
    kinds = len(held | broken)
    print(
        f"\n{total} faults of {kinds} kinds in {seconds:.0f} s: after {held.total()} nothing was "
        f"lost, after {broken.total()} something was."
    )


if __name__ == "__main__":
    main()
