"""Replayed steps and tokens equal those that Python launches (on a GPU: pytest -m cuda)."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import add_lora
from repeater import Repeater
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from lora_or_full.data.prompt import IGNORED, PromptTokens
from lora_or_full.generation.decoding import greedy
from lora_or_full.modeling.cuda_graphs import GraphedLoss, Recorder
from lora_or_full.modeling.loading import load_model
from lora_or_full.modeling.packed_rows import PackedRows, in_rows


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def recorder(device: torch.device) -> Any:
    return Recorder() if device.type == "cuda" else Repeater()


def batches(device: torch.device) -> list[PackedRows]:
    """Batches of one and of several rows, each shape more than once."""
    rng = random.Random(0)

    def ids(size: int) -> list[int]:
        return [rng.randrange(9, 300) for _ in range(size)]

    made = []
    for count in (2, 12, 3, 12, 2):
        contexts, branches = [ids(90) for _ in range(count)], [ids(8) for _ in range(count)]
        labels = [[IGNORED] * 5 + branch[5:] for branch in branches]
        made.append(in_rows(contexts, branches, labels, 200).to(device))
    return made


def loss_of(model: Any) -> Callable[[PackedRows], Any]:
    def loss_sum(batch: PackedRows) -> Any:
        needed, targets = batch.wanted
        logits = model(**batch.model_inputs(needed), use_cache=False).logits[0]
        loss = cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        return loss, (targets != IGNORED).sum()

    return loss_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_step_has_the_loss_and_gradients_of_a_launched_one(
    dtype: torch.dtype, device: torch.device, gpt2_folder: Path
) -> None:
    """With the same dropout; also where a shape is recorded late, and where gradients add up."""
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": ["c_attn", "c_fc"]}
    model = add_lora(load_model(gpt2_folder, "tiny", {}), lora).to(device).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.1)

    def results(loss_sum: Any) -> list[Any]:
        found = []
        for number, batch in enumerate(batches(device)):
            if number != 4:  # the last is added to the one before
                model.zero_grad()
            torch.manual_seed(number)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss, count = loss_sum(batch)
            (loss * 0.5).backward()
            gradients = torch.cat([w.grad.flatten() for w in weights if w.grad is not None])
            found.append((loss.item(), count.item(), gradients.clone()))
        return found

    expected = results(loss_of(model))
    found = results(GraphedLoss(loss_of(model), weights, recorder(device)))
    for (loss, count, gradients), (other, counted, replayed) in zip(expected, found, strict=True):
        assert other == pytest.approx(loss, rel=1e-5 if dtype == torch.float32 else 1e-2)
        assert counted == count
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert (replayed - gradients).norm() < tolerance * gradients.norm()


def test_each_shape_is_recorded_once(
    device: torch.device, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(gpt2_folder, "tiny", {}).to(device).train()
    model.get_input_embeddings().sparse = False
    graphed = GraphedLoss(loss_of(model), list(model.parameters()), recorder(device))
    recorded: list[Any] = []
    original = graphed.recorder.record

    def record(work: Any) -> Any:
        recorded.append(work)
        return original(work)

    monkeypatch.setattr(graphed.recorder, "record", record)
    made = batches(device)
    for batch in made:
        graphed(batch)[0].backward()
    shapes = {(batch.tokens.shape, batch.wanted.shape) for batch in made}
    assert len(recorded) == 2 * len(shapes) < 2 * len(made)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["gpt2_folder", "grouped_llama_folder"])
def test_replayed_tokens_are_those_of_the_cpu(
    kind: str, request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng = random.Random(1)
    contexts = [[rng.randrange(9, 300) for _ in range(size)] for size in (30, 120, 200)]
    for count in (1, 9, 40):  # each its own shapes
        prompts = [
            PromptTokens([7, 8], rng.choice(contexts), [rng.randrange(9, 300) for _ in range(4)])
            for _ in range(count)
        ]
        references = [[rng.randrange(9, 300) for _ in range(3)] for _ in range(count)]
        model = load_model(request.getfixturevalue(kind), "tiny", {})
        expected = greedy(model, tokenizer, prompts, [0, 5], 12, 1000, references)
        for graphs in (False, True):
            answers = greedy(
                model.cuda(), tokenizer, prompts, [0, 5], 12, 1000, references, cuda_graphs=graphs
            )
            assert [a.text for a in answers] == [a.text for a in expected]
            for one, other in zip(answers, expected, strict=True):
                assert one.log_probability == pytest.approx(other.log_probability, rel=1e-3)
                assert one.reference_log_probability == pytest.approx(
                    other.reference_log_probability, rel=1e-3
                )
