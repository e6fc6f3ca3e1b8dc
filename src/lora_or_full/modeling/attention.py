"""Attention over blocks: each block of a packed sequence attends by a call of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_or_full.modeling.prefix_packing import Block

# Up to this many tokens attention by matrix products is faster in bfloat16 on a CPU than the fused
# kernel, which computes at the speed of float32 there; beyond it they need too much memory. Only
# without a backward pass, and where the processor has tiles (AMX), the fused one is: two to five
# times (measured on two cores of an Intel Xeon, 1 to 260 queries, 130 to 500 keys).
MATMUL_ATTENTION_LIMIT = 512


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
    fused = not torch.is_grad_enabled() and torch.cpu._is_amx_tile_supported()
    short = value.shape[2] <= MATMUL_ATTENTION_LIMIT
    if low and short and not fused and not kwargs.get("dropout"):
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
