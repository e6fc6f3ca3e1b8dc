"""The command: fine-tune, score, record.

python src/run.py mode=lora
python src/run.py -m mode=lora,full seed=1,2,3
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from filelock import Timeout
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lora_or_full.config.compose import CONF, prepare, saved, to_dict, usage
from lora_or_full.config.schema import OF_LORA
from lora_or_full.errors import UserError, command, explain
from lora_or_full.runs import store
from lora_or_full.training.distributed import is_first, leave
from lora_or_full.training.sweep import INTERRUPTED, Sweep


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
        if problem := explain(error, folder):
            print(f"Error: {problem}", file=sys.stderr)
            sys.exit(1)
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
        settings = saved(folder)
        identity = store.status(folder).get("identity")
        changed = store.damaged_files(folder)
        if changed and (folder / store.RESULTS).exists():
            words = f"Warning: damaged in {folder}: {', '.join(changed)}. It is made anew."
            print(words, file=sys.stderr)
    lock = store.run_lock(folder)
    try:
        if is_first():
            lock.acquire(blocking=False)
        else:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
    except Timeout:
        raise UserError(f"{folder}: another process is at work on this run.") from None
    if is_first():
        store.remove_partial_files(folder)
    threading.excepthook = _in_thread
    # Only now, since they take seconds: torch and all that stands on it.
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from experiment import run
    from lora_or_full.data.fingerprints import identity_of
    from lora_or_full.training import console
    from lora_or_full.training.checkpoint import Interrupted

    try:
        if is_first():
            identity = identity or identity_of(settings)
            store.set_status(folder, "running", identity, process=os.getpid())
        results = run(settings, folder)
        if not is_first():
            leave()
        store.set_status(folder, "finished", identity)
    except (Interrupted, SIGTERMException, KeyboardInterrupt):
        _note(folder, "interrupted", identity)
        print(f"Stopped. To go on: python src/run.py resume='{folder}'", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        reason = explain(error, folder) or f"{type(error).__name__}: {error}"
        _note(folder, "failed", identity, error=str(reason))
        raise
    console.close(results, folder)


def _in_thread(raised: threading.ExceptHookArgs) -> None:
    """Leave out the trace of TensorBoard's writer on a full disk: the main thread raises it too."""
    if not isinstance(raised.exc_value, OSError):
        threading.__excepthook__(raised)


def _note(folder: Path, state: str, identity: str | None, **facts: Any) -> None:
    """Set the status of a run that ends, if a full disk lets it: what ended it is told anyway."""
    if is_first():
        with contextlib.suppress(OSError):
            store.set_status(folder, state, identity, **facts)


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


@command()
def main() -> None:
    args = get_args_parser().parse_args()
    if args.help:
        print(f"{(__doc__ or '').strip()}\n\n{usage()}")
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


if __name__ == "__main__":
    main()
