"""Prompts over a shared context are read as alone; golds beside them are seen by nothing."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from qa import prefill
from qa.model import load_model
from qa.prefill import Rows, Shared, shares_context
from qa.prompt import Parts

KINDS = ["gpt2_folder", "llama_folder", "grouped_llama_folder"]
FIRST, SECOND = list(range(10, 35)), list(range(40, 46))  # contexts
PAIRS = {
    "of one context": [Parts([7, 8], FIRST, [3, 4, 5]), Parts([7, 8], FIRST, [9])],
    "of two": [Parts([7, 8], FIRST, [3, 4, 5]), Parts([7, 8], SECOND, [6, 2])],
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(request.getfixturevalue(request.param), "tiny", {})


@pytest.mark.parametrize("pair", PAIRS)
def test_bfloat16_reads_over_a_shared_context_nearly_as_float32(
    pair: str, model: PreTrainedModel
) -> None:
    """A cache holds keys and values, which rotary positions leave in unlike precision."""
    exact = prefill._trial(Rows(model, PAIRS[pair]))
    with torch.autocast("cpu", torch.bfloat16):
        near = prefill._trial(Shared(model, PAIRS[pair], 1000, 2))
    assert not torch.equal(near, exact)
    assert (near - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("golds", [[[3], [4, 5, 6]], [[], [9, 2]], [[], []]], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_what_goes_on_behind_a_prompt_sees_no_gold(
    pair: str, golds: list[list[int]], model: PreTrainedModel
) -> None:
    expected = prefill._trial(Rows(model, PAIRS[pair]))
    for way in (Rows(model, PAIRS[pair], golds), Shared(model, PAIRS[pair], 1000, 2, golds)):
        torch.testing.assert_close(prefill._trial(way), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 60, 1000])
def test_both_tested_types_share_a_context(
    kind: str, length: int, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    assert shares_context(load_model(folder, "tiny", {}), length)
