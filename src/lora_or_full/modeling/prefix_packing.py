"""Several questions over one context in one sequence: the context once, then each question.

A context and its questions make a block. The positions of each question go on behind its context,
and a token sees, of its own block alone, the context and its own question up to itself: each is
computed just as in a sequence of its own, the context once instead of once a question. Blocks
follow one another in one sequence, with next to no padding.
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

PADDING_SEGMENT = -1  # the branch number of what fills a block up
CONTEXT_SEGMENT = 0  # the branch number of a context's tokens; its questions are 1, 2, ...
# Sequences are filled up to a multiple: oneDNN keeps code and memory for each length that it meets,
# which for bfloat16 cost an eighth of the time and a gigabyte. On a processor without AVX-512, MKL
# multiplies, which does not, and what fills up would cost a thirtieth.
PAD_MULTIPLE = 1 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16
# Up to this many tokens products of matrices attend faster in bfloat16 on a CPU than the fused
# kernel, which there computes at the speed of float32; beyond it they take too much memory.
MATMUL_ATTENTION_LIMIT = 512


class Block(NamedTuple):
    """The tokens `start` to `stop` of what the model reads (R), and which of them each may see.

    With a cache, `keys` says where in it lies what they may see (C). Each of the first `apart`
    tokens may_attend all of the block that comes before it, which needs no mask."""

    start: int
    stop: int
    mask: torch.Tensor  # (R, C), bool; without a cache (R, R)
    keys: slice | None = None
    apart: int = 0


class Padded(NamedTuple):
    """Token ids and labels (B, T): a row a question, padded on the right."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Padded":
        """The same on a device."""
        return Padded(self.input_ids.to(device), self.labels.to(device))

    def model_inputs(self, columns: torch.Tensor | None = None) -> dict[str, Any]:
        """What the model is called with for the logits of `columns` (K) or of all.

        No mask, since no real token looks to its right."""
        wanted = {} if columns is None else {"logits_to_keep": columns}
        return wanted | {"input_ids": self.input_ids}


class Packed(NamedTuple):
    """Token ids, labels and positions (1, T) of blocks, and block and branch of each token (T)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    block_of: torch.Tensor
    branch_of: torch.Tensor
    blocks: list[Block]

    def to(self, device: torch.device) -> "Packed":
        """The same on a device."""
        blocks = [block._replace(mask=block.mask.to(device)) for block in self.blocks]
        ids, labels, positions, block_of, branch_of = (t.to(device) for t in self[:5])
        return Packed(ids, labels, positions, block_of, branch_of, blocks)

    def model_inputs(self, columns: torch.Tensor | None = None) -> dict[str, Any]:
        """What the model is called with for the logits of `columns` (K) or of all."""
        return block_inputs(self.input_ids, self.position_ids, self.blocks, columns)


Sequences = Padded | Packed


def block_inputs(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    blocks: list[Block],
    columns: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What a model is called with to read ids and positions (1, T) that lie in `blocks`, for the
    logits of `columns` (K) or of all."""
    wanted = {} if columns is None else {"logits_to_keep": columns, NEEDED: columns}
    return wanted | {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "blocks": blocks,
        # Of four dimensions, so that transformers makes none: `blocks` says who may_attend whom.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
    }


def padded(ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Padded:
    """A row for each question."""
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
    """One sequence of all `branches` (a question each, with or without its answer) and their
    `labels`, equal `contexts` shared, and the words that all questions over one begin with.

    A block holds at most `length` tokens, or one branch; more branches repeat the context. They
    keep their order where contexts come in a row.
    """
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    block_of: list[int] = []
    branch_of: list[int] = []
    blocks: list[Block] = []
    for number, rows in enumerate(group_by_prefix(contexts, branches, length)):
        opening = common_prefix([branches[row] for row in rows], [labels[row] for row in rows])
        start, context = len(ids), contexts[rows[0]] + opening
        ids += context
        targets += [IGNORED] * len(context)
        positions += range(len(context))
        branch_of += [CONTEXT_SEGMENT] * len(context)
        for branch, row in enumerate(rows, CONTEXT_SEGMENT + 1):
            own = branches[row][len(opening) :]
            ids += own
            targets += labels[row][len(opening) :]
            positions += range(len(context), len(context) + len(own))
            branch_of += [branch] * len(own)
        filling = -(len(ids) - start) % PAD_MULTIPLE
        ids += [0] * filling
        targets += [IGNORED] * filling
        positions += [0] * filling
        branch_of += [PADDING_SEGMENT] * filling
        block_of += [number] * (len(ids) - start)
        owners = torch.tensor(branch_of[start:])
        alone = len(rows) == 1  # what fills up may see anything: nobody looks at it
        apart = len(owners) if alone else len(context) // PAD_MULTIPLE * PAD_MULTIPLE
        blocks.append(Block(start, len(ids), may_attend(owners, owners).tril(), apart=apart))
    return Packed(
        torch.tensor([ids]),
        torch.tensor([targets]),
        torch.tensor([positions]),
        torch.tensor(block_of),
        torch.tensor(branch_of),
        blocks,
    )


def may_attend(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Whether a token of each branch in `rows` (R) may see one of each in `columns` (C), if that
    comes before it: a bool (R, C)."""
    return (columns == CONTEXT_SEGMENT) | (rows[:, None] == columns)


def group_by_prefix(
    contexts: Sequence[list[int]], branches: Sequence[list[int]], length: int
) -> list[list[int]]:
    """The rows of each block."""
    blocks: list[list[int]] = []
    last: dict[tuple[int, ...], tuple[int, int]] = {}  # of a context: its open block, and its size
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
    """The tokens that all `branches` begin with, without those at which a label is predicted."""
    tokens = zip(*branches, strict=False)  # of each place, as far as the shortest goes
    predicted = zip(*(own[1:] for own in labels), strict=False)
    shared = []
    for here, targets in zip(tokens, predicted, strict=False):
        if len(set(here)) > 1 or set(targets) != {IGNORED}:
            break
        shared.append(here[0])
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
    """transformers' fused attention, or block by block where there are `blocks`.

    query (B, heads, T, width), key and value (B, key heads, T, width); gives (B, T, heads, width).
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
    for (*_, mask, _, apart), size, q, (k, v) in zip(blocks, sizes, queries, seen, strict=True):
        if apart:
            own = (part if apart == size else part[:, :, :apart] for part in (q, k, v))
            q_own, k_own, v_own = own
            triangle = mask[:apart, :apart]
            parts.append(_attend(module, q_own, k_own, v_own, triangle, True, **kwargs))
        if apart < size:
            rest = q[:, :, apart:] if apart else q
            parts.append(_attend(module, rest, k, v, mask[apart:], False, **kwargs))
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
    """What rows (R) attend to in columns (C) by `mask` (R, C): (B, R, heads, width).

    `causal` says that the mask is the triangle, of which the fused kernel computes only half."""
    # Positions by rotation may leave queries and keys, but not values, in float32.
    low = value.device.type == "cpu" and value.dtype == torch.bfloat16
    if low and value.shape[2] <= MATMUL_ATTENTION_LIMIT and not kwargs.get("dropout"):
        return _products(query, key, value, mask, kwargs["scaling"])
    kwargs = kwargs | {"attention_mask": None if causal else mask[None, None], "is_causal": causal}
    return sdpa_attention_forward(module, query, key, value, **kwargs)[0]


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The same as products of matrices, in the precision of `value`."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = (query * scaling) @ key.transpose(2, 3)  # (B, heads, R, C)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


ATTENTION = "by_block"  # the name that a model's `set_attn_implementation` knows it by
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
