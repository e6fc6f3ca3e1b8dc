"""The command: fine-tune, score, record.

python src/run.py mode=lora
python src/run.py -m mode=lora,full seed=1,2,3
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from filelock import Timeout
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lora_or_full.config.command_line import (
    CommandLine,
    check_options,
    more_training,
    prepare,
    usage,
)
from lora_or_full.config.compose import CONF, SEARCHPATH
from lora_or_full.config.schema import Config, unused
from lora_or_full.errors import UserError, command_line_errors, explain
from lora_or_full.processes import is_first_process
from lora_or_full.runs import store
from lora_or_full.training import console
from lora_or_full.training.sweep import INTERRUPTED, Sweep


@command_line_errors()
def main() -> None:
    """Run one job, or a sweep of them."""
    parser = get_args_parser()
    parser.allow_abbrev = False  # --experiment is no --experimental-rerun
    args, unknown = parser.parse_known_intermixed_args()
    check_options(unknown, sys.argv[1:])
    if args.help:
        print(f"{(__doc__ or '').strip()}\n\n{usage(args.config_dir)}")
        return
    # Hydra takes options at one end only, but people write them anywhere.
    options = [word for word in sys.argv[1:] if word not in args.overrides]
    sys.argv[1:] = [*options, *args.overrides]
    start = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    if args.hydra_help or args.cfg or args.info or args.shell_completion:
        start(lambda composed: None)()
        return
    command = prepare(args)
    sys.argv += command.words
    if command.folder is None:
        start(single_run(command))()
        return
    sweep = Sweep(command.jobs, command.folder)
    with command_line_errors(sweep.folder), sweep.reported():
        start(sweep_job(sweep))()


def single_run(command: CommandLine) -> Callable[[DictConfig], None]:
    """Give what runs the checked job in the folder that Hydra has chosen."""

    def start(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        with command_line_errors(folder):
            run_in_folder(command.jobs[0], folder, command.resumes)

    return start


def sweep_job(sweep: Sweep) -> Callable[[DictConfig], None]:
    """Give what Hydra's launcher calls for each job, in this process or in a worker."""

    def start(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        number = hydra_config.job.num
        # What this mode has no use for is swept for others.
        of_sweep = {"study", *unused(sweep.jobs[number].to_dict())}
        words = [w for w in hydra_config.overrides.task if w.partition("=")[0] not in of_sweep]
        words += [w for w in hydra_config.overrides.hydra if w.startswith(f"{SEARCHPATH}=")]
        with command_line_errors(sweep.folder):
            sweep.run(number, words)

    return start


def run_in_folder(config: Config, folder: Path, resumes: bool) -> None:
    """Run from the beginning, or from where the run was interrupted; keep status.json current.

    With several devices, each has a process that calls this. Only the first one writes.

    Raises:
        UserError: The run is not possible.
    """
    first, known = is_first_process(), store.status(folder) if resumes else {}
    identity, facts = known.get("identity"), {}
    began, earlier = time.time(), known.get("seconds", 0.0)  # seconds of the starts before
    if not resumes:
        if first and (folder / "config.yaml").exists():
            raise UserError(f"{folder} holds a run already: choose another hydra.run.dir.")
    else:
        if first and store.is_finished(folder):
            raise UserError(
                f"resume={folder}: that run is finished; see its results.json. To train its "
                f"weights further, as a run of its own: {more_training(folder)}"
            )
        facts = {"contents": known["contents"]} if "contents" in known else {}
        damaged = store.damaged_files(folder)
        if damaged and (folder / store.RESULTS).exists():
            words = f"Warning: damaged in {folder}: {', '.join(damaged)}. The run is repeated."
            print(words, file=sys.stderr)
    if first:
        lock = store.run_lock(folder)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{folder}: another process is working on this run.") from None
        store.remove_partial_files(folder)
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
    threading.excepthook = _quiet_thread_errors
    try:
        if first:
            from lora_or_full.data import fingerprints

            found = fingerprints.contents(config)
            fingerprints.check_contents(facts.get("contents", found), found)
            fingerprints.check_data(config, found["data"])
            identity = identity or fingerprints.run_identity(config, found)
            facts = {"contents": found, "seconds": earlier}
            store.set_status(folder, "running", identity, process=os.getpid(), **facts)
        results = _run(config, folder, earlier)
        store.set_status(folder, "finished", identity, **facts)
    except KeyboardInterrupt:
        facts["seconds"] = earlier + time.time() - began
        _record_end(folder, "interrupted", identity, **facts)
        print(f"Stopped. To resume: python src/run.py resume='{folder}'", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        reason = explain(error, folder) or f"{type(error).__name__}: {error}"
        facts["seconds"] = earlier + time.time() - began
        _record_end(folder, "failed", identity, error=str(reason), **facts)
        raise
    console.close(results, folder)


def _run(config: Config, folder: Path, earlier: float) -> dict[str, Any]:
    """Run `experiment.run`; a stop signal ends it as Ctrl-C does."""
    # Imported late: torch and everything on top of it take seconds.
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from experiment import run
    from lora_or_full.training import checkpoint, distributed

    try:
        results = run(config, folder, earlier)
    except (checkpoint.Interrupted, SIGTERMException):
        raise KeyboardInterrupt from None
    if not is_first_process():
        distributed.leave()
    return results


def _quiet_thread_errors(raised: threading.ExceptHookArgs) -> None:
    """Skip the trace of TensorBoard's writer on a full disk: the main thread raises it too."""
    if not isinstance(raised.exc_value, OSError):
        threading.__excepthook__(raised)


def _record_end(folder: Path, state: str, identity: str | None, **facts: Any) -> None:
    """Set the status of a run that ends; a full disk may prevent it, and is reported anyway."""
    if is_first_process():
        with contextlib.suppress(OSError):
            store.set_status(folder, state, identity, **facts)


if __name__ == "__main__":
    main()
