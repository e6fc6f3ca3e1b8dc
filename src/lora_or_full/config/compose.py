"""What a command line asks for, checked as a whole before anything starts.

Hydra composes the words of the command line and the files in conf/ into the configuration of each
job; schema.py checks it.
"""

import itertools
import math
import os
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_or_full.config.schema import (
    ADAPTER_KEYS,
    FIELDS,
    GROUPS,
    Config,
    explained,
    flat,
    unknown,
    validate,
)
from lora_or_full.errors import UserError, first_line
from lora_or_full.processes import check_rendezvous, is_first_process

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parents[1]
# A wheel has the files of conf/ inside the package.
CONF = next(path for path in (PACKAGE / "conf", PROJECT / "conf") if path.is_dir())
MOST_JOBS = 1000  # of a sweep: more are a slip, and checking them would take minutes

OmegaConf.register_new_resolver("project_dir", lambda: str(PROJECT), replace=True)


@dataclass(frozen=True)
class CommandLine:
    """A checked command line.

    Attributes:
        jobs: Configuration of each job; one if it is no sweep.
        folder: Folder of the sweep; None for a single run.
        words: Overrides to add to the command line for Hydra.
    """

    jobs: list[Config]
    folder: Path | None
    words: list[str]


def prepare(args: Namespace) -> CommandLine:
    """Check the whole command line, every job of a sweep.

    Args:
        args: Hydra's own parsed arguments.

    Raises:
        UserError: With what is wrong.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(args.overrides)
    except (HydraException, ValueError) as error:  # ValueError: a number of too many digits
        raise UserError(first_line(error)) from None
    preset = _swept_by_preset(args, overrides)
    overrides += OverridesParser.create().parse_overrides(preset)
    swept = [o.get_key_element() for o in overrides if o.is_sweep_override()]
    if swept and not args.multirun:
        raise UserError(f"{swept[0]} has several values: a sweep, which needs -m.")
    # As in Hydra, the last of two overrides of one key counts.
    values = {override.get_key_element(): _values(override) for override in overrides}
    if (number := math.prod(map(len, values.values()))) > MOST_JOBS:
        raise UserError(f"{number:,} jobs: a sweep has up to {MOST_JOBS:,}.")
    composed = [compose(list(words), overrides) for words in itertools.product(*values.values())]
    without = [values.get("adapter") is None for values in composed]
    if any(without) and not all(without):  # the adapter's keys are swept for the other modes
        composed = [
            values | dict.fromkeys(ADAPTER_KEYS) if plain else values
            for values, plain in zip(composed, without, strict=True)
        ]
    jobs = list(map(validate, composed))
    first = jobs[0]
    for key, path in (("output_dir", first.output_dir), ("cache_dir", first.cache_dir)):
        _check_writable(key, Path(path))
    words = [own for own, *_ in values.values()]
    for override in overrides:
        value = str(override.value())
        if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir"):
            if not value:
                raise UserError(f"{override.key_or_group}=: must name a folder.")
            if "${" in value:  # Hydra alone knows the keys that it refers to
                _hydra_path(words, override.key_or_group)
            else:
                _check_writable(override.key_or_group, Path(value))
    if args.multirun:
        if first.resume is not None:
            raise UserError("resume continues one run: leave -m out.")
        if not is_first_process() or any(config.trainer.num_nodes > 1 for config in jobs):
            raise UserError(
                "-m: a sweep is started once, and each of its jobs runs on one machine. For a run "
                "on several machines see docs/slurm.sh; for jobs on several, hydra/launcher."
            )
        folder = (
            _hydra_path(words, "hydra.sweep.dir")
            if first.study is None
            else Path(first.output_dir, first.study)
        )
        # The preset's own sweep is among the words now: Hydra is not to add it again.
        added = ["hydra.sweeper.params=null", *preset, path_override("hydra.sweep.dir", folder)]
        return CommandLine(jobs, folder, added)
    if first.study is not None:
        raise UserError("study names the folder of a sweep, which needs -m.")
    check_rendezvous(first.trainer.num_nodes)
    if first.resume is None:
        return CommandLine(jobs, None, [])
    return CommandLine(jobs, None, _resume(Path(first.resume), overrides, first))


def _values(override: Override) -> list[str]:
    """Overrides with one value each, one per job of the sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key, sweep = override.get_key_element(), override.value()
    try:
        # Counted before it is expanded: a range may be endless.
        if isinstance(sweep, RangeSweep):
            assert sweep.start is not None
            assert sweep.stop is not None
            if not abs(sweep.stop - sweep.start) <= MOST_JOBS * abs(sweep.step):
                raise UserError(f"{override.input_line}: a sweep has up to {MOST_JOBS:,} jobs.")
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ArithmeticError, ValueError):
        raise UserError(
            f"{override.input_line}: no values that could be counted. Name them, with commas."
        ) from None


def compose(words: list[str], overrides: list[Override]) -> dict[str, Any]:
    """Compose a configuration.

    Args:
        words: Overrides as they are typed.
        overrides: The same, parsed.

    Returns:
        Nested values with every reference resolved, not yet checked.

    Raises:
        UserError: Hydra can't compose them.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return to_dict(hydra.compose("config", words))
        # ValueError of mode=null, AssertionError of +=1
        except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
            problem = str(error)
    for override in overrides:
        key = override.key_or_group
        if key == "hydra/launcher" and key in problem:
            raise UserError(
                f"{key}={override.value()}: there is no such launcher. pip install "
                "-c constraints.txt -e '.[joblib]' or '.[submitit]' brings one."
            )
        if key in GROUPS:
            given = itertools.chain(*_presets(override))
            if wrong := [value for value in given if value not in _options(key)]:
                raise _no_option(key, wrong[0], _options(key))
        elif key.startswith("adapter.") and not _has_adapter(words):
            raise UserError(f"{key}: this mode has no adapter.")
        elif key not in FIELDS and not key.startswith(("hydra.", "hydra/", "model.config.")):
            raise unknown(key)
    raise UserError(problem)


def defaults() -> Config:
    """The configuration of `python src/run.py` without any override."""
    return validate(compose([], []))


def _has_adapter(words: list[str]) -> bool:
    modes = [word.partition("=")[2] for word in words if word.startswith("mode=")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", [f"mode={mode}" for mode in modes]).adapter is not None


def _hydra_path(words: list[str], key: str) -> Path:
    """The folder that one of Hydra's own keys names."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", words, return_hydra_config=True)
        try:
            return Path(OmegaConf.select(config, key, throw_on_missing=True))
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: {first_line(error)}.") from None


def _swept_by_preset(args: Namespace, overrides: list[Override]) -> list[str]:
    """Overrides for what the requested experiments sweep over, unless others are given.

    Raises:
        UserError: It is a sweep but -m is missing, or the experiments are swept over too.
    """
    given = {o.get_key_element(): o for o in overrides}
    if "experiment" not in given or "hydra.sweeper.params" in given:  # the latter: a job of a sweep
        return []
    experiment = given["experiment"]
    choices = _presets(experiment)
    swept: dict[str, Any] = {}
    for preset in itertools.chain(*choices):
        if preset not in _options("experiment"):
            return []  # Hydra refuses it
        file = OmegaConf.load(CONF / "experiment" / f"{preset}.yaml")
        own = OmegaConf.select(file, "hydra.sweeper.params") or {}
        if own and len(choices) > 1:
            raise UserError(
                f"{experiment.input_line}: experiment={preset} is a sweep itself; start it alone."
            )
        swept |= own
    chosen = [str(given["mode"].input_line)] if "mode" in given else []
    single = not any(given[o].is_sweep_override() for o in ("mode",) if o in given)
    none = ADAPTER_KEYS if chosen and single and not _has_adapter(chosen) else ()
    words = [f"{k}={value}" for k, value in swept.items() if k not in given and k not in none]
    if words and not args.multirun:
        raise UserError(f"{experiment.input_line} is a sweep, which needs -m.")
    return words


def _presets(override: Override) -> list[list[str]]:
    """The files of conf/ that an override of a group names, for each job of a sweep over it."""
    parser = OverridesParser.create()
    values = [parser.parse_override(words).value() for words in _values(override)]
    return [[*map(str, v)] if isinstance(v, list) else [str(v)] for v in values]


def _no_option(group: str, value: Any, options: list[str]) -> UserError:
    more = {
        "model": " Any other model: model.name=<hub id or folder> (model=llama for Llama types).",
        "data": " Other data: data.path=<hub id, folder, or .json / .parquet files>.",
    }
    return UserError(f"{group}={value}: must be {', '.join(options)}.{more.get(group, '')}")


def _resume(folder: Path, overrides: list[Override], wanted: Config) -> list[str]:
    """Check that the run in `folder` can continue, with no other configuration than its own."""
    if not os.path.isfile(folder / "config.yaml"):
        raise UserError(f"resume={folder}: there is no run (no config.yaml in it).")
    config = saved(folder)
    _check_writable("resume", folder)
    check_rendezvous(config.trainer.num_nodes)
    own, plain, new = (flat(one.to_dict(), FIELDS) for one in (config, defaults(), wanted))
    named = [override.key_or_group for override in overrides]
    differ = [
        f"  {key}: the run has {own.get(key)}, requested is {value}"
        for key, value in new.items()
        if key in FIELDS
        and key not in ("resume", "run_name")
        and (value != plain.get(key) or any(key == n or key.startswith(f"{n}.") for n in named))
        and value != own.get(key)
        and (key, value) != ("trainer.precision", "auto")  # the run has what auto was for it
    ]
    if differ:
        lines = "\n".join(differ)
        raise UserError(f"resume={folder} has another configuration:\n{lines}\nLeave these out.")
    return [path_override("hydra.run.dir", folder)]


def path_override(key: str, path: Path) -> str:
    """A path on Hydra's command line, whatever characters it has."""
    text = re.sub(r"(\\*)('|$)", r"\1\1\2", str(path)).replace("'", "\\'")
    return f"{key}='{text}'"


def saved(folder: Path) -> Config:
    """Read the configuration of the run in `folder`.

    Raises:
        UserError: config.yaml can't be read or is not as a run writes it.
    """
    file = folder / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no configuration.")
    try:
        return validate({str(key): value for key, value in content.items()})
    except (UserError, ValueError) as error:  # ValueError: a number of too many digits
        raise UserError(f"{file} is not as a run writes it: {error}") from None


def _check_writable(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))  # which a full disk refuses, where it takes an empty file
    except OSError as error:
        raise UserError(f"{key}={folder} can't be written: {error.strerror}.") from None


def to_dict(config: DictConfig) -> dict[str, Any]:
    """Plain nested values with every reference resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def usage() -> str:
    """Help text: every key with its default and meaning, and the presets."""
    keys = [
        f"  {key}={default}\n        {meaning}"
        for key, default, meaning in explained(compose([], []))
    ]
    presets = [f"  {group}: {', '.join(_options(group))}" for group in GROUPS]
    last = "-m sweeps over values with commas; --cfg job shows the configuration; --hydra-help."
    return "\n".join(
        ["Keys, with their defaults:", *keys, "", "Presets, as group=name:", *presets, "", last]
    )


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))
