"""Prefix packing for a GPU: blocks in a few rows of equal length.

A GPU waits for each call. In rows all blocks attend by one call a layer, and shapes recur, so that
steps can be recorded and replayed (cuda_graphs).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_or_full.data.prompt import IGNORED
from lora_or_full.modeling.prefix_packing import (
    PADDING_SEGMENT,
    Packed,
    Padded,
    joined,
    may_attend,
    only,
    tokens_before,
)

ROW_LENGTH, LENGTH_MULTIPLE, LABELS_MULTIPLE = 512, 128, 32


class PackedRows(NamedTuple):
    """Blocks in R rows of L tokens, of few different shapes.

    Attributes:
        tokens: Token ids, positions, numbers of blocks and segments (4, R, L).
        wanted: Where logits are needed, by number among all R·L tokens, and the labels there
            (2, N); filled up with the first token and IGNORED.
    """

    tokens: torch.Tensor
    wanted: torch.Tensor

    @property
    def input_ids(self) -> torch.Tensor:
        """Token ids (R, L)."""
        return self.tokens[0]

    def to(self, device: torch.device) -> "PackedRows":
        """Move to a device, without waiting for a GPU."""
        if device.type == "cuda" and self.tokens.device.type == "cpu":
            return PackedRows(*(t.pin_memory().to(device, non_blocking=True) for t in self))
        return PackedRows(self.tokens.to(device), self.wanted.to(device))

    def model_inputs(self, needed: torch.Tensor | None = None) -> dict[str, Any]:
        """Give the arguments of the model for the logits of the `needed` tokens (N), or of all."""
        input_ids, position_ids, block_of, segment_of = self.tokens
        mask = (block_of[:, :, None] == block_of[:, None]) & may_attend(segment_of, segment_of)
        return {
            **only(needed),
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": mask.tril()[:, None],  # (R, 1, L, L)
        }


Sequences = Padded | Packed | PackedRows


def in_rows(
    contexts: Sequence[list[int]],
    branches: Sequence[list[int]],
    labels: Sequence[list[int]],
    length: int,
) -> PackedRows:
    """Pack questions as `packed`, but in rows; the number of labels is rounded up too."""
    *planes, targets = laid_out(contexts, branches, labels, length)
    found = tokens_before(targets)
    size = _multiple(max(1, found.shape[1]), LABELS_MULTIPLE * len(planes[0]))
    wanted = torch.tensor([[0], [IGNORED]]).repeat(1, size)
    wanted[:, : found.shape[1]] = found
    return PackedRows(torch.stack(planes), wanted)


def laid_out(
    contexts: Sequence[list[int]],
    branches: Sequence[list[int]],
    labels: Sequence[list[int]],
    length: int,
) -> torch.Tensor:
    """Put blocks into rows, the longest first, each into the first row that has room.

    A row has ROW_LENGTH tokens, or more for a longer block, or fewer if one row holds all. Numbers
    and lengths of rows are rounded up, so that shapes recur.

    Returns:
        Token ids, positions, blocks, segments and labels (5, R, L).
    """
    planes, sizes, _ = joined(contexts, branches, labels, length)
    blocks = planes.split(sizes, dim=1)
    width = _multiple(min(max(*sizes, ROW_LENGTH), sum(sizes)), LENGTH_MULTIPLE)
    rows: list[list[torch.Tensor]] = []
    room: list[int] = []  # of each row
    for block in sorted(blocks, key=lambda block: -block.shape[1]):
        row = next((r for r, free in enumerate(room) if free >= block.shape[1]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(block)
        room[row] -= block.shape[1]
    filling = torch.tensor([0, 0, PADDING_SEGMENT, PADDING_SEGMENT, IGNORED])
    count = len(rows) if len(rows) <= 16 else _multiple(len(rows), 4)
    made = filling[:, None, None].repeat(1, count, width)
    for row, held in enumerate(rows):
        made[:, row, : width - room[row]] = torch.cat(held, dim=1)
    return made


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
