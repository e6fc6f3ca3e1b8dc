"""Faster kernels that compute the same, for models of torch's and transformers' usual layers."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from lora_or_full.errors import UserError, first_line

NEEDED = "needed"  # argument of a model: numbers (N) among all B·T tokens whose logits are needed
CPU_INFO = Path("/proc/cpuinfo")
# oneDNN keeps 1,024 compiled products, one for each shape: 0.3 GB after 80 steps of LoRA on all
# layers of SmolLM2. With 512 GPT-2 is as fast (40 steps of 14 lengths), with 256 5 % slower.
# It reads this when the first product is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")


def speed_up(model: PreTrainedModel) -> None:
    """Replace kernels of a model by faster ones that compute the same."""
    for layer in list(model.modules()):
        for name, child in layer.named_children():
            if isinstance(child, NewGELUActivation):  # the tanh form: one kernel instead of seven
                setattr(layer, name, nn.GELU(approximate="tanh"))
    if onednn_is_faster():
        for layer in model.modules():
            if type(layer) in ONEDNN_LAYERS:
                layer.__class__ = ONEDNN_LAYERS[type(layer)]  # others may hold this layer
    _compute_what_is_needed(model)


def speed_up_full(model: PreTrainedModel) -> None:
    """Speed up a model in which every weight is trained, on a CPU.

    If output layer and embedding share weights, the embedding's gradient becomes sparse: that of
    the few tokens that were read is added in place, not written out for the whole vocabulary. (A
    GPU would add up sparse ones in an order that differs from time to time.)
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, nn.Embedding) and output is not None:
        embedding.sparse = output.weight is embedding.weight


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each layer for the backward pass, which computes the rest again.

    (Chen et al., 2016, arXiv 1604.06174)

    Raises:
        UserError: The model's type can't do it.
    """
    # Its name from transformers 5.12 on, and the one before.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"model.gradient_checkpointing=true: {first_line(error)}") from None


def speed_up_dropout(model: nn.Module) -> None:
    """Let dropout layers draw their masks in a third of the time (measured on a CPU)."""
    for layer in model.modules():
        if type(layer) is nn.Dropout and layer.p > 0:  # torch draws no mask for zero either
            layer.__class__ = _Dropout


def _compute_what_is_needed(model: PreTrainedModel) -> None:
    """Let the last layer's MLP and the output layer compute only the NEEDED tokens of a call.

    No attention follows that MLP, so the other tokens are not read: they get zeros. A model whose
    layers take no further arguments computes the whole MLP.
    """
    decoder = model.get_decoder()
    layers_take_it = all(
        any(p.kind is p.VAR_KEYWORD for p in inspect.signature(part.forward).parameters.values())
        for part in (model, decoder)
    )
    of_call: torch.Tensor | None = None

    def keep(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal of_call
        of_call = kwargs.get(NEEDED)
        return args, kwargs if layers_take_it else {k: kwargs[k] for k in kwargs if k != NEEDED}

    def choose(decoder: nn.Module, args: Any, output: Any) -> None:
        if of_call is not None:
            states = output.last_hidden_state.flatten(0, 1)  # (B·T, width)
            output.last_hidden_state = states.index_select(0, of_call)[None]

    model.register_forward_pre_hook(keep, with_kwargs=True)
    decoder.register_forward_hook(choose)
    with_mlp = [
        (layer, child)
        for layer in model.modules()
        for name, child in layer.named_children()
        if name == "mlp"
    ]
    if not with_mlp:
        return
    last, mlp = with_mlp[-1]
    columns: torch.Tensor | None = None
    shape = torch.Size()

    def note(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal columns
        columns = kwargs.get(NEEDED)

    def take(mlp: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        nonlocal shape
        shape = args[0].shape  # (B, T, width)
        return None if columns is None else (args[0].flatten(0, 1).index_select(0, columns)[None],)

    def put(mlp: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if columns is None:
            return None
        zeros = output.new_zeros(shape).flatten(0, 1)  # (B·T, width)
        return zeros.index_copy(0, columns, output[0]).view(shape)

    last.register_forward_pre_hook(note, with_kwargs=True)
    mlp.register_forward_pre_hook(take)
    mlp.register_forward_hook(put)


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL, torch's choice on x86.

    On AMD processors MKL does not use AVX-512: oneDNN takes half the time (measured on two cores).
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and CPU_INFO.is_file()
        and "AuthenticAMD" in CPU_INFO.read_text()
    )


class _Dropout(nn.Dropout):
    """Dropout that takes four masks from each random number, where torch takes one.

    p is rounded to a multiple of 1/65,536, and the scale is exact for it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.inplace or x.device.type != "cpu":
            return super().forward(x)
        zeros = min(round(self.p * 2**16), 2**16 - 1)
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = numbers.view(torch.int16)[: x.numel()].view(x.shape) >= zeros - 2**15
        return _Kept.apply(x, kept, 2**16 / (2**16 - zeros))


class _Kept(torch.autograd.Function):
    """x where `kept`, times a scale; one byte a value is kept for the backward pass, not four.

    With LoRA on all linear layers the masks of dropout were 38 % of all activations.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return x * kept.to(x.dtype).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return gradients[0] * kept.to(gradients[0].dtype).mul_(ctx.scale), None, None


class _Product(torch.autograd.Function):
    """x (M, in) times a weight (out, in), or (in, out) if `transposed`, plus a bias."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
    ) -> torch.Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return multiply(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()  # (M, out)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = multiply(gradient, weight if ctx.transposed else weight.t())
        if ctx.needs_input_grad[1]:
            left, right = (x, gradient) if ctx.transposed else (gradient, x)
            of_weight = multiply(left.t(), right.t())  # of the weight's own shape
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_x, of_weight, of_bias, None


def multiply(
    left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply left (M, in) by right (out, in) transposed, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def _applies(x: torch.Tensor, weight: torch.Tensor) -> bool:
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return plain and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


class _ByOneDNN(nn.Module):
    weight: torch.Tensor
    transposed: bool  # whether the weight is (in, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _applies(x, self.weight):
            return super().forward(x)
        flat = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.transposed)
        return flat.view(*x.shape[:-1], -1)


class _Linear(_ByOneDNN, nn.Linear):
    transposed = False


class _Conv1D(_ByOneDNN, Conv1D):
    transposed = True


ONEDNN_LAYERS = {nn.Linear: _Linear, Conv1D: _Conv1D}
