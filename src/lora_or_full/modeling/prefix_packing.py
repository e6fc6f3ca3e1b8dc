"""Prefix packing: several questions over one context in one sequence, the context only once.

A context and its questions make a block. The positions of each question continue after its context.
A token attends to the context and to its own question up to itself, in its own block only. So each
question is computed as in a sequence of its own, but the context once per block instead of once per
question. (Derived here; Hydragen, Juravsky et al., 2024, arXiv 2402.05099, shares prefixes in
decoding.)

Here blocks follow one another in one sequence, with almost no padding, and attend one after
another, which is fastest on a CPU. For a GPU they lie in rows (packed_rows).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_or_full.data.prompt import IGNORED
from lora_or_full.modeling.kernels import NEEDED

PADDING_SEGMENT = -1  # segment of the padding of a block
CONTEXT_SEGMENT = 0  # segment of a context; its questions are 1, 2, ...
# Blocks are padded to a multiple: oneDNN compiles and keeps a kernel for each length, which for
# bfloat16 took an eighth of the time and a gigabyte (measured on two cores with AVX-512). Without
# AVX-512 MKL multiplies, which does not, and padding would take a thirtieth of the time.
PAD_MULTIPLE = 1 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16


class Block(NamedTuple):
    """A block of R tokens, and what they attend to.

    Attributes:
        start: First token in the sequence.
        stop: One past the last token.
        mask: Whether each token may attend to each key (R, C); without a cache C = R.
        keys: With a cache, the slots of the C keys.
        causal_rows: Number of first tokens that attend to all earlier ones, without a mask.
    """

    start: int
    stop: int
    mask: torch.Tensor
    keys: slice | None = None
    causal_rows: int = 0


class Labelled(NamedTuple):
    """Where logits are needed (K), and the labels there (B, K), or (1, K) of all rows.

    Numbers are of columns, or of all tokens in the order of rows.
    """

    needed: torch.Tensor
    targets: torch.Tensor


class Padded(NamedTuple):
    """Token ids and labels (B, T): one row per question, padded on the right."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def labelled(self) -> Labelled:
        """Give the columns that hold a label in some row."""
        return _labelled_columns(self.labels)

    def to(self, device: torch.device) -> "Padded":
        """Move to a device."""
        return Padded(self.input_ids.to(device), self.labels.to(device))

    def model_inputs(self, columns: torch.Tensor | None = None) -> dict[str, Any]:
        """Give the arguments of the model for the logits of `columns` (K), or of all.

        They need no mask: no real token attends to its right.
        """
        wanted = {} if columns is None else {"logits_to_keep": columns}
        return wanted | {"input_ids": self.input_ids}


class Packed(NamedTuple):
    """Token ids, labels and positions (1, T) of blocks, and block and segment of each token (T)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    block_of: torch.Tensor
    segment_of: torch.Tensor
    blocks: list[Block]

    def to(self, device: torch.device) -> "Packed":
        """Move to a device."""
        blocks = [block._replace(mask=block.mask.to(device)) for block in self.blocks]
        ids, labels, positions, block_of, segment_of = (t.to(device) for t in self[:5])
        return Packed(ids, labels, positions, block_of, segment_of, blocks)

    def labelled(self) -> Labelled:
        """Give the tokens before a label."""
        return _labelled_columns(self.labels)

    def model_inputs(self, columns: torch.Tensor | None = None) -> dict[str, Any]:
        """Give the arguments of the model for the logits of `columns` (K), or of all."""
        return block_inputs(self.input_ids, self.position_ids, self.blocks, columns)


def _labelled_columns(labels: torch.Tensor) -> Labelled:
    """The columns (K) of labels (B, T) that hold one in some row; each is predicted one before."""
    targets = labels[:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    return Labelled(columns, targets[:, columns])


def block_inputs(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    blocks: list[Block],
    columns: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Give the arguments of the model for a packed sequence.

    Args:
        input_ids: (1, T).
        position_ids: (1, T).
        blocks: The blocks of the sequence.
        columns: Tokens whose logits are needed (K); None for all.
    """
    wanted = {} if columns is None else {"logits_to_keep": columns, NEEDED: columns}
    return wanted | {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "blocks": blocks,
        # Four dimensions, so that transformers builds no mask of its own: `blocks` has it.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
    }


def padded(ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Padded:
    """Pad token ids and labels to one row per question."""
    longest = max(map(len, ids))
    return Padded(
        torch.tensor([row + [0] * (longest - len(row)) for row in ids], dtype=torch.long),
        torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels], dtype=torch.long),
    )


def packed(
    contexts: Sequence[list[int]],
    branches: Sequence[list[int]],
    labels: Sequence[list[int]],
    length: int,
) -> Packed:
    """Pack questions into one sequence, equal contexts only once.

    The tokens that all questions over a context begin with are shared too. Questions keep their
    order where equal contexts are adjacent.

    Args:
        contexts: Token ids of the context of each question.
        branches: Token ids of each question, with or without its answer.
        labels: Labels of `branches`.
        length: Largest number of tokens of a block, unless a single question has more; further
            questions repeat the context.
    """
    planes, sizes, causal_rows = joined(contexts, branches, labels, length)
    ids, positions, block_of, segment_of, targets = planes
    blocks, start = [], 0
    for size, causal in zip(sizes, causal_rows, strict=True):
        owners = segment_of[start : start + size]
        mask = may_attend(owners, owners).tril()
        blocks.append(Block(start, start + size, mask, causal_rows=causal))
        start += size
    return Packed(ids[None], targets[None], positions[None], block_of, segment_of, blocks)


def joined(
    contexts: Sequence[list[int]],
    branches: Sequence[list[int]],
    labels: Sequence[list[int]],
    length: int,
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Token ids, positions, blocks, segments and labels (5, T) of all blocks; and of each its size
    and number of causal rows."""
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    block_of: list[int] = []
    segment_of: list[int] = []
    sizes: list[int] = []
    causal_rows: list[int] = []
    for number, rows in enumerate(group_by_prefix(contexts, branches, length)):
        opening = common_prefix([branches[row] for row in rows], [labels[row] for row in rows])
        start, context = len(ids), contexts[rows[0]] + opening
        ids += context
        targets += [IGNORED] * len(context)
        positions += range(len(context))
        segment_of += [CONTEXT_SEGMENT] * len(context)
        for branch, row in enumerate(rows, CONTEXT_SEGMENT + 1):
            own = branches[row][len(opening) :]
            ids += own
            targets += labels[row][len(opening) :]
            positions += range(len(context), len(context) + len(own))
            segment_of += [branch] * len(own)
        filling = -(len(ids) - start) % PAD_MULTIPLE
        ids += [0] * filling
        targets += [IGNORED] * filling
        positions += [0] * filling
        segment_of += [PADDING_SEGMENT] * filling
        sizes.append(len(ids) - start)
        block_of += [number] * sizes[-1]
        # Where it is alone, padding may attend to anything: nothing attends to it.
        alone = len(rows) == 1
        causal_rows.append(sizes[-1] if alone else len(context) // PAD_MULTIPLE * PAD_MULTIPLE)
    planes = torch.tensor([ids, positions, block_of, segment_of, targets])
    return planes, sizes, causal_rows


def may_attend(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Give whether tokens may attend to earlier ones, by their segments.

    Args:
        rows: Segments of the tokens (..., R).
        columns: Segments of the earlier tokens (..., C).

    Returns:
        A bool (..., R, C).
    """
    earlier = columns[..., None, :]
    return (earlier == CONTEXT_SEGMENT) | (rows[..., None] == earlier)


def group_by_prefix(
    contexts: Sequence[list[int]], branches: Sequence[list[int]], length: int
) -> list[list[int]]:
    """Group examples by identical context, at most `length` tokens each."""
    blocks: list[list[int]] = []
    last: dict[tuple[int, ...], tuple[int, int]] = {}  # per context: its open block, and its size
    for row, (context, branch) in enumerate(zip(contexts, branches, strict=True)):
        key = tuple(context)
        block, size = last.get(key, (None, 0))
        if block is None or size + len(branch) > length:
            block, size = len(blocks), len(context)
            blocks.append([])
        blocks[block].append(row)
        last[key] = (block, size + len(branch))
    return blocks


def common_prefix(branches: Sequence[list[int]], labels: Sequence[list[int]]) -> list[int]:
    """Give the tokens that all branches begin with, up to the first one that predicts a label."""
    tokens = zip(*branches, strict=False)  # per position, up to the shortest
    predicted = zip(*(own[1:] for own in labels), strict=False)
    shared = []
    for ids, targets in zip(tokens, predicted, strict=False):
        if len(set(ids)) > 1 or set(targets) != {IGNORED}:
            break
        shared.append(ids[0])
    return shared
