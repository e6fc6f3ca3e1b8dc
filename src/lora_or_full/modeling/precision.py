"""Precision: what `auto` stands for on this hardware, and how frozen weights are stored."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lora_or_full.config.schema import Config, TrainerConfig
from lora_or_full.modeling.kernels import multiply, onednn_is_faster

FROZEN = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # what autocast rounds to
# By the least compute capability: from Ampere on; Volta and Turing (V100, T4, RTX 20xx).
CUDA_PRECISIONS = {(8, 0): "bf16-mixed", (7, 0): "16-mixed"}
# On a CPU a model below this hidden size gains little by bfloat16: the built-in one, of 192, became
# 5 % faster and needed 1.3 times the memory (on two cores with AVX-512).
NARROW = 512
NVIDIA = Path("/proc/driver/nvidia/version")
STORED = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # of all weights
# Adapters that use frozen weights in products alone; others, such as HiRA, compute with them.
IN_PRODUCTS = ("peft.LoraConfig", "peft.IA3Config", "peft.LNTuningConfig")


def resolve_precision(trainer: TrainerConfig, width: int) -> str:
    """Choose the precision that the trainer will have on this hardware.

    Args:
        trainer: Its arguments; with `precision=auto` the hardware decides.
        width: Hidden size of the model.

    Returns:
        The given precision if it is not auto, but for 16-mixed on a CPU, where Lightning takes
        bf16-mixed. Else bf16-mixed where the accelerator computes bfloat16 natively and, on a CPU,
        where that pays; 16-mixed on GPUs that have fast units for float16 only; else 32-true.
    """
    accelerator = trainer.accelerator
    if trainer.precision != "auto":
        on_cpu = device_of(accelerator).type == "cpu"
        return "bf16-mixed" if on_cpu and trainer.precision == "16-mixed" else trainer.precision
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        return next((p for least, p in CUDA_PRECISIONS.items() if capability >= least), "32-true")
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        native = native and width >= NARROW and cpu_gain() > 1.25
    else:
        native = False
    return "bf16-mixed" if native else "32-true"


@cache
def cpu_gain() -> float:
    """Speed of bfloat16 matrix products on this processor, relative to float32.

    The instruction set alone does not say: with AMX it is four and more, with AVX-512 about two on
    some processors and a half on others. This measures it in 0.2 s: the best of twenty products.
    """
    products = {
        torch.float32: multiply if onednn_is_faster() else linear,  # as a model's layers do
        torch.bfloat16: linear,
    }
    factors = {dtype: torch.ones(512, 768, dtype=dtype) for dtype in products}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in products}
    for _ in range(21):  # the first product also prepares the kernels
        for dtype, product in products.items():
            began = time.perf_counter()
            product(factors[dtype], factors[dtype])
            seconds[dtype].append(time.perf_counter() - began)
    return min(seconds[torch.float32][1:]) / min(seconds[torch.bfloat16][1:])


def frozen_dtype(config: Config) -> torch.dtype:
    """Choose the dtype of frozen weights.

    With `frozen_dtype=auto` it is what autocast rounds them to anyway, if the adapter is known to
    use them in products alone. DoRA uses the norm of the stored weights.
    """
    adapter = config.adapter
    exact = adapter and adapter.target in IN_PRODUCTS and not adapter.arguments().get("use_dora")
    if config.frozen_dtype == "auto" and exact:
        return FROZEN.get(config.trainer.precision, torch.float32)
    return torch.float32


def store_weights(model: nn.Module, frozen: torch.dtype) -> None:
    """Store the frozen weights of matrix products in `frozen`, and all others in float32.

    Under autocast to `frozen` results stay the same, bit for bit, since the products round these
    weights anyway. Embeddings and norms, which autocast leaves in float32, stay so: an output layer
    that shares its weights with the embedding gets its own. So do a mixture's experts, which
    transformers multiplies outside of autocast. With float32 nothing is copied that is so already.
    """
    if frozen == torch.float32:
        model.float()
        return
    kept = set()
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, Conv1D)):
            for name, weight in list(layer.named_parameters(recurse=False)):
                if not weight.requires_grad:
                    own = nn.Parameter(weight.to(frozen, copy=True), requires_grad=False)
                    setattr(layer, name, own)
                    kept.add(own)
    for weight in set(model.parameters()) - kept:
        weight.data = weight.data.to(torch.float32, copy=True)  # out of the model's file


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32, whatever its weights are stored in, one layer at a time."""
    stored: dict[nn.Parameter, torch.Tensor] = {}

    def widen(layer: nn.Module, args: Any) -> None:
        for weight in layer.parameters(recurse=False):
            if weight.dtype in (torch.bfloat16, torch.float16):
                stored[weight] = weight.data
                weight.data = weight.data.float()

    def restore(layer: nn.Module, args: Any, output: Any) -> None:
        for weight in layer.parameters(recurse=False):
            if weight in stored:
                weight.data = stored.pop(weight)

    hooks = []
    for layer in model.modules():
        hooks.append(layer.register_forward_pre_hook(widen, prepend=True))
        hooks.append(layer.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Give the context in which a trainer of this precision computes, for use outside a trainer."""
    if precision in FROZEN:
        return torch.autocast(device.type, dtype=FROZEN[precision])
    return nullcontext()


def device_of(accelerator: str) -> torch.device:
    """Give the device of Lightning's accelerator on this machine, or the CPU if it is missing."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def warn_of_unused_gpu() -> None:
    """Warn if the machine has an NVIDIA card that torch can't use: the CPU will be used instead."""
    if torch.cuda.is_available() or not NVIDIA.exists():
        return
    why = "this torch is built without CUDA" if torch.version.cuda is None else (
        f"CUDA {torch.version.cuda} of this torch can't use its driver, or the card is too old"
    )  # fmt: skip
    print(
        f"Warning: the NVIDIA card of this machine is not used: {why}. The run is on "
        f"{device_of('auto').type}; trainer.accelerator=cpu says that this is meant.",
        file=sys.stderr,
    )


def device_name(device: torch.device) -> str:
    """Name of a device in records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
