"""Several devices, each with a process of its own: which one keeps the record, what they share."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from lora_or_full.errors import UserError

if TYPE_CHECKING:
    import lightning as L  # seconds, which run.py spends only when a run begins

T = TypeVar("T")
STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def connected(trainer: "L.Trainer") -> Iterator[None]:
    """The processes of all devices, started and connected as Lightning does at its first use.

    None is left alone if one fails.

    Raises:
        UserError: their number is not that of the processes that the cluster started.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size > 1:
        print(f"Waiting for the processes of {trainer.world_size} devices.", flush=True)
    try:
        try:
            if launcher is not None:
                # Machines that are started by hand may be waited for long.
                with _ended_by_signals() if trainer.num_nodes > 1 else nullcontext():
                    launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
        except ValueError as error:
            raise UserError(f"Lightning refuses trainer.*: {error}") from None
        yield
    except BaseException:
        if not trainer.is_global_zero:
            time.sleep(10)  # the first process fails alike, tells it, and ends this one
        for process in (started := getattr(launcher, "procs", [])):
            process.send_signal(signal.SIGKILL)
        started.clear()  # else Lightning's watch over them would kill this one before it can tell
        raise


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a signal end this process as the system does: while torch waits, Python hears none."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gathered(own: T) -> list[T]:
    """What the process of each device has, in the order of the devices; all get it."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    everyones = [own] * distributed.get_world_size()
    distributed.all_gather_object(everyones, own)
    return everyones


def check_alike(folder: Path, precision: str) -> None:
    """The processes of a run that are started apart may each have named it by their own clock, and
    found their own precision on their own machines.

    Raises:
        UserError: they have.
    """
    folders, precisions = map(set, zip(*gathered((str(folder), precision)), strict=True))
    if len(folders) > 1:
        raise UserError(
            f"The processes of this run are in folders of their own ({', '.join(sorted(folders))})."
            " Give all of them one: hydra.run.dir=<folder>."
        )
    if len(precisions) > 1:
        raise UserError(
            f"trainer.precision=auto is {' and '.join(sorted(precisions))} on the machines of this "
            "run. Give all of them one: trainer.precision=32-true or bf16-mixed."
        )


def leave() -> NoReturn:
    """End this process, which has done its part of a run that went well.

    Python is not shut down: a thread of gloo's may still let go of what was gathered last, and that
    aborts an interpreter that is shutting down (https://github.com/pytorch/pytorch/issues/190489).
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
