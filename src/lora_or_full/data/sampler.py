"""Which questions make an optimizer step, in an order that a run can resume."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader, Sampler

from lora_or_full.data.tokenized import TokenizedQuestions


@dataclass(eq=False)  # PyTorch compares samplers by identity
class StepSampler(Sampler[tuple[list[int], int]]):
    """Samples micro-batches: row numbers, and the label count of the whole step.

    A step is `batch_size` rows of a shuffle that seed and epoch fix. It is dealt to the devices in
    micro-batches; in the last step of an epoch one may be empty. `epoch` and `position` say where
    an interrupted epoch continues.
    """

    labels: Sequence[int]  # number of label tokens of each row
    paragraphs: Sequence[int] | None  # of each row, to put few into each step; None shuffles rows
    batch_size: int  # rows per step
    micro_batches: int  # per step and device
    seed: int  # of the order
    devices: int
    device: int  # number of this device, from 0
    epoch: int = 0
    position: int = 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size) * self.micro_batches

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch, unless it is the current one (Lightning calls this before each)."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        # Its own generator: torch's global one differs between modes after initialization.
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.labels)))
        rng.shuffle(order)
        if self.paragraphs is not None:
            order = _together(order, self.paragraphs, min(self.batch_size, len(order)), rng)
        for number in range(self.position % len(self), len(self)):
            self.position = number + 1
            step, own = divmod(number, self.micro_batches)
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            share = self.device * self.micro_batches + own
            shares = self.devices * self.micro_batches
            first, stop = (len(rows) * n // shares for n in (share, share + 1))
            yield rows[first:stop], sum(self.labels[row] for row in rows)


def evaluation_batches(rows: TokenizedQuestions, size: int) -> list[list[int]]:
    """Deal rows into batches to answer: those of a paragraph together, the longest first."""
    lengths, paragraphs = rows.column("prompt_tokens"), rows.column("paragraph")
    longest: dict[int, int] = {}
    for length, paragraph in zip(lengths, paragraphs, strict=True):
        longest[paragraph] = max(length, longest.get(paragraph, 0))
    order = sorted(range(len(rows)), key=lambda n: (-longest[paragraphs[n]], paragraphs[n]))
    return [order[start : start + size] for start in range(0, len(order), size)]


class ResumableLoader(DataLoader):
    """A loader that Lightning can save and restore in the middle of an epoch."""

    sampler: StepSampler

    def state_dict(self) -> dict[str, int]:
        """Epoch, and position in it."""
        return {"epoch": self.sampler.epoch, "position": self.sampler.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from an epoch and a position in it."""
        self.sampler.epoch, self.sampler.position = state["epoch"], state["position"]


def _together(
    order: list[int], paragraphs: Sequence[int], size: int, rng: random.Random
) -> list[int]:
    """Arrange shuffled rows so that each step of `size` rows has few paragraphs.

    A paragraph that fills steps alone does. Remainders fill steps together where they fit (best
    fit); the rest is cut into steps in order. The steps are shuffled.
    """
    rows_of: dict[int, list[int]] = {}
    for row in order:
        rows_of.setdefault(paragraphs[row], []).append(row)
    steps: list[list[int]] = []
    open_steps: dict[int, list[list[int]]] = {room: [] for room in range(1, size)}
    for rows in rows_of.values():
        whole = len(rows) // size * size
        steps += [rows[start : start + size] for start in range(0, whole, size)]
        rest = rows[whole:]
        if rest:
            fits = next((room for room in range(len(rest), size) if open_steps[room]), None)
            step = (open_steps[fits].pop() if fits else []) + rest
            (open_steps[size - len(step)] if len(step) < size else steps).append(step)
    left = [row for room in open_steps.values() for step in room for row in step]
    whole = len(left) // size * size
    steps += [left[start : start + size] for start in range(0, whole, size)]
    rng.shuffle(steps)
    return [row for step in steps for row in step] + left[whole:]
