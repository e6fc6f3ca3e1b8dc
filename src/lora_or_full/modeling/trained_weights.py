"""The file of trained weights of a run's best epoch: safetensors with its number and a hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_or_full.runs import store

DIGEST, EPOCH = "sha256", "epoch"  # keys in the file's metadata


class Saved(NamedTuple):
    """Weights by their names, and the epoch after which they were saved, from 1."""

    weights: dict[str, torch.Tensor]
    epoch: int


def save(weights: Mapping[str, torch.Tensor], epoch: int, file: Path) -> None:
    """Write weights by their names, atomically."""
    held = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with store.atomic_write(file) as made:
        save_file(held, made, metadata={DIGEST: _digest(held), EPOCH: str(epoch)})


def saved(file: Path) -> Saved | None:
    """Read a file of `save`; None if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            noted = content.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return None
    intact = noted.get(DIGEST) == _digest(weights) and EPOCH in noted
    return Saved(weights, int(noted[EPOCH])) if intact else None


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Hash names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
