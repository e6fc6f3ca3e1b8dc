"""Trained weights come back from their file unchanged, or not at all."""

from pathlib import Path

import pytest
import torch

from lora_or_full.modeling import trained_weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of two weights, one of them in bfloat16 and seen sideways, in a folder to be made."""
    file = tmp_path / "checkpoints" / "best.safetensors"
    one = torch.arange(6.0).reshape(2, 3).T
    trained_weights.save(
        {"one": torch.nn.Parameter(one), "two": torch.ones(4, dtype=torch.bfloat16)}, 3, file
    )
    return file


def test_weights_come_back(file: Path) -> None:
    found = trained_weights.saved(file)
    assert found is not None
    assert torch.equal(found.weights["one"], torch.arange(6.0).reshape(2, 3).T)
    assert torch.equal(found.weights["two"], torch.ones(4, dtype=torch.bfloat16))
    assert len(found.weights) == 2
    assert found.epoch == 3


@pytest.mark.parametrize("damage", ["a byte", "the end", "all", "gone"])
def test_a_damaged_or_missing_file_gives_nothing(file: Path, damage: str) -> None:
    content = file.read_bytes()
    changed = {"a byte": content[:-9] + b"x" + content[-8:], "the end": content[:-1], "all": b""}
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(changed[damage])
    assert trained_weights.saved(file) is None
