"""Reads the runs of a study from their folders, and groups them into comparable arms."""

import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_or_full.errors import UserError
from lora_or_full.report.study import Arm, Evaluation, Run, Study, Untrained, shown
from lora_or_full.runs import store
from lora_or_full.runs.reader import check_scores, read_answers, read_record
from lora_or_full.runs.schema import EvaluationRecord, RunRecord

# Characters of a value in a label, and of a label.
LONGEST, LONGEST_LABEL = 60, 100
# What a report needs of a run.
READ = (store.RESULTS, "predictions.jsonl", "contexts.json")


def collect(folders: Sequence[Path]) -> Study:
    """Collect the runs in some folders (of runs, of sweeps, or that hold them) into a study."""
    found: dict[Path, None] = {}
    for top in folders:
        files = [file for name in ("config.yaml", "status.json") for file in top.rglob(name)]
        found |= dict.fromkeys(sorted(file.parent for file in files))
    runs, left_out = [], _never_started(folders)
    for folder in found:
        try:
            runs.append(_read(folder))
        except UserError as error:
            # The line begins with the folder.
            left_out.append(f"{folder}: {str(error).replace(f'{folder}{os.sep}', '')}")
    runs, unlike = _alike(runs)
    arms, twice = _arms(runs)
    untrained, of_others = _untrained(folders, found, arms)
    return Study(arms, left_out + unlike + twice + of_others, untrained)


def _never_started(folders: Iterable[Path]) -> list[str]:
    """The runs that a sweep planned, but that have no folder."""
    missing = []
    for file in sorted({file for top in folders for file in top.rglob(store.PLAN)}):
        try:
            names = json.loads(file.read_text(encoding="utf-8"))["runs"]
            if not isinstance(names, list):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            missing.append(f"{file}: it can't be read ({type(error).__name__})")
            continue
        planned = Counter(map(str, names))
        # A number after its name tells a run from one of the same name.
        found = Counter(
            name if name in planned else re.sub(r"-\d+$", "", name)
            for name in (status.parent.name for status in file.parent.glob("*/status.json"))
        )
        missing += [
            f"{file.parent / name}: it was planned, but never started"
            for name in (planned - found).elements()
        ]
    return missing


def _read(folder: Path) -> Run:
    """The run in a folder; a UserError says why it can't be used."""
    status = store.status(folder)
    if not (folder / store.RESULTS).is_file():
        if status.get("state") == "failed":
            raise UserError(f"failed ({status.get('error', 'no reason is recorded')})")
        raise UserError(f"not finished (status: {status.get('state', 'none')})")
    try:
        damaged = store.damaged_files(folder, READ)
    except OSError as error:
        raise UserError(f"its files can't be read ({type(error).__name__}: {error})") from None
    if damaged:
        raise UserError(f"damaged: {', '.join(damaged)} (resume={folder} repeats the run)")
    run = Run(folder, read_record(folder, RunRecord), *read_answers(folder))
    check_scores(folder, run.record, run.predictions)
    return run


def _untrained(
    tops: Iterable[Path], runs: Container[Path], arms: Sequence[Arm]
) -> tuple[list[Untrained], list[str]]:
    """Models that were scored without training on the arms' test questions; why others are not."""
    grouped: dict[str, dict[int | None, Evaluation]] = {}
    left_out = []
    files = {file for top in tops for file in top.rglob(store.RESULTS)} if arms else set()
    for folder in sorted(file.parent for file in files):
        if folder in runs or folder.parents[1] in runs:  # a run, or one on another test set
            continue
        try:
            record = read_record(folder, EvaluationRecord)
            predictions, _ = read_answers(folder)
            check_scores(folder, record, predictions)
        except UserError as error:
            left_out.append(f"{folder}: {str(error).replace(f'{folder}{os.sep}', '')}")
            continue
        own = arms[0].any.record
        test, wanted = record.data.test.fingerprint, own.data.test.fingerprint
        if record.model is None or test != wanted or record.scoring != own.config.scoring:
            left_out.append(
                f"{folder}: test questions {test}, scoring {record.scoring}, not {wanted} and "
                f"{own.config.scoring} as the runs shown"
            )
            continue
        shots = f"{record.shots}-shot" if record.shots else "zero-shot"
        label = _short(f"{Path(record.model.name).name}, {shots}", LONGEST_LABEL)
        if any(one.record.model != record.model for one in grouped.get(label, {}).values()):
            label = f"{label}, weights {record.model.fingerprint}"
        seed = record.seed if record.shots else None
        grouped.setdefault(label, {})[seed] = Evaluation(record, predictions)
    return [Untrained(label, list(own.values())) for label, own in grouped.items()], left_out


def _alike(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The largest set of runs that can be compared, and why others are left out."""
    sets = Counter(tuple(run.comparable.items()) for run in runs)
    common, count = next(iter(sets.most_common(1)), ((), 0))
    wanted = dict(common)
    kept, left_out = [], []
    for run in runs:
        unlike = [
            f"{name} {value}, not {wanted[name]}"
            for name, value in run.comparable.items()
            if value != wanted[name]
        ]
        if unlike:
            left_out.append(f"{run.folder}: {'; '.join(unlike)} as the {count} runs shown")
        else:
            kept.append(run)
    return kept, left_out


def _arms(runs: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    """Runs by configuration; of two with the same seed, the one that finished last counts."""
    grouped: dict[tuple[str, str], dict[int, Run]] = {}
    left_out = []
    by_precision = _compared_by_precision(runs)
    for run in sorted(runs, key=lambda r: -(r.folder / store.RESULTS).stat().st_mtime):
        precision = run.precision if run.recipe in by_precision else ""
        seeds = grouped.setdefault((run.recipe, precision), {})
        later = seeds.setdefault(run.record.config.seed, run)
        if later is not run:
            unlike = [k for k, value in _origin(run).items() if value != _origin(later)[k]]
            what = f", but of another {' and '.join(unlike)}" if unlike else ""
            left_out.append(f"{run.folder}: the same run as {later.folder}{what}; the later counts")
    unlabelled = (Arm("", dict(sorted(seeds.items()))) for seeds in grouped.values())
    arms = sorted(unlabelled, key=_order)
    labelled: dict[str, Arm] = {}
    for number, arm in enumerate(arms, 1):
        label = _label(arm, arms)
        if label in labelled:  # two values may look alike
            label = f"{label}, configuration {number}"
        labelled[label] = Arm(label, arm.runs)
    return list(labelled.values()), left_out


def _compared_by_precision(runs: Iterable[Run]) -> set[str]:
    """The recipes whose precisions are compared, as one seed was run in several of them.

    Else runs that differ in precision make one arm, since `auto` chooses it by hardware.
    """
    found: dict[tuple[str, int], set[str]] = {}
    for run in runs:
        found.setdefault((run.recipe, run.record.config.seed), set()).add(run.precision)
    return {recipe for (recipe, _), precisions in found.items() if len(precisions) > 1}


def _origin(run: Run) -> dict[str, str | None]:
    record = run.record
    return {
        "commit": record.environment.commit, "training questions": record.data.train.fingerprint
    }  # fmt: skip


def _order(arm: Arm) -> tuple[Any, ...]:
    config = arm.config
    return not arm.has_adapter, arm.mode, config.get("rank", 0), config["lr"], json.dumps(config)


def _label(arm: Arm, arms: Sequence[Arm]) -> str:
    """The mode's label, swept rate and rank, and what most other arms of the mode do not share."""
    config = arm.config
    peers = [other.config for other in arms if other.mode == arm.mode]

    def tells(key: str) -> bool:
        alike = sum(peer.get(key) == config[key] for peer in peers)
        if key in ("lr", "rank"):
            return alike < len(peers)
        # All arms of a mode may leave prompts unmasked; then the other mode is what matters.
        return 2 * alike <= len(peers) or (key == "mask_prompt" and not config[key])

    differ = [_short(f"{key} {shown(config[key])}", LONGEST) for key in config if tells(key)]
    return _short(", ".join([arm.any.record.config.label, *differ]), LONGEST_LABEL)


def _short(text: str, longest: int) -> str:
    """What a plot has room for and can show."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
