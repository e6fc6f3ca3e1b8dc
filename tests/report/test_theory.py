"""Parameters and arithmetic from shapes."""

import pytest

from lora_or_full.report.theory import lora_layers, total

GPT2 = {
    name: shape
    for n in range(12)
    for name, shape in {
        f"model.h.{n}.attn.c_attn.lora_A.default.weight": [8, 768],
        f"model.h.{n}.attn.c_attn.lora_B.default.weight": [2304, 8],
    }.items()
}


def test_lora_on_gpt2_has_the_known_weights() -> None:
    [layer] = lora_layers(GPT2)
    assert (layer.name, layer.count, layer.inputs, layer.outputs, layer.rank) == (
        "c_attn", 12, 768, 2304, 8,
    )  # fmt: skip
    assert total([layer]) == 294_912
    assert layer.share == pytest.approx(1.3889, abs=1e-4)  # and not r/d
    assert layer.claimed == pytest.approx(1.0417, abs=1e-4)


def test_layers_of_other_shapes_stand_apart_and_full_weights_are_none() -> None:
    shapes = {
        "a.q_proj.lora_A.default.weight": [4, 64], "a.q_proj.lora_B.default.weight": [64, 4],
        "a.k_proj.lora_A.default.weight": [4, 64], "a.k_proj.lora_B.default.weight": [16, 4],
    }  # fmt: skip
    assert [(x.name, x.outputs) for x in lora_layers(shapes)] == [("q_proj", 64), ("k_proj", 16)]
    assert lora_layers({"h.0.c_attn.weight": [768, 2304], "ln.bias": [768]}) == []


def test_lora_saves_the_gradients_of_weights_and_nothing_else() -> None:
    [layer] = lora_layers(GPT2)
    own, whole = layer.operations(lora=True), layer.operations(lora=False)
    assert own["forward"] > whole["forward"] == 2 * 768 * 2304
    assert own["backward, weights"] / whole["backward, weights"] == pytest.approx(
        0.0138889, abs=1e-6
    )
    products = [name for name in whole if "step" not in name]
    assert 2 / 3 < sum(own[n] for n in products) / sum(whole[n] for n in products) < 0.7
