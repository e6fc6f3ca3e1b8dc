"""What a command line asks for, checked as a whole before anything starts.

Its words and the files in conf/ make the settings of each job, by Hydra.
"""

import itertools
import math
import os
from argparse import Namespace
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

from lora_or_full.config.schema import GROUPS, OF_LORA, SETTINGS, check, explained, flat, unknown
from lora_or_full.errors import UserError, first_line
from lora_or_full.runs import provenance, store
from lora_or_full.training.distributed import check_meeting, is_first
from lora_or_full.training.sweep import Sweep, word

PROJECT = provenance.PROJECT
CONF = str(PROJECT / "conf")
MOST_JOBS = 1000  # of a sweep: more are a slip, and checking them would take minutes

OmegaConf.register_new_resolver("project_dir", lambda: str(PROJECT), replace=True)


def prepare(args: Namespace) -> tuple[list[str], Sweep | None]:
    """Check the whole command line, every job of a sweep; what to add to it for Hydra, and the
    sweep if it is one.

    Raises:
        UserError: with what is wrong.
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
    # as in Hydra, of two words for one key the last counts
    values = {override.get_key_element(): _values(override) for override in overrides}
    if (number := math.prod(map(len, values.values()))) > MOST_JOBS:
        raise UserError(f"{number:,} jobs: a sweep has up to {MOST_JOBS:,}.")
    jobs = [compose(list(words), overrides) for words in itertools.product(*values.values())]
    both = len({settings.get("mode") == "full" for settings in jobs}) > 1
    for settings in jobs:
        if both and settings.get("mode") == "full":  # these are swept for the other mode
            settings |= dict.fromkeys(OF_LORA)
        check(settings)
    for key in ("output_dir", "cache_dir"):
        _check_writable(key, Path(jobs[0][key]))
    first = [own for own, *_ in values.values()]
    for override in overrides:
        value = str(override.value())
        if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir"):
            if not value:
                raise UserError(f"{override.key_or_group}=: must name a folder.")
            if "${" in value:  # what refers to other keys is known to Hydra alone
                _place(first, override.key_or_group)
            else:
                _check_writable(override.key_or_group, Path(value))
    if args.multirun:
        if jobs[0]["resume"] is not None:
            raise UserError("resume goes on with one run: leave -m out.")
        if not is_first() or any(settings["trainer"]["num_nodes"] > 1 for settings in jobs):
            raise UserError(
                "-m: a sweep is started once, and each of its jobs runs on one machine. For a run "
                "on several machines see docs/slurm.sh; for jobs on several, hydra/launcher."
            )
        if jobs[0]["study"] is None:
            place = _place(first, "hydra.sweep.dir")
        else:
            place = Path(jobs[0]["output_dir"], str(jobs[0]["study"]))
        # What the preset sweeps is among the words now: Hydra is not to add it again.
        words = ["hydra.sweeper.params=null", *preset, word("hydra.sweep.dir", place)]
        return words, Sweep(jobs, place)
    if jobs[0]["study"] is not None:
        raise UserError("study names the folder of a sweep, which needs -m.")
    check_meeting(jobs[0]["trainer"]["num_nodes"])
    if jobs[0]["resume"] is None:
        return [], None
    return _resume(Path(jobs[0]["resume"]), overrides, jobs[0]), None


def _values(override: Override) -> list[str]:
    """The words that an override stands for, one for each job of a sweep over it."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key, sweep = override.get_key_element(), override.value()
    try:
        # Before it is taken apart, which a range of millions or without an end would not survive.
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
    """The settings that command line `words` give; `overrides` are the same, parsed."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
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
        elif key.startswith("lora.") and "mode=full" in words:
            raise UserError(f"{key}: mode=full has no LoRA; it belongs to mode=lora.")
        elif key not in SETTINGS and not key.startswith(("hydra.", "hydra/", "model.config.")):
            raise unknown(key)
    raise UserError(problem)


def _place(words: list[str], key: str) -> Path:
    """The folder that one of Hydra's own keys names."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        config = hydra.compose("config", words, return_hydra_config=True)
        try:
            return Path(OmegaConf.select(config, key, throw_on_missing=True))
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: {first_line(error)}.") from None


def _swept_by_preset(args: Namespace, overrides: list[Override]) -> list[str]:
    """The words for what the experiments that are asked for sweep over, where no others are given.

    Raises:
        UserError: it is a sweep, and -m is missing, or another sweep is over the experiments.
    """
    given = {o.get_key_element(): o for o in overrides}
    if "experiment" not in given or "hydra.sweeper.params" in given:  # the latter: a job of a sweep
        return []
    experiment = given["experiment"]
    choices = _presets(experiment)
    swept: dict[str, Any] = {}
    for preset in itertools.chain(*choices):
        if preset not in _options("experiment"):
            return []  # which Hydra refuses
        file = OmegaConf.load(Path(CONF, "experiment", f"{preset}.yaml"))
        own = OmegaConf.select(file, "hydra.sweeper.params") or {}
        if own and len(choices) > 1:
            raise UserError(
                f"{experiment.input_line}: experiment={preset} is a sweep itself; start it alone."
            )
        swept |= own
    none = OF_LORA if "mode" in given and str(given["mode"].value()) == "full" else ()
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


def _resume(folder: Path, overrides: list[Override], asked: dict[str, Any]) -> list[str]:
    """Check that the run in `folder` can go on, and that what is asked for besides is the same."""
    if not os.path.isfile(folder / "config.yaml"):
        raise UserError(f"resume={folder}: there is no run (no config.yaml in it).")
    before = flat(saved(folder), SETTINGS)
    if store.is_finished(folder):
        raise UserError(f"resume={folder}: that run is finished; see its results.json.")
    _check_writable("resume", folder)
    check_meeting(before["trainer.num_nodes"])
    plain, new = flat(compose([], []), SETTINGS), flat(asked, SETTINGS)
    named = [override.key_or_group for override in overrides]
    differ = [
        f"  {key}: the run has {before.get(key)}, asked for is {value}"
        for key, value in new.items()
        if key in SETTINGS
        and key not in ("resume", "run_name")
        and (value != plain.get(key) or any(key == n or key.startswith(f"{n}.") for n in named))
        and value != before.get(key)
        and (key, value) != ("trainer.precision", "auto")  # the run has what auto was for it
    ]
    if differ:
        lines = "\n".join(differ)
        raise UserError(f"resume={folder} is of another configuration:\n{lines}\nLeave these out.")
    return [word("hydra.run.dir", folder)]


def saved(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`."""
    file = folder / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no configuration.")
    settings = {str(key): value for key, value in content.items()}
    try:
        check(settings)
    except (UserError, ValueError) as error:  # ValueError: a number of too many digits
        raise UserError(f"{file} is not as a run writes it: {error}") from None
    return settings


def _check_writable(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))  # which a full disk refuses, where it takes an empty file
    except OSError as error:
        raise UserError(f"{key}={folder} can't be written: {error.strerror}.") from None


def to_dict(config: DictConfig) -> dict[str, Any]:
    """Plain containers with every reference resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def usage() -> str:
    """Every key with its default and meaning, and the presets."""
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
    return sorted(file.stem for file in (PROJECT / "conf" / group).glob("*.yaml"))
