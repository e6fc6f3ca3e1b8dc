"""In which precision a run computes, where the configuration leaves that to the hardware."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear

from lora_or_full.modeling.kernels import multiply, onednn_is_faster

FROZEN = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # what autocast rounds to
WHOLE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # what all weights are kept in


def precision_of(trainer: Mapping[str, Any]) -> str:
    """The precision that `trainer` (Lightning's arguments) names; for auto, bf16-mixed where its
    accelerator computes bfloat16 natively and (a CPU) faster than float32, else 32-true."""
    if trainer["precision"] != "auto":
        return str(trainer["precision"])
    accelerator = trainer["accelerator"]
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        native = native and cpu_gain() > 1.25
    else:
        native = False
    return "bf16-mixed" if native else "32-true"


@cache
def cpu_gain() -> float:
    """How many times as fast as in float32 this processor multiplies in bfloat16.

    Its instructions do not tell: with AMX it is four times and more, with AVX-512 alone about
    twice on some processors and half on others. Measured in 0.2 s, the best of twenty turns each.
    """
    products = {
        torch.float32: multiply if onednn_is_faster() else linear,  # as a model's layers
        torch.bfloat16: linear,
    }
    factors = {dtype: torch.ones(512, 768, dtype=dtype) for dtype in products}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in products}
    for _ in range(21):  # the first turn also prepares the kernels
        for dtype, product in products.items():
            began = time.perf_counter()
            product(factors[dtype], factors[dtype])
            seconds[dtype].append(time.perf_counter() - began)
    return min(seconds[torch.float32][1:]) / min(seconds[torch.bfloat16][1:])


def frozen_dtype(wanted: str | None, precision: str, lora: Mapping[str, Any] | None) -> torch.dtype:
    """How frozen weights are kept: `wanted` 'float32', or 'auto' for what the products round to.

    DoRA takes the length of the weights as they are kept, so that only float32 is exact for it.
    """
    if wanted == "auto" and lora is not None and not lora.get("use_dora"):
        return FROZEN.get(precision, torch.float32)
    return torch.float32


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What to compute in, outside a trainer, for the numbers of a trainer of that `precision`."""
    if precision in FROZEN:
        return torch.autocast(device.type, dtype=FROZEN[precision])
    return nullcontext()


def device_of(accelerator: str) -> torch.device:
    """The device of an `accelerator` (Lightning's name) on this machine, or what there is."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What a record calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
