"""The command: fine-tune, score, record.

python src/run.py mode=lora
python src/run.py -m mode=lora,full seed=1,2,3
"""

import contextlib
import io
import itertools
import math
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import hydra
import yaml
from filelock import Timeout
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from devices import is_first
from errors import UserError, first_line, in_words
from settings import GROUPS, OF_LORA, SETTINGS, check, explained, unknown
from study import record
from sweep import INTERRUPTED, Sweep, word

PROJECT = Path(__file__).resolve().parents[1]
CONF = str(PROJECT / "conf")
MOST_JOBS = 1000  # of a sweep: more are a slip, and checking them would take minutes

OmegaConf.register_new_resolver("project_dir", lambda: str(PROJECT), replace=True)


def job(config: DictConfig) -> None:
    """One run. Of several devices each has a process of its own; the first keeps the record."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    settings = to_dict(config)
    with told(folder):
        single(settings, folder)


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """Say what a person can mend of what fails inside in one line, and end."""
    try:
        yield
    except Exception as error:
        if problem := in_words(error, folder):
            refuse(problem)
        raise


def single(settings: dict[str, Any], folder: Path) -> None:
    """One run, from its beginning or from where it was interrupted; its state stands in the folder.

    Raises:
        UserError: it can't be done.
    """
    identity = None
    if settings["resume"] is None:
        if is_first() and (folder / "config.yaml").exists():
            raise UserError(f"{folder} holds a run already: choose another hydra.run.dir.")
    else:
        settings = _saved(folder)
        identity = record.status(folder).get("identity")
        changed = record.damaged(folder)
        if changed and (folder / record.RESULTS).exists():
            words = f"Warning: damaged in {folder}: {', '.join(changed)}. It is made anew."
            print(words, file=sys.stderr)
    lock = record.lock(folder)
    try:
        if is_first():
            lock.acquire(blocking=False)
        else:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
    except Timeout:
        raise UserError(f"{folder}: another process is at work on this run.") from None
    if is_first():
        record.clear(folder)
    threading.excepthook = _in_thread
    # Only now, since they take seconds: torch and all that stands on it.
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    import terminal
    from checkpoint import Interrupted
    from experiment import run
    from identity import identity_of

    try:
        if is_first():
            identity = identity or identity_of(settings)
            record.set_status(folder, "running", identity, process=os.getpid())
        results = run(settings, folder)
        if is_first():
            record.set_status(folder, "finished", identity)
    except (Interrupted, SIGTERMException, KeyboardInterrupt):
        _note(folder, "interrupted", identity)
        print(f"Stopped. To go on: python src/run.py resume='{folder}'", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        reason = in_words(error, folder) or f"{type(error).__name__}: {error}"
        _note(folder, "failed", identity, error=str(reason))
        raise
    if is_first():
        terminal.close(results, folder)


def _in_thread(raised: threading.ExceptHookArgs) -> None:
    """Leave out the trace of TensorBoard's writer on a full disk: the main thread raises it too."""
    if not isinstance(raised.exc_value, OSError):
        threading.__excepthook__(raised)


def _note(folder: Path, state: str, identity: str | None, **facts: Any) -> None:
    """Set the status of a run that ends, if a full disk lets it: what ended it is told anyway."""
    if is_first():
        with contextlib.suppress(OSError):
            record.set_status(folder, state, identity, **facts)


def job_of(sweep: Sweep) -> Callable[[DictConfig], None]:
    """What Hydra's launcher runs for each job of a sweep, in this process or in a worker."""

    def start(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        number = hydra_config.job.num
        of_sweep = ["study"]
        if sweep.jobs[number]["mode"] == "full":  # these are swept for the other mode
            of_sweep += OF_LORA
        words = [w for w in hydra_config.overrides.task if w.partition("=")[0] not in of_sweep]
        with told(sweep.place):
            sweep.run(number, words)

    return start


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
    for override in overrides:
        value = str(override.value())
        # What refers to other keys is known to Hydra alone.
        if override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir") and "${" not in value:
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
            place = _sweep_dir([first for first, *_ in values.values()])
        else:
            place = Path(jobs[0]["output_dir"], str(jobs[0]["study"]))
        # What the preset sweeps is among the words now: Hydra is not to add it again.
        words = ["hydra.sweeper.params=null", *preset, word("hydra.sweep.dir", place)]
        return words, Sweep(jobs, place)
    if jobs[0]["study"] is not None:
        raise UserError("study names the folder of a sweep, which needs -m.")
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
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # of mode=null too
            problem = str(error)
    for override in overrides:
        key = override.key_or_group
        if key == "hydra/launcher" and key in problem:
            raise UserError(
                f"{key}={override.value()}: there is no such launcher. pip install "
                "-c constraints.txt -e '.[joblib]' or '.[submitit]' brings one."
            )
        if key in GROUPS:
            swept = override.is_sweep_override()
            given = (
                [w.partition("=")[2] for w in _values(override)]
                if swept
                else [str(override.value())]
            )
            if wrong := [value for value in given if value not in _options(key)]:
                raise _no_option(key, wrong[0], _options(key))
        elif key.startswith("lora.") and "mode=full" in words:
            raise UserError(f"{key}: mode=full has no LoRA; it belongs to mode=lora.")
        elif key not in SETTINGS and not key.startswith(("hydra.", "hydra/", "model.config.")):
            raise unknown(key)
    raise UserError(problem)


def _sweep_dir(words: list[str]) -> Path:
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return Path(hydra.compose("config", words, return_hydra_config=True).hydra.sweep.dir)


def _swept_by_preset(args: Namespace, overrides: list[Override]) -> list[str]:
    """The words for what the experiment that is asked for sweeps over, where no others are given.

    Raises:
        UserError: it is a sweep, and -m is missing.
    """
    presets = [str(o.value()) for o in overrides if o.key_or_group == "experiment"]
    if not presets or presets[-1] not in _options("experiment"):
        return []
    file = OmegaConf.load(Path(CONF, "experiment", f"{presets[-1]}.yaml"))
    swept = OmegaConf.select(file, "hydra.sweeper.params") or {}
    given = {o.get_key_element(): str(o.value()) for o in overrides}
    if "hydra.sweeper.params" in given:  # a job of that sweep
        return []
    none = OF_LORA if given.get("mode") == "full" else ()
    words = [f"{k}={value}" for k, value in swept.items() if k not in given and k not in none]
    if words and not args.multirun:
        raise UserError(f"experiment={presets[-1]} is a sweep, which needs -m.")
    return words


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
    saved = record.flat(_saved(folder), SETTINGS)
    if record.finished(folder):
        raise UserError(f"resume={folder}: that run is finished; see its results.json.")
    _check_writable("resume", folder)
    plain, new = record.flat(compose([], []), SETTINGS), record.flat(asked, SETTINGS)
    named = [override.key_or_group for override in overrides]
    differ = [
        f"  {key}: the run has {saved.get(key)}, asked for is {value}"
        for key, value in new.items()
        if key in SETTINGS
        and key not in ("resume", "run_name")
        and (value != plain.get(key) or any(key == n or key.startswith(f"{n}.") for n in named))
        and value != saved.get(key)
        and (key, value) != ("trainer.precision", "auto")  # the run has what auto was for it
    ]
    if differ:
        lines = "\n".join(differ)
        raise UserError(f"resume={folder} is of another configuration:\n{lines}\nLeave these out.")
    return [word("hydra.run.dir", folder)]


def _saved(folder: Path) -> dict[str, Any]:
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


def show_help() -> None:
    """Print every key with its default and meaning."""
    print((__doc__ or "").strip())
    print("\nKeys, with their defaults:")
    for key, default, meaning in explained(compose([], [])):
        print(f"  {key}={default}\n        {meaning}")
    print("\nPresets, as group=name:")
    for group in GROUPS:
        print(f"  {group}: {', '.join(_options(group))}")
    print("\n-m sweeps over values with commas; --cfg job shows the configuration; --hydra-help.")


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (PROJECT / "conf" / group).glob("*.yaml"))


def refuse(error: UserError) -> None:
    """Say what is wrong, and end."""
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(1)


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    args = get_args_parser().parse_args()
    try:
        if args.help:
            show_help()
            return
        sweep = None
        if not (args.hydra_help or args.cfg or args.info or args.shell_completion):
            words, sweep = prepare(args)
            sys.argv += words
        task = job_of(sweep) if sweep else job
        with contextlib.ExitStack() as stack:
            if sweep:
                stack.enter_context(told(sweep.place))
                stack.enter_context(sweep.told())
            hydra.main(version_base="1.3", config_path=CONF, config_name="config")(task)()
    except UserError as error:
        refuse(error)
    except KeyboardInterrupt:  # before a run could listen to it
        print("Stopped.", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
