"""The runs of a study read from their folders, and put into arms that can be compared."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_or_full.report.study import Arm, Run, Study, shown
from lora_or_full.runs import store
from lora_or_full.runs.schema import lacking, odd

LONGEST = 60  # characters of a value in a label
LONGEST_LABEL = 100
# What a report needs of a run.
READ = (store.RESULTS, "predictions.jsonl", "contexts.json")


def collect(places: Sequence[Path]) -> Study:
    """The study that the run folders in `places` (runs, sweeps, or folders of them) make."""
    runs, left_out = [], _never_begun(places)
    for folder in dict.fromkeys(_folders(places)):
        found = _read(folder)
        if isinstance(found, Run):
            runs.append(found)
        else:
            left_out.append(f"{folder}: {found}")
    runs, unlike = _alike(runs)
    arms, twice = _arms(runs)
    return Study(arms, left_out + unlike + twice)


def _folders(places: Iterable[Path]) -> list[Path]:
    return [
        folder
        for place in places
        for folder in sorted(
            {file.parent for name in ("config.yaml", "status.json") for file in place.rglob(name)}
        )
    ]


def _never_begun(places: Iterable[Path]) -> list[str]:
    """The runs that a sweep was to make, and of which there is no folder."""
    missing = []
    for file in sorted({file for place in places for file in place.rglob(store.PLAN)}):
        try:
            names = json.loads(file.read_text(encoding="utf-8"))["runs"]
            if not isinstance(names, list):
                raise TypeError
            planned = Counter(map(str, names))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            missing.append(f"{file}: it can't be read ({type(error).__name__})")
            continue
        folders = [status.parent.name for status in file.parent.glob("*/status.json")]
        # A number behind its name tells a run from one of the same name.
        there = Counter(name if name in planned else re.sub(r"-\d+$", "", name) for name in folders)
        missing += [
            f"{file.parent / name}: it was planned, but never began"
            for name, count in (planned - there).items()
            for _ in range(count)
        ]
    return missing


def _read(folder: Path) -> Run | str:
    """The run in a folder, or why it is none that can be used."""
    state = store.status(folder)
    if not (folder / "results.json").is_file():
        if state.get("state") == "failed":
            return f"failed ({_said(state, 'error', 'it does not say why')})"
        return f"not finished (status: {_said(state, 'state', 'none')})"
    try:
        if changed := store.damaged_files(folder, READ):
            return f"damaged: {', '.join(changed)} (resume={folder} makes it anew)"
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        # Not splitlines, which also splits at characters that a text may hold.
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        predictions = sorted((json.loads(line) for line in lines if line), key=lambda p: p["id"])
        contexts = json.loads((folder / "contexts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"its files can't be read ({type(error).__name__}: {error})"
    problem = lacking(results) or odd(predictions, contexts)
    if problem:
        return problem
    run = Run(folder, results, predictions, contexts)
    for metric in ("exact_match", "f1"):
        # The record and the answers were written together: unlike means are a broken file.
        if not abs(run.scores(metric).mean() - results["test"][metric]) <= 1e-6:
            return f"predictions.jsonl does not give the {metric} of results.json"
    return run


def _said(state: dict[str, Any], key: str, otherwise: str) -> str:
    value = state.get(key)
    return value if isinstance(value, str) else otherwise


def _alike(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The largest set of runs that can be compared, and why the others are left out."""
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
    """The runs by configuration; of two with the same seed, the one that finished last counts."""
    grouped: dict[str, dict[int, Run]] = {}
    left_out = []
    for run in sorted(runs, key=lambda r: -(r.folder / "results.json").stat().st_mtime):
        seeds = grouped.setdefault(json.dumps(run.config, sort_keys=True), {})
        if run.seed in seeds:
            other = seeds[run.seed]
            unlike = [
                name
                for name, of in (
                    ("commit", lambda r: r.results["environment"]["commit"]),
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
    return (run.mode != "lora", config.get("rank") or 0, config["lr"], json.dumps(config))


def _label(seeds: dict[int, Run], arms: Sequence[dict[int, Run]]) -> str:
    """The mode, the swept rate and rank, and what most others of the mode do not share."""
    own = next(iter(seeds.values()))
    peers = [run for other in arms if (run := next(iter(other.values()))).mode == own.mode]

    def tells(key: str) -> bool:
        alike = sum(peer.config.get(key) == own.config[key] for peer in peers)
        if key in ("lr", "rank"):
            return alike < len(peers)
        # All of a mode may leave prompts unmasked; then the other mode is what tells.
        return 2 * alike <= len(peers) or (key == "mask_prompt" and not own.config[key])

    keys = [key for key in own.config if tells(key)]
    name = {"lora": "LoRA", "full": "full"}[own.mode]
    parts = [name, *(_short(f"{key} {shown(own.config[key])}", LONGEST) for key in keys)]
    return _short(", ".join(parts), LONGEST_LABEL)


def _short(text: str, longest: int) -> str:
    """What a plot has room for and can show."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
