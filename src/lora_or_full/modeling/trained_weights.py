"""The file of trained weights that a run keeps of its best epoch: safetensors, with their hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_or_full.runs import store

DIGEST = "sha256"  # in the file: what `saved` checks


def save(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write `weights` by their names, whole or not at all."""
    held = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with store.atomic_write(file) as made:
        save_file(held, made, metadata={DIGEST: _digest(held)})


def saved(file: Path) -> dict[str, torch.Tensor] | None:
    """The weights in a file of `save`; None if it is gone or damaged."""
    try:
        with safe_open(file, "pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            noted = (content.metadata() or {}).get(DIGEST)
    except (FileNotFoundError, SafetensorError):
        return None
    return weights if noted == _digest(weights) else None


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
