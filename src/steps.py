"""Which questions make an optimizer step, in an order that any run can take up again."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, Sampler


class StepSampler(Sampler[tuple[list[int], int]]):
    """The parts of each optimizer step: row numbers, and the label count of the whole step.

    A step is `batch_size` rows of a shuffle that (seed, epoch) fixes, dealt to `parts` in turn; in
    the last step of an epoch a part may be left without a row. It knows its `position`, so that an
    interrupted epoch can go on where it was. `labels` holds each row's number of label tokens.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, parts: int, seed: int) -> None:
        self.labels, self.batch_size, self.parts, self.seed = labels, batch_size, parts, seed
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size) * self.parts

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch; another one than before begins at its start."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        # A generator of its own: torch's global one stands elsewhere in LoRA than in full.
        order = list(range(len(self.labels)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for number in range(self.position % len(self), len(self)):
            self.position = number + 1
            step, part = divmod(number, self.parts)
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield rows[part :: self.parts], sum(self.labels[row] for row in rows)


class ResumableLoader(DataLoader):
    """A loader over a StepSampler that Lightning saves and restores in the middle of an epoch."""

    sampler: StepSampler

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "position": self.sampler.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.epoch, self.sampler.position = state["epoch"], state["position"]
