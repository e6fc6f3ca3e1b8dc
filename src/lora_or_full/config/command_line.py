"""What a command line asks for, checked as a whole before anything starts."""

import functools
import itertools
import math
import os
import re
import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lora_or_full.config import compose, schema
from lora_or_full.config.near_misses import HABITS, nearest, unknown
from lora_or_full.config.schema import (
    FIELDS,
    GROUPS,
    PLUGINS,
    RESULT_NEUTRAL,
    Config,
    unused,
)
from lora_or_full.errors import UserError, first_line
from lora_or_full.processes import check_rendezvous, is_first_process

MOST = 40  # characters of a swept value in a run's name
MOST_JOBS = 1000  # of a sweep: more are a slip, and checking them would take minutes
OTHERS = {  # of a group with few presets
    "model": " Any other model: model.name=<hub id or folder> (model=llama for Llama types).",
    "data": " Other data: data.path=<hub id, folder, or .json, .jsonl, .csv, .parquet files>.",
}


@dataclass(frozen=True)
class CommandLine:
    """A checked command line."""

    jobs: list[Config]  # one if it is no sweep
    folder: Path | None  # of the sweep; None for a single run
    words: list[str]  # overrides to add to the command line for Hydra
    resumes: bool = False  # whether the job continues the run that its command line names


def check_options(unknown: Sequence[str], words: Sequence[str]) -> None:
    """Refuse options that do not exist; people write keys as options.

    Args:
        unknown: The options that Hydra does not have.
        words: The whole command line.

    Raises:
        UserError: With the word that works.
    """
    for option in unknown:
        key, _, value = option.partition("=")
        after = words[words.index(option) + 1 :] if option in words else []
        value = value or next((w for w in after[:1] if not w.startswith("-") and "=" not in w), "")
        near = _nearest(key.strip("-").replace("-", "_"))
        raise UserError(
            f"There is no option {key}. Keys have no dashes: {near or '<key>'}="
            f"{value or '<value>'}. Options: -m (--multirun), --help, --cfg job, --hydra-help."
        )


def prepare(args: Namespace) -> CommandLine:
    """Check the whole command line, every job of a sweep, as Hydra has parsed its arguments.

    Raises:
        UserError: With what is wrong.
    """
    own = [] if args.config_dir is None else [compose.search(args.config_dir)]
    if own and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir}: there is no such folder.")
    overrides = list(map(_parsed, [*args.overrides, *own]))
    preset = _swept_by_preset(args, overrides)
    overrides += OverridesParser.create().parse_overrides(preset)
    swept = [o for o in overrides if o.is_sweep_override()]
    if swept and not args.multirun:
        key, text = swept[0].get_key_element(), str(swept[0].input_line).partition("=")[2]
        raise UserError(
            f"{key} has several values: a sweep, which needs -m. A list is written {key}=[{text}], "
            f"a comma in a name {_quoted(key, text)}."
        )
    # As in Hydra, the last of two overrides of one key counts.
    values = {override.get_key_element(): _values(override) for override in overrides}
    if (number := math.prod(map(len, values.values()))) > MOST_JOBS:
        raise UserError(f"{number:,} jobs: a sweep has up to {MOST_JOBS:,}.")
    commands = list(itertools.product(*values.values()))
    jobs = _jobs(commands, overrides)
    first = jobs[0]
    words = [own for own, *_ in values.values()]
    _check_folders(first, words, overrides)
    if args.multirun:
        if first.resume is not None:
            raise UserError("resume continues one run: leave -m out.")
        if not is_first_process() or any(config.trainer.num_nodes > 1 for config in jobs):
            raise UserError(
                "-m: a sweep is started once, and each of its jobs runs on one machine. For a run "
                "on several machines see docs/slurm.sh; for jobs on several, hydra/launcher."
            )
        if first.study is None:
            folder = compose.hydra_path(words, "hydra.sweep.dir")
        else:
            folder = Path(first.output_dir, first.study)
        # The preset's own sweep is among the words now: Hydra is not to add it again.
        sweep_dir = compose.path_override("hydra.sweep.dir", folder)
        return CommandLine(
            _named(jobs, commands, swept),
            folder,
            ["hydra.sweeper.params=null", *preset, *own, sweep_dir],
        )
    if first.study is not None:
        raise UserError("study names the folder of a sweep, which needs -m.")
    check_rendezvous(first.trainer.num_nodes)
    if first.resume is None:
        return CommandLine(jobs, None, [])
    folder = Path(first.resume)
    resumed = _resumed(folder, overrides, first)
    return CommandLine([resumed], None, [compose.path_override("hydra.run.dir", folder)], True)


def usage(config_dir: str | None) -> str:
    """Help text: every key with its default and meaning, and the presets."""
    own = [] if config_dir is None else [compose.search(config_dir)]
    presets = [f"  {group}: {', '.join(compose.presets(group, own))}" for group in GROUPS]
    last = (
        "-m sweeps over values with commas; --cfg job shows the configuration; --config-dir "
        "<folder> adds presets of your own, <folder>/<group>/<name>.yaml; --hydra-help."
    )
    return "\n".join([
        "Keys, with their defaults:", *schema.explained(compose.compose()), "",
        "Presets, as group=name:", *presets, "", last,
    ])  # fmt: skip


def _jobs(commands: Iterable[Sequence[str]], overrides: list[Override]) -> list[Config]:
    """The checked configuration of each job."""
    composed = []
    for words in commands:
        try:
            composed.append(compose.compose(words))
        except UserError as error:
            raise _explained(str(error), words, overrides) from None
    used_by_none = set.intersection(*(set(unused(values)) for values in composed))
    for values in composed:  # what this mode has no use for is swept for others
        values |= dict.fromkeys(set(unused(values)) - used_by_none)
    return list(map(schema.validate, composed))


def _named(
    jobs: list[Config], commands: Sequence[Sequence[str]], swept: Sequence[Override]
) -> list[Config]:
    """The jobs, each named also by what the sweep varies and its mode's run_name does not tell."""
    rows: list[dict[str, str]] = [{} for _ in jobs]  # of each job: what is varied, and its value
    for config, words, row in zip(jobs, commands, rows, strict=True):
        values = schema.flat(config.to_dict(), FIELDS)
        typed = dict(word.lstrip("+").partition("=")[::2] for word in words)
        for override in swept:
            key, name = override.key_or_group, override.get_key_element().lstrip("+")
            if not key.startswith(("hydra.", "hydra/")) and key != "run_name":
                row[key] = schema.typed(values[key]) if key in values else typed[name]
    names = [config.run_name for config in jobs]
    untold = [key for key in rows[0] if not _is_told(key, rows, names)]
    short = Counter(key.rpartition(".")[2] for key in untold)
    named = []
    for config, row in zip(jobs, rows, strict=True):
        parts = [config.run_name]
        left_out = unused(config.to_dict())
        for key in untold:
            if key not in left_out:
                last = key.rpartition(".")[2]
                text = re.sub(r"[^\w.+]+", "-", row[key].replace(",", "+")).strip("-+")[-MOST:]
                gap = "" if text[:1].isdigit() else "-"  # as in lr0.001 and seed1
                parts.append(f"{last if short[last] == 1 else key}{gap}{text}")
        name = os.fsdecode(os.fsencode("_".join(parts))[:200])
        named.append(config.model_copy(update={"run_name": name}))
    return named


def _is_told(key: str, rows: Sequence[dict[str, str]], names: Sequence[str]) -> bool:
    """Whether jobs that differ in `key` alone have different names."""
    alike: dict[str, tuple[set[str], set[str]]] = {}
    for row, name in zip(rows, names, strict=True):
        values, told = alike.setdefault(str(row | {key: ""}), (set(), set()))
        values.add(row[key])
        told.add(name)
    return all(len(values) == len(told) for values, told in alike.values())


def _values(override: Override) -> list[str]:
    """Overrides with one value each, one per job of the sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key, sweep = override.get_key_element(), override.value()
    try:
        if isinstance(sweep, RangeSweep):  # counted before it is expanded: it may be endless
            length = abs((sweep.stop or 0) - (sweep.start or 0))
            if not length <= MOST_JOBS * abs(sweep.step):
                raise UserError(f"{override.input_line}: a sweep has up to {MOST_JOBS:,} jobs.")
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ArithmeticError, ValueError):
        raise UserError(
            f"{override.input_line}: no values that could be counted. Name them, with commas."
        ) from None


def _explained(problem: str, words: Sequence[str], overrides: list[Override]) -> UserError:
    """What is wrong with a command line that Hydra can't compose, in words better than Hydra's."""
    for override in overrides:
        key = override.key_or_group
        if key == "hydra/launcher" and key in problem:
            return UserError(
                f"{key}={override.value()}: there is no such launcher. pip install "
                "-c constraints.txt -e '.[joblib]' or '.[submitit]' brings one."
            )
        if key in GROUPS:
            valid = compose.presets(key, words)
            for value in itertools.chain(*_presets(override)):
                if value not in valid:
                    return UserError(
                        f"{key}={value}: must be {', '.join(valid)}.{OTHERS.get(key, '')}"
                    )
        elif key.startswith("adapter.") and "frozen_dtype" in _unused(words):
            return UserError(f"{key}: this mode has no adapter.")
        elif key.partition(".")[0] in PLUGINS and key not in {*FIELDS, *HABITS}:
            group, _, rest = key.partition(".")
            return UserError(
                f"{key}: {group} has no {rest}. {group}=<name> chooses another file "
                f"({', '.join(compose.presets(group, words))}); +{key}=<value> adds the key."
            )
        elif key not in FIELDS and not key.startswith(("hydra.", "hydra/", "model.config.")):
            return unknown(key, schema.VALID, near=_nearest(key))
    return UserError(problem)


def _parsed(word: str) -> Override:
    """A word of the command line as Hydra reads it.

    Raises:
        UserError: It is none of Hydra's words, with what is.
    """
    key, given, value = word.partition("=")
    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError) as error:  # ValueError: a number of too many digits
        if not given:
            near = _nearest(word)
            guess = f" Did you mean {near}?" if near else ""
            raise UserError(f"{word}: each word is key=value.{guess}") from None
        # Brackets and quotes are meant for Hydra, whose words are about them.
        if isinstance(error, HydraException) and value and value[0] not in "[{'\"":
            raise UserError(f"{word} can't be read. Quote it: {_quoted(key, value)}") from None
        raise UserError(first_line(error)) from None
    if override.key_or_group == "hydra/sweeper" and override.value() != "basic":
        raise UserError(
            f"{word}: a sweep here runs all values that are named, such as -m lr=1e-4,1e-3 rank=4,8"
            "; no other sweeper is supported."
        )
    return override


def _quoted(key: str, value: str) -> str:
    """A value as the shell and Hydra both take it for a text."""
    word = compose.path_override(key, Path(value))
    return shlex.quote(word) if re.search(r'["$`\\!]', word) else f'"{word}"'


def _nearest(key: str) -> str:
    """What a word that is no key most probably stands for; empty if nothing is near."""
    presets = [f"{group}={key}" for group in GROUPS if key in compose.presets(group)]
    return " or ".join(presets) or nearest(key, schema.VALID)


def _unused(words: Sequence[str]) -> list[str]:
    """What the mode among `words` has no use for; an unknown one may use everything."""
    try:
        given = [w for w in words if w.startswith(("mode=", f"{compose.SEARCHPATH}="))]
        return unused(compose.compose(given))
    except UserError:
        return []


def _swept_by_preset(args: Namespace, overrides: list[Override]) -> list[str]:
    """Overrides for what the requested experiments sweep over, unless others are given."""
    given = {o.get_key_element(): o for o in overrides}
    if "experiment" not in given or "hydra.sweeper.params" in given:  # the latter: a job of a sweep
        return []
    experiment, mode = given["experiment"], given.get("mode")
    choices, search = _presets(experiment), given.get(compose.SEARCHPATH)
    folders = [] if search is None else [str(search.input_line)]
    files = compose.presets("experiment", folders)
    swept: dict[str, Any] = {}
    for preset in itertools.chain(*choices):
        if (path := files.get(preset)) is None:
            return []  # Hydra refuses it
        file = OmegaConf.load(path)
        own = OmegaConf.select(file, "hydra.sweeper.params") or {}
        if own and len(choices) > 1:
            raise UserError(
                f"{experiment.input_line}: experiment={preset} is a sweep itself; start it alone."
            )
        swept |= own
    if mode and not mode.is_sweep_override():
        left_out = _unused([str(mode.input_line), *folders])
        swept = {key: value for key, value in swept.items() if key not in left_out}
    words = [f"{key}={value}" for key, value in swept.items() if key not in given]
    if words and not args.multirun:
        raise UserError(f"{experiment.input_line} is a sweep, which needs -m.")
    return words


def _presets(override: Override) -> list[list[str]]:
    """The files of conf/ that an override of a group names, for each job of a sweep over it."""
    parser = OverridesParser.create()
    values = [parser.parse_override(words).value() for words in _values(override)]
    return [[*map(str, v)] if isinstance(v, list) else [str(v)] for v in values]


def _resumed(folder: Path, overrides: list[Override], wanted: Config) -> Config:
    """The configuration of the run in `folder`, with those of the requested keys that may change.

    Raises:
        UserError: There is no run, or another result is requested.
    """
    if not os.path.isfile(folder / "config.yaml"):
        raise UserError(f"resume={folder}: there is no run (no config.yaml in it).")
    config = compose.saved(folder)
    _check_writable("resume", folder)
    own, plain, new = (
        schema.flat(one.to_dict(), FIELDS) for one in (config, compose.defaults(), wanted)
    )
    named = [override.key_or_group for override in overrides]
    changed = {
        key: value
        for key, value in new.items()
        if key in FIELDS
        and key not in ("resume", "run_name")
        and (value != plain.get(key) or any(key == n or key.startswith(f"{n}.") for n in named))
        and value != own.get(key)
        and (key, value) != ("trainer.precision", "auto")  # the run has what auto was for it
    }
    if differ := changed.keys() - RESULT_NEUTRAL:
        lines = "".join(
            f"\n  {key}: the run has {has}, requested is {requested}"
            for key, value in changed.items()
            if key in differ
            for has, requested in [(schema.typed(own.get(key)), schema.typed(value))]
        )
        more = (
            "\nThe learning rate falls to zero over the epochs that a run began with. More epochs "
            f"are a new run, from the weights of this one once it is finished:\n"
            f"{more_training(folder)}"
        )
        raise UserError(
            f"resume={folder} has another configuration:{lines}\nLeave these out."
            f"{more if 'trainer.max_epochs' in differ else ''}"
        )
    values = config.to_dict()
    for key, value in changed.items():
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, values)[name] = value
    config = schema.validate(values)
    _check_writable("cache_dir", Path(config.cache_dir))
    check_rendezvous(config.trainer.num_nodes)
    return config


def more_training(folder: Path) -> str:
    """The command that trains the weights of a finished run further, as a run of its own."""
    start = compose.path_override("init_from", folder)
    return f"python src/run.py <the words of that run> {start} trainer.max_epochs=<n>"


def _check_folders(config: Config, words: list[str], overrides: list[Override]) -> None:
    """Check that what a job writes to can be written."""
    _check_writable("output_dir", Path(config.output_dir))
    _check_writable("cache_dir", Path(config.cache_dir))
    for override in overrides:
        key, value = override.key_or_group, str(override.value())
        if key in ("hydra.run.dir", "hydra.sweep.dir"):
            if not value:
                raise UserError(f"{key}=: must name a folder.")
            if "${" in value:  # Hydra alone knows the keys that it refers to
                compose.hydra_path(words, key)
            else:
                _check_writable(key, Path(value))


def _check_writable(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))  # which a full disk refuses, where it takes an empty file
    except OSError as error:
        raise UserError(f"{key}={folder} can't be written: {error.strerror}.") from None
