"""Which questions make an optimizer step, in an order that any run can take up again."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, Sampler


class StepSampler(Sampler[tuple[list[int], int]]):
    """The parts of each optimizer step: row numbers, and the label count of the whole step.

    A step is `batch_size` rows of a shuffle that (seed, epoch) fixes, dealt to `devices` in `parts`
    each, of which these are those of device number `device`; in the last step of an epoch a part
    may be left without a row. With `paragraphs` (each row's) a step holds the rows of as few
    paragraphs as can be. It knows its `position`, so that an interrupted epoch can go on where it
    was. `labels` holds each row's number of label tokens.
    """

    def __init__(
        self,
        labels: Sequence[int],
        paragraphs: Sequence[int] | None,
        batch_size: int,
        parts: int,
        seed: int,
        devices: int,
        device: int,
    ) -> None:
        self.labels, self.paragraphs = labels, paragraphs
        self.batch_size, self.parts, self.seed = batch_size, parts, seed
        self.devices, self.device = devices, device
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size) * self.parts

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch; another one than before begins at its start."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        # A generator of its own: torch's global one stands elsewhere in LoRA than in full.
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.labels)))
        rng.shuffle(order)
        if self.paragraphs is not None:
            order = _together(order, self.paragraphs, min(self.batch_size, len(order)), rng)
        for number in range(self.position % len(self), len(self)):
            self.position = number + 1
            step, part = divmod(number, self.parts)
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            share, shares = self.device * self.parts + part, self.devices * self.parts
            first, stop = (len(rows) * n // shares for n in (share, share + 1))
            yield rows[first:stop], sum(self.labels[row] for row in rows)


class ResumableLoader(DataLoader):
    """A loader over a StepSampler that Lightning saves and restores in the middle of an epoch."""

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
    """The shuffled rows of `order`, so arranged that `size` of them in turn are of few paragraphs.

    What fills a step alone does; the rests fill steps together where they fit (best fit); what is
    left over then is cut into steps as it comes. The steps are shuffled.
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
        if not rest:
            continue
        fits = next((room for room in range(len(rest), size) if open_steps[room]), None)
        step = (open_steps[fits].pop() if fits else []) + rest
        if len(step) == size:
            steps.append(step)
        else:
            open_steps[size - len(step)].append(step)
    left = [row for room in open_steps.values() for step in room for row in step]
    whole = len(left) // size * size
    steps += [left[start : start + size] for start in range(0, whole, size)]
    rng.shuffle(steps)
    return [row for step in steps for row in step] + left[whole:]
