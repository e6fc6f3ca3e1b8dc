"""Several devices, each with a process of its own: which one keeps the record, what they share."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from errors import UserError

if TYPE_CHECKING:
    import lightning as L  # seconds, which run.py spends only when a run begins

T = TypeVar("T")
# Where Lightning's launcher, torchrun and SLURM tell a process its number.
NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


def is_first() -> bool:
    """Whether this process is the first of its run, which alone writes and tells."""
    return not any(int(os.environ.get(name) or 0) for name in NUMBERS)


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


def gathered(own: T) -> list[T]:
    """What the process of each device has, in the order of the devices; all get it."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    everyones = [own] * distributed.get_world_size()
    distributed.all_gather_object(everyones, own)
    return everyones
