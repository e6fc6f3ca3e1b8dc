"""What a training step will need of a GPU's memory, and the refusal of what does not fit."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from lora_or_full.config.schema import Config
from lora_or_full.errors import UserError, first_line
from lora_or_full.modeling.precision import STORED, autocast_for, device_name
from lora_or_full.training.distributed import gathered
from lora_or_full.training.plugins import state_share

# What a step allocates besides its tensors: working memory of kernels, and blocks of memory that
# are larger than asked for (GPT-2 with LoRA and full, 5 and 64 questions a step, on an H200).
WORKING_BYTES, ROUNDING = 300e6, 1.05
ACCURACY = 0.2  # largest relative error of an estimate
LOOKED_AT = 200  # first micro-batches, of which the largest is taken


class Model(Protocol):
    """What is needed of the LightningModule besides Lightning's own."""

    config: Config
    can_record: bool
    loss_sum: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
    answers: Callable[[Any], Any]


def largest_batch(data: L.LightningDataModule) -> dict[str, Any]:
    """Give the largest of the first micro-batches, by the tokens that are computed."""
    first = itertools.islice(data.train_dataloader(), LOOKED_AT)
    return max(first, key=lambda batch: batch["sequences"].input_ids.numel())


class _Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, `held` and those that are made within it."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()
        for tensor in held:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen[storage] = size
            weakref.finalize(storage, self._free, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return output


class _Step(torch.nn.Module):
    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, sequences: Any, precision: str) -> None:
        """Compute loss and gradients, where `functional_call` has replaced the weights."""
        with autocast_for(precision, torch.device("cpu")):
            loss, _ = cast(Model, self.module).loss_sum(sequences)
        loss.backward()


def tensor_bytes(module: L.LightningModule, sequences: Any, precision: str) -> int:
    """Give the bytes of the tensors of a training step, at its peak.

    The step is carried out on tensors without data, which takes a second and no memory.

    Args:
        module: The model, on any device.
        sequences: What it is trained on.
        precision: Lightning's.
    """
    # Here, since it takes a second, and only GPUs need it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    step, fake, dtype = _Step(module), FakeTensorMode(), STORED.get(precision)
    held: dict[str, torch.Tensor] = {}
    for name, value in itertools.chain(step.named_parameters(), step.named_buffers()):
        stored: torch.Tensor = fake.from_tensor(value)
        if dtype is not None and value.is_floating_point():
            stored = stored.to(dtype).detach().requires_grad_(value.requires_grad)
        held[name] = stored
    sequences = tree_map_only(torch.Tensor, fake.from_tensor, sequences)
    training, trained = module.training, [w for w in held.values() if w.requires_grad]
    tensors = [leaf for leaf in tree_leaves(sequences) if isinstance(leaf, torch.Tensor)]
    peak = _Peak([*held.values(), *tensors])
    module.train()
    with fake, peak:
        torch.func.functional_call(step, held, (sequences, precision))
    module.train(training)
    state = state_share(cast(Model, module).config) * sum(weight.nbytes for weight in trained)
    return peak.peak + round(state)


def needed_bytes(module: L.LightningModule, data: L.LightningDataModule, world_size: int) -> int:
    """Estimate the memory that training needs on each GPU."""
    config, sequences = cast(Model, module).config, largest_batch(data)["sequences"]
    found = tensor_bytes(module, sequences, config.trainer.precision)
    # Recorded steps and sums over devices keep gradients once more.
    if cast(Model, module).can_record or world_size > 1:
        found += sum(weight.nbytes for weight in module.parameters() if weight.requires_grad)
    return round(ROUNDING * found + WORKING_BYTES)


def check_memory(
    module: L.LightningModule, data: L.LightningDataModule, trainer: L.Trainer
) -> tuple[int, int] | None:
    """Refuse a training that does not fit into the memory of its GPU.

    Returns:
        The bytes that it needs and those that are free; None elsewhere than on CUDA.

    Raises:
        UserError: It does not fit on one of the devices, even by an estimate that is too high.
    """
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    needed, free = (
        needed_bytes(module, data, trainer.world_size),
        torch.cuda.mem_get_info(device)[0],
    )
    for most, least, name in gathered((needed, free, device_name(device))):
        if most > (1 + ACCURACY) * least:
            raise UserError(
                f"Training needs about {most / 1e9:.1f} GB of memory, and {name} has "
                f"{least / 1e9:.1f} GB free. {_less(cast(Model, module).config)}"
            )
    return needed, free


@contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """Say which keys help where a GPU has not enough memory.

    Raises:
        UserError: The memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{first_line(error)} {_less(config)}") from None


def _less(config: Config) -> str:
    parts, size = config.trainer.accumulate_grad_batches, config.batch_size
    ways = [f"trainer.accumulate_grad_batches={min(2 * parts, size)}"] * (parts < size)
    ways += ["model.gradient_checkpointing=true"] * (not config.model.gradient_checkpointing)
    ways += ["trainer.precision=bf16-mixed"] * (config.trainer.precision == "32-true")
    ways += ["a mode with an adapter"] * (config.adapter is None)
    return f"It needs less with {', '.join([*ways, 'a smaller max_length'])}, or a smaller model."
