"""Reads the runs of a study from their folders, and groups them into comparable arms."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_or_full.errors import UserError
from lora_or_full.report.study import Arm, Run, Study, shown
from lora_or_full.runs import store
from lora_or_full.runs.reader import check_scores, read_answers, read_record
from lora_or_full.runs.schema import RunRecord

LONGEST = 60  # characters of a value in a label
LONGEST_LABEL = 100
# What a report needs of a run.
READ = (store.RESULTS, "predictions.jsonl", "contexts.json")


def collect(folders: Sequence[Path]) -> Study:
    """Collect the runs in some folders (of runs, of sweeps, or that hold them) into a study."""
    runs, left_out = [], _never_started(folders)
    for folder in dict.fromkeys(_run_folders(folders)):
        found = _read(folder)
        if isinstance(found, Run):
            runs.append(found)
        else:
            left_out.append(f"{folder}: {found}")
    runs, unlike = _alike(runs)
    arms, twice = _arms(runs)
    return Study(arms, left_out + unlike + twice)


def _run_folders(folders: Iterable[Path]) -> list[Path]:
    return [
        folder
        for top in folders
        for folder in sorted(
            {file.parent for name in ("config.yaml", "status.json") for file in top.rglob(name)}
        )
    ]


def _never_started(folders: Iterable[Path]) -> list[str]:
    """The runs that a sweep planned, but that have no folder."""
    missing = []
    for file in sorted({file for top in folders for file in top.rglob(store.PLAN)}):
        try:
            names = json.loads(file.read_text(encoding="utf-8"))["runs"]
            if not isinstance(names, list):
                raise TypeError
            planned = Counter(map(str, names))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            missing.append(f"{file}: it can't be read ({type(error).__name__})")
            continue
        names_there = [status.parent.name for status in file.parent.glob("*/status.json")]
        # A number after its name tells a run from one of the same name.
        found = Counter(
            name if name in planned else re.sub(r"-\d+$", "", name) for name in names_there
        )
        missing += [
            f"{file.parent / name}: it was planned, but never started"
            for name, count in (planned - found).items()
            for _ in range(count)
        ]
    return missing


def _read(folder: Path) -> Run | str:
    """The run in a folder, or why it can't be used."""
    status = store.status(folder)
    if not (folder / store.RESULTS).is_file():
        if status.get("state") == "failed":
            return f"failed ({status.get('error', 'no reason is recorded')})"
        return f"not finished (status: {status.get('state', 'none')})"
    try:
        if damaged := store.damaged_files(folder, READ):
            return f"damaged: {', '.join(damaged)} (resume={folder} repeats the run)"
        run = Run(folder, read_record(folder, RunRecord), read_answers(folder))
        check_scores(folder, run.record, run.answers)
    except UserError as error:
        return str(error).replace(f"{folder}{os.sep}", "")  # the line begins with the folder
    except OSError as error:
        return f"its files can't be read ({type(error).__name__}: {error})"
    return run


def _alike(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The largest set of runs that can be compared, and why others are left out."""
    sets = Counter(tuple(run.comparable.values()) for run in runs)
    if not sets:
        return [], []
    common, count = sets.most_common(1)[0]
    kept, left_out = [], []
    for run in runs:
        unlike = [
            f"{name} {value}, not {wanted}"
            for (name, value), wanted in zip(run.comparable.items(), common, strict=True)
            if value != wanted
        ]
        if unlike:
            left_out.append(f"{run.folder}: {'; '.join(unlike)} as the {count} runs shown")
        else:
            kept.append(run)
    return kept, left_out


def _arms(runs: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    """Runs by configuration; of two with the same seed, the one that finished last counts."""
    grouped: dict[str, dict[int, Run]] = {}
    left_out = []
    for run in sorted(runs, key=lambda r: -(r.folder / "results.json").stat().st_mtime):
        seeds = grouped.setdefault(json.dumps(run.config, sort_keys=True), {})
        if run.seed in seeds:
            other = seeds[run.seed]
            unlike = [
                name
                for name, of in (
                    ("commit", lambda r: r.record.environment.commit),
                    ("training questions", lambda r: r.trained_on),
                )
                if of(run) != of(other)
            ]
            what = f", but of another {' and '.join(unlike)}" if unlike else ""
            left_out.append(f"{run.folder}: the same run as {other.folder}{what}; the later counts")
        else:
            seeds[run.seed] = run
    arms = [dict(sorted(seeds.items())) for seeds in grouped.values()]
    arms.sort(key=lambda seeds: _order(next(iter(seeds.values()))))
    labels = [_label(seeds, arms) for seeds in arms]
    for number, label in enumerate(labels):  # two values may look alike
        if label in labels[:number]:
            labels[number] = f"{label}, configuration {number + 1}"
    return [Arm(label, seeds) for label, seeds in zip(labels, arms, strict=True)], left_out


def _order(run: Run) -> tuple[Any, ...]:
    config = run.config
    full = run.record.config.adapter is None
    return (full, run.mode, config.get("rank") or 0, config["lr"], json.dumps(config))


def _label(seeds: dict[int, Run], arms: Sequence[dict[int, Run]]) -> str:
    """The mode's label, swept rate and rank, and what most other arms of the mode do not share."""
    own = next(iter(seeds.values()))
    peers = [run for other in arms if (run := next(iter(other.values()))).mode == own.mode]

    def tells(key: str) -> bool:
        alike = sum(peer.config.get(key) == own.config[key] for peer in peers)
        if key in ("lr", "rank"):
            return alike < len(peers)
        # All arms of a mode may leave prompts unmasked; then the other mode is what matters.
        return 2 * alike <= len(peers) or (key == "mask_prompt" and not own.config[key])

    keys = [key for key in own.config if tells(key)]
    parts = [
        own.record.config.label,
        *(_short(f"{key} {shown(own.config[key])}", LONGEST) for key in keys),
    ]
    return _short(", ".join(parts), LONGEST_LABEL)


def _short(text: str, longest: int) -> str:
    """What a plot has room for and can show."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
