"""The file of trained weights of a run's best epoch: safetensors with a hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_or_full.runs import store

DIGEST = "sha256"  # key of the hash in the file's metadata


def save(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write weights by their names, atomically."""
    held = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with store.atomic_write(file) as made:
        save_file(held, made, metadata={DIGEST: _digest(held)})


def saved(file: Path) -> dict[str, torch.Tensor] | None:
    """Read the weights of a file of `save`; None if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            noted = (content.metadata() or {}).get(DIGEST)
    except (FileNotFoundError, SafetensorError):
        return None
    return weights if noted == _digest(weights) else None


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Hash names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
