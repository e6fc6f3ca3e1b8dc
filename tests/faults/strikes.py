"""Faults: what happens to a process, and when. They are installed in a fork."""

import errno
import functools
import io
import mmap
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lit_module import LitQuestionAnswering

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
ERRORS = {"ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}  # raised by each write from the moment on
LIMIT, FULL = "EFBIG", "full disk"  # the system's own: a limit of a file's size; a full tmpfs
DAMAGE = ("truncated", "emptied", "overwritten")
MEMORY = ("MemoryError", "allocator", "OOM killer")
AMID = "amid a checkpoint"
STEPS = {"training": "training_step", "validation": "validation_step", "test": "test_step"}
# Operations that change a file, and which of their arguments names it.
OPERATIONS = {"open": 0, "os.rename": 1, "os.mkdir": 0, "os.remove": 0, "os.truncate": 0}


@dataclass(frozen=True)
class Places:
    """The folders in which a process writes."""

    run: Path | None = None
    cache: Path | None = None
    report: Path | None = None

    def moment(self, file: Path) -> str | None:
        """What the process is doing when it writes `file`; None if that is none of these."""
        if self.run and self.run in file.parents and self.run / "tb" not in file.parents:
            inside = self.run / "checkpoints" in file.parents
            return "checkpointing" if inside else "records"
        if self.cache and self.cache in file.parents:
            return "cache"
        return "report" if self.report and self.report in file.parents else None


@dataclass
class Strike:
    """A `fault` at the `number`-th event of a `moment`; `met` tells the parent whether it came."""

    fault: str
    moment: str
    number: int
    places: Places
    rng: random.Random
    seen: int = 0
    broken: int = 0  # the errno of all writes from now on
    shared: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 1))

    @property
    def met(self) -> bool:
        return self.shared[0] == 1

    def install(self) -> None:
        watch(self.places, self._count, self._refuse)

    def _count(self, moment: str) -> None:
        self.seen += moment == self.moment
        if moment == self.moment and self.seen == self.number:
            self.shared[0] = 1
            self._act()

    def _refuse(self, file: Path, operation: str) -> None:
        if self.broken and (operation, self.broken) != ("os.remove", errno.ENOSPC):
            raise OSError(self.broken, os.strerror(self.broken), str(file))

    def _act(self) -> None:
        if self.fault in SIGNALS or self.fault == "OOM killer":
            name = "SIGKILL" if self.fault == "OOM killer" else self.fault
            os.kill(os.getpid(), signal.Signals[name])
        elif self.fault in ERRORS:
            self.broken = ERRORS[self.fault]
        elif self.fault == LIMIT:
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.rng.randrange(6_000, 20_000), most))
        elif self.fault == FULL:
            assert self.places.run is not None
            fill(self.places.run.parents[1])
        elif self.fault == "MemoryError":
            raise MemoryError
        else:
            torch.empty(1 << 52)  # the allocator's own words


def watch(
    places: Places,
    count: Callable[[str], None],
    refuse: Callable[[Path, str], None] = lambda file, operation: None,
) -> None:
    """Call `count` at each moment of this process, and `refuse` before each write in `places`."""
    for moment, name in STEPS.items():
        original = getattr(LitQuestionAnswering, name)

        @functools.wraps(original)
        def step(*args: Any, moment: str = moment, original: Callable[..., Any] = original) -> Any:
            count(moment)
            return original(*args)

        setattr(LitQuestionAnswering, name, step)

    save = torch.save

    def save_in_two_parts(state: Any, out: BinaryIO) -> None:
        content = io.BytesIO()
        save(state, content)
        half = content.tell() // 2
        out.write(content.getbuffer()[:half])
        out.flush()
        count(AMID)
        out.write(content.getbuffer()[half:])

    torch.save = save_in_two_parts

    def hook(event: str, args: tuple[Any, ...]) -> None:
        file = _changed(event, args)
        moment = file and places.moment(file)
        if file and moment:
            count(moment)
            refuse(file, event)

    sys.addaudithook(hook)


def fill(folder: Path) -> None:
    """Leave no room on the disk of `folder`; `folder/filler` is to be removed to mend it."""
    with (folder / "filler").open("wb", buffering=0) as out:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    out.write(bytes(size))
            except OSError:
                continue


def damage(file: Path, how: str, rng: random.Random) -> None:
    """Leave of `file` a part, nothing, or all of it with a block of other bytes."""
    content = bytearray(file.read_bytes())
    if how == "truncated":
        del content[rng.randrange(1, len(content)) :]
    elif how == "emptied":
        content.clear()
    else:
        size = min(512, len(content))
        start = rng.randrange(len(content) - size + 1)
        content[start : start + size] = rng.randbytes(size)
    file.write_bytes(content)


def _changed(event: str, args: tuple[Any, ...]) -> Path | None:
    """The file that an operation of Python's is about to change."""
    if event not in OPERATIONS or not isinstance(args[OPERATIONS[event]], str | os.PathLike):
        return None
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return None
    return Path(os.path.abspath(args[OPERATIONS[event]]))


def counted(places: Places) -> Mapping[str, int]:
    """How often each moment comes, counted while this process runs."""
    counts: dict[str, int] = {}
    watch(places, lambda moment: counts.update({moment: counts.get(moment, 0) + 1}))
    return counts
