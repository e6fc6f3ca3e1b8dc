"""bench/gpu.py: on a GPU its claims hold (pytest -m cuda); elsewhere its parts run."""

from pathlib import Path

import gpu
import pytest
import torch
from material import BUILTIN

from lora_or_full.data.squad import check, read_files
from lora_or_full.modeling.loading import load_tokenizer

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


def table(name: str, device: str, folder: Path) -> list[gpu.Row]:
    """The rows of a part."""
    head, *rows = gpu.PARTS[name](gpu.Place(torch.device(device), folder))
    assert rows
    assert all(len(row) == len(head) for row in rows)
    return rows


@pytest.mark.parametrize("device", [CUDA, "cpu"])
@pytest.mark.parametrize("name", ["gradients", "answers"])
def test_a_device_computes_what_the_cpu_does(name: str, device: str, tmp_path: Path) -> None:
    assert [row for row in table(name, device, tmp_path) if gpu.verdict(False) in row] == []


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", ["precisions", "resumed", "fit"])
def test_runs_on_a_device_end_and_fit_as_they_should(
    name: str, device: str, tmp_path: Path
) -> None:
    assert [row for row in table(name, device, tmp_path) if gpu.verdict(False) in row] == []


def test_a_wrong_gradient_is_told() -> None:
    right = torch.tensor([1.0, 2.0])
    assert gpu.relative(right, right) == 0
    assert gpu.relative(right * 1.001, right) > gpu.TOLERANCE
    assert gpu.relative(right, torch.zeros(2)) > gpu.TOLERANCE


def test_the_questions_have_the_lengths_of_squad(tmp_path: Path) -> None:
    questions, counts = check(read_files([gpu.questions(tmp_path, 30)]), "refuse", "refuse")
    tokenizer = load_tokenizer(BUILTIN)
    lengths = [len(ids) for ids in tokenizer([q.context for q in questions[::5]])["input_ids"]]
    assert len(questions) == 150
    assert not any(counts.values())
    assert 130 < sum(lengths) / len(lengths) < 185
