"""The processes of a run: which one is the first, and how they handle stop signals. No torch."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_or_full.errors import UserError

# Set by torchrun and SLURM; set by Lightning's launcher, or by hand for a process per machine.
RANK_OF_ALL, RANK_BY_HAND = ("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "NODE_RANK")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")  # needed by processes started by hand
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_first_process() -> bool:
    """Whether this is the first process of its run, the only one that writes and prints."""
    return not any(int(os.environ.get(name) or 0) for name in (*RANK_OF_ALL, *RANK_BY_HAND))


def check_rendezvous(machines: int) -> None:
    """Refuse a run on several `machines` (trainer.num_nodes) that could not find each other.

    Raises:
        UserError: With the variables to set.
    """
    unset = [name for name in RENDEZVOUS if name not in os.environ]
    if machines > 1 and unset and not any(name in os.environ for name in RANK_OF_ALL):
        raise UserError(
            f"trainer.num_nodes={machines}: {', '.join(unset)} must be set on each machine. "
            "MASTER_ADDR and MASTER_PORT say where the first one is, NODE_RANK which one it is, "
            "from 0; torchrun and SLURM's srun set what is needed (docs/slurm.sh)."
        )


@contextmanager
def stop_signals_to(handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    """Handle SIGINT and SIGTERM by `handler`, and restore the handlers before at the end."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, restored in before.items():
            signal.signal(number, restored)
