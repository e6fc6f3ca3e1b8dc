"""Prefix packing: several questions over one context in one sequence, the context only once.

A context and its questions make a block. The positions of each question continue after its context.
A token attends to the context and to its own question up to itself, in its own block only. So each
question is computed as in a sequence of its own, but the context once per block instead of once per
question. Blocks follow one another in one sequence, with almost no padding. (Derived here;
Hydragen, Juravsky et al., 2024, arXiv 2402.05099, shares prefixes in decoding.)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_or_full.data.prompt import IGNORED
from lora_or_full.modeling.kernels import NEEDED

PADDING_SEGMENT = -1  # segment of the padding of a block
CONTEXT_SEGMENT = 0  # segment of a context; its questions are 1, 2, ...
# Blocks are padded to a multiple: oneDNN compiles and keeps a kernel for each length, which for
# bfloat16 took an eighth of the time and a gigabyte (measured on two cores with AVX-512). Without
# AVX-512 MKL multiplies, which does not, and padding would take a thirtieth of the time.
PAD_MULTIPLE = 1 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16
# Up to this many tokens attention by matrix products is faster in bfloat16 on a CPU than the fused
# kernel, which computes at the speed of float32 there; beyond it they need too much memory.
MATMUL_ATTENTION_LIMIT = 512


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
    """Token ids and labels (B, T): one row per question, padded on the right."""

    input_ids: torch.Tensor
    labels: torch.Tensor

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

    def model_inputs(self, columns: torch.Tensor | None = None) -> dict[str, Any]:
        """Give the arguments of the model for the logits of `columns` (K), or of all."""
        return block_inputs(self.input_ids, self.position_ids, self.blocks, columns)


Sequences = Padded | Packed


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
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    block_of: list[int] = []
    segment_of: list[int] = []
    blocks: list[Block] = []
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
        block_of += [number] * (len(ids) - start)
        owners = torch.tensor(segment_of[start:])
        alone = len(rows) == 1  # padding may attend to anything: nothing attends to it
        causal_rows = len(owners) if alone else len(context) // PAD_MULTIPLE * PAD_MULTIPLE
        blocks.append(
            Block(start, len(ids), may_attend(owners, owners).tril(), causal_rows=causal_rows)
        )
    return Packed(
        torch.tensor([ids]),
        torch.tensor([targets]),
        torch.tensor([positions]),
        torch.tensor(block_of),
        torch.tensor(segment_of),
        blocks,
    )


def may_attend(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Give whether tokens may attend to earlier ones, by their segments.

    Args:
        rows: Segments of the tokens (R).
        columns: Segments of the earlier tokens (C).

    Returns:
        A bool (R, C).
    """
    return (columns == CONTEXT_SEGMENT) | (rows[:, None] == columns)


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


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    blocks: Sequence[Block] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by transformers' fused kernel, or block by block.

    Args:
        module: The attention layer.
        query: (B, heads, T, width).
        key: (B, key heads, T, width).
        value: (B, key heads, T, width).
        attention_mask: Mask without blocks.
        blocks: Blocks of the sequence; None for the fused kernel.
        kwargs: Further arguments of transformers.

    Returns:
        (B, T, heads, width), and no weights.
    """
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = []
    # Split, not sliced: a slice's gradient would be written out for the whole sequence.
    sizes = [block.stop - block.start for block in blocks]
    queries = query.split(sizes, 2)
    seen = (
        zip(key.split(sizes, 2), value.split(sizes, 2), strict=True)
        if blocks[0].keys is None
        else ((key[:, :, block.keys], value[:, :, block.keys]) for block in blocks)
    )
    for (*_, mask, _, causal_rows), size, q, (k, v) in zip(
        blocks, sizes, queries, seen, strict=True
    ):
        if causal_rows:
            own = (part if causal_rows == size else part[:, :, :causal_rows] for part in (q, k, v))
            q_own, k_own, v_own = own
            triangle = mask[:causal_rows, :causal_rows]
            parts.append(_attend(module, q_own, k_own, v_own, triangle, True, **kwargs))
        if causal_rows < size:
            rest = q[:, :, causal_rows:] if causal_rows else q
            parts.append(_attend(module, rest, k, v, mask[causal_rows:], False, **kwargs))
    return torch.cat(parts, dim=1), None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    causal: bool,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend from rows (R) to columns (C) by a mask (R, C): (B, R, heads, width).

    With `causal` the mask is the triangle, of which the fused kernel computes only half.
    """
    # Rotary positions may leave queries and keys, but not values, in float32.
    low = value.device.type == "cpu" and value.dtype == torch.bfloat16
    if low and value.shape[2] <= MATMUL_ATTENTION_LIMIT and not kwargs.get("dropout"):
        return _products(query, key, value, mask, kwargs["scaling"])
    kwargs = kwargs | {"attention_mask": None if causal else mask[None, None], "is_causal": causal}
    return sdpa_attention_forward(module, query, key, value, **kwargs)[0]


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attend by matrix products, in the precision of `value`."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = (query * scaling) @ key.transpose(2, 3)  # (B, heads, R, C)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


ATTENTION = "by_block"  # its name for a model's `set_attn_implementation`
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
