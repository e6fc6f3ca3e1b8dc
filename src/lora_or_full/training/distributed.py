"""Several devices, each with its own process: how these start, exchange data, and end."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn, TypeVar

import lightning as L
from torch import distributed

from lora_or_full.errors import UserError
from lora_or_full.processes import stop_signals_to

T = TypeVar("T")


@contextmanager
def connected(trainer: L.Trainer) -> Iterator[None]:
    """Start and connect the processes of all devices, and end all of them if one fails.

    Raises:
        UserError: The cluster has started another number of processes.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size > 1:
        print(f"Waiting for the processes of {trainer.world_size} devices.", flush=True)
    try:
        try:
            if launcher is not None:
                # Machines that are started by hand may take long.
                # Stop signals end them at once then: Python handles none while torch waits.
                default = stop_signals_to(signal.SIG_DFL)
                with default if trainer.num_nodes > 1 else nullcontext():
                    launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
        except ValueError as error:
            raise UserError(f"Lightning refuses trainer.*: {error}") from None
        yield
    except BaseException:
        if not trainer.is_global_zero:
            time.sleep(10)  # the first process fails too, reports the error, and ends this one
        for process in (started := getattr(launcher, "procs", [])):
            process.kill()
        started.clear()  # or Lightning, which watches them, kills this process before its report
        raise


def gathered(own: T) -> list[T]:
    """Gather an object from the process of each device, in the order of the devices, to all."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    objects = [own] * distributed.get_world_size()
    distributed.all_gather_object(objects, own)
    return objects


def check_alike(folder: Path, precision: str) -> None:
    """Check that all processes of a run have the same folder and precision.

    On several machines, each process names the folder by its own clock, and resolves
    trainer.precision=auto for its own hardware.

    Raises:
        UserError: They differ.
    """
    folders, precisions = map(set, zip(*gathered((str(folder), precision)), strict=True))
    if len(folders) > 1:
        raise UserError(
            f"The processes of this run have different folders ({', '.join(sorted(folders))})."
            " Set the same one for all: hydra.run.dir=<folder>."
        )
    if len(precisions) > 1:
        raise UserError(
            f"trainer.precision=auto is {' and '.join(sorted(precisions))} on the machines of this "
            "run. Set the same one for all: trainer.precision=32-true or bf16-mixed."
        )


def leave() -> NoReturn:
    """End this process after a successful run, without Python's shutdown.

    A gloo thread that still releases what was gathered last would abort an interpreter that shuts
    down (https://github.com/pytorch/pytorch/issues/190489).
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
