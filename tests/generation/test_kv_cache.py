"""Prompts over a shared context give the logits of separate ones, with gold answers or without."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lora_or_full.data.prompt import PromptTokens
from lora_or_full.generation import sharing
from lora_or_full.generation.kv_cache import PaddedCache, SharedPrefixCache
from lora_or_full.generation.sharing import shares_context
from lora_or_full.modeling.loading import load_model

KINDS = ["gpt2_folder", "llama_folder", "grouped_llama_folder"]
FIRST, SECOND = list(range(10, 35)), list(range(40, 46))  # contexts
PAIRS = {
    "of one context": [PromptTokens([7, 8], FIRST, [3, 4, 5]), PromptTokens([7, 8], FIRST, [9])],
    "of two": [PromptTokens([7, 8], FIRST, [3, 4, 5]), PromptTokens([7, 8], SECOND, [6, 2])],
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(request.getfixturevalue(request.param), "tiny", {})


@pytest.mark.parametrize("pair", PAIRS)
def test_bfloat16_over_a_shared_context_is_close_to_float32(
    pair: str, model: PreTrainedModel
) -> None:
    """A cache holds keys and values, which rotary positions leave in different precisions."""
    exact = sharing._trial(PaddedCache(model, PAIRS[pair]))
    with torch.autocast("cpu", torch.bfloat16):
        near = sharing._trial(SharedPrefixCache(model, PAIRS[pair], 1000, 2))
    assert not torch.equal(near, exact)
    assert (near - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("references", [[[3], [4, 5, 6]], [[], [9, 2]], [[], []]], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_new_tokens_do_not_attend_to_gold_answers(
    pair: str, references: list[list[int]], model: PreTrainedModel
) -> None:
    expected = sharing._trial(PaddedCache(model, PAIRS[pair]))
    for backend in (
        PaddedCache(model, PAIRS[pair], references),
        SharedPrefixCache(model, PAIRS[pair], 1000, 2, references),
    ):
        torch.testing.assert_close(sharing._trial(backend), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 60, 1000])
def test_both_tested_types_share_a_context(
    kind: str, length: int, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    assert shares_context(load_model(folder, "tiny", {}), length)
