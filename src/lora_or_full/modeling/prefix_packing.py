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


class Padded(NamedTuple):
    """One row per question, padded on the right.

    Attributes:
        input_ids: (B, T).
        wanted: Where logits are needed, by number among all B·T tokens, and the labels there
            (2, N).
    """

    input_ids: torch.Tensor
    wanted: torch.Tensor

    def to(self, device: torch.device) -> "Padded":
        """Move to a device."""
        return Padded(self.input_ids.to(device), self.wanted.to(device))

    def model_inputs(self, needed: torch.Tensor | None = None) -> dict[str, Any]:
        """Give the arguments of the model for the logits of the `needed` tokens (N), or of all.

        They need no mask: no real token attends to its right.
        """
        return {"input_ids": self.input_ids, **only(needed)}


class Packed(NamedTuple):
    """Blocks in one sequence.

    Attributes:
        input_ids: (1, T).
        wanted: Where logits are needed, and the labels there (2, N).
        labels: (1, T).
        position_ids: (1, T).
        block_of: Number of the block of each token (T).
        segment_of: Segment of each token (T).
        blocks: The blocks.
    """

    input_ids: torch.Tensor
    wanted: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    block_of: torch.Tensor
    segment_of: torch.Tensor
    blocks: list[Block]

    def to(self, device: torch.device) -> "Packed":
        """Move to a device."""
        blocks = [block._replace(mask=block.mask.to(device)) for block in self.blocks]
        ids, wanted, labels, positions, block_of, segment_of = (t.to(device) for t in self[:6])
        return Packed(ids, wanted, labels, positions, block_of, segment_of, blocks)

    def model_inputs(self, needed: torch.Tensor | None = None) -> dict[str, Any]:
        """Give the arguments of the model for the logits of the `needed` tokens (N), or of all."""
        return block_inputs(self.input_ids, self.position_ids, self.blocks, needed)


def only(needed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Give the argument of the model that limits logits to the `needed` tokens; none for None."""
    return {} if needed is None else {NEEDED: needed}


def tokens_before(labels: torch.Tensor) -> torch.Tensor:
    """Give the tokens that predict a label, by number among all of labels (B, T), and those labels.

    No row begins with a label.

    Returns:
        (2, N).
    """
    following = labels.flatten().roll(-1)
    needed = (following != IGNORED).nonzero().squeeze(1)
    return torch.stack([needed, following[needed]])


def block_inputs(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    blocks: list[Block],
    needed: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Give the arguments of the model for a packed sequence.

    Args:
        input_ids: (1, T).
        position_ids: (1, T).
        blocks: The blocks of the sequence.
        needed: Tokens whose logits are needed (N); None for all.
    """
    return {
        **only(needed),
        "input_ids": input_ids,
        "position_ids": position_ids,
        "blocks": blocks,
        # Four dimensions, so that transformers builds no mask of its own: `blocks` has it.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
    }


def padded(ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Padded:
    """Pad token ids and labels to one row per question."""
    longest = max(map(len, ids))
    targets = [row + [IGNORED] * (longest - len(row)) for row in labels]
    return Padded(
        torch.tensor([row + [0] * (longest - len(row)) for row in ids], dtype=torch.long),
        tokens_before(torch.tensor(targets, dtype=torch.long)),
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
    wanted = tokens_before(targets)
    return Packed(ids[None], wanted, targets[None], positions[None], block_of, segment_of, blocks)


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
