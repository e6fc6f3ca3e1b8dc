"""Faster kernels: the same values and gradients, on every kind of processor."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import add_lora
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lora_or_full.modeling import kernels
from lora_or_full.modeling.loading import load_model
from lora_or_full.modeling.precision import store_weights

onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)
LAYERS = {
    "linear": lambda: nn.Linear(6, 10),
    "linear without bias": lambda: nn.Linear(6, 10, bias=False),
    "conv1d": lambda: Conv1D(10, 6),
}


def results(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of a layer, and the gradients of x and its weights."""
    x = x.clone().requires_grad_()
    output = layer(x)
    (output.sin() * torch.arange(10.0)).sum().backward()
    return {
        "output": output.detach(),
        "x": x.grad,
        **{name: p.grad for name, p in layer.named_parameters() if p.requires_grad},
    }


@onednn
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 6), (7, 6), (1, 1, 6), (1, 0, 6)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_products_by_onednn_equal_those_of_torch(
    kind: str, shape: tuple[int, ...], frozen: bool
) -> None:
    torch.manual_seed(0)
    plain = LAYERS[kind]()
    plain.requires_grad_(not frozen)
    own = copy.deepcopy(plain)
    own.__class__ = kernels.ONEDNN_LAYERS[type(own)]
    x = torch.randn(shape)
    expected, given = results(plain, x), results(own, x)
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(given[name], value, atol=1e-5), name
        assert given[name].shape == value.shape


@pytest.mark.parametrize("kind", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("tokens", [[2, 5, 8, 11, 17], [8], []], ids=str)
def test_the_last_mlp_and_the_output_layer_compute_only_the_needed_tokens(
    tokens: list[int], kind: str, request: pytest.FixtureRequest
) -> None:
    model = load_model(request.getfixturevalue(kind), "tiny", {})
    mlps = [layer for name, layer in model.named_modules() if name.endswith(".mlp")]
    assert len(mlps) > 1
    seen: list[int] = []
    for mlp in mlps:  # what its first product reads
        next(iter(mlp.children())).register_forward_pre_hook(
            lambda layer, args: seen.append(args[0].shape[1])
        )
    ids, needed = torch.arange(18).view(2, 9), torch.tensor(tokens, dtype=torch.long)
    results = []
    for named in ({}, {kernels.NEEDED: needed}, {}):
        seen.clear()
        model.zero_grad()
        logits = model(input_ids=ids, **named).logits
        logits = logits[0] if named else logits.flatten(0, 1)[needed]  # (tokens, vocabulary)
        logits.sin().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
        assert seen == [9] * (len(mlps) - 1) + [len(tokens) if named else 9]
    for logits, gradients in results[1:]:
        assert torch.allclose(logits, results[0][0], atol=1e-5)
        assert gradients.keys() == results[0][1].keys()
        for name, gradient in gradients.items():
            expected = results[0][1][name]
            assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def test_a_model_without_further_arguments_gives_the_needed_logits_too(gpt2_folder: str) -> None:
    class Plain(GPT2LMHeadModel):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return super().forward(input_ids=input_ids)

    model = Plain.from_pretrained(gpt2_folder).eval()
    ids, needed = torch.arange(18).view(2, 9), torch.tensor([2, 5, 17])
    with torch.no_grad():
        expected = model(input_ids=ids).logits.flatten(0, 1)[needed]
        kernels.speed_up(model)
        given = model(input_ids=ids, **{kernels.NEEDED: needed}).logits
    assert torch.allclose(given[0], expected, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dropout_draws_numbers_only_where_it_drops(share: float) -> None:
    layer = nn.Sequential(nn.Dropout(share))
    kernels.speed_up_dropout(layer)
    before = torch.get_rng_state()
    assert torch.equal(layer(torch.ones(4, 8)), torch.ones(4, 8)) is (share == 0)
    assert torch.equal(torch.get_rng_state(), before) is (share == 0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_dropout_drops_its_share_and_scales_the_rest(share: float) -> None:
    layer = nn.Sequential(nn.Dropout(share))
    kernels.speed_up_dropout(layer)
    assert type(layer[0]) is not nn.Dropout
    x = torch.ones(301, 1001, requires_grad=True)
    torch.manual_seed(1)
    output = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), output)
    dropped = (output == 0).float().mean().item()
    assert dropped == pytest.approx(share, abs=4e-3)
    kept = output.detach()[output != 0]
    assert kept.min() == kept.max() == pytest.approx(1 / (1 - share), rel=2e-3)
    # as independent as torch's: neighbours fall together as often as chance has it
    pairs = ((output[:, 1:] == 0) & (output[:, :-1] == 0)).float().mean().item()
    assert pairs == pytest.approx(share**2, abs=4e-3)
    output.sum().backward()
    assert torch.equal(x.grad, output.detach())
    assert layer.eval()(x) is x


@onednn
@pytest.mark.parametrize("kind", LAYERS)
def test_only_float32_goes_to_onednn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    original = kernels.multiply

    def multiply(left: torch.Tensor, *more: Any) -> torch.Tensor:
        calls.append(left.dtype)
        return original(left, *more)

    monkeypatch.setattr(kernels, "multiply", multiply)
    plain = LAYERS[kind]()
    own = copy.deepcopy(plain)
    own.__class__ = kernels.ONEDNN_LAYERS[type(own)]
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own(x), plain(x))
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(own.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))
    assert calls == []
    own.float()(x)
    assert calls == [torch.float32]


@onednn
@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", ["gpt2_folder", "llama_folder", "grouped_llama_folder"])
def test_a_model_equals_plain_transformers_on_either_processor(
    kind: str, mode: str, faster: bool, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With tied embeddings (the first two) and without."""
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: faster)
    folder = request.getfixturevalue(kind)
    ids = torch.tensor([[5, 6, 7, 5, 9, 11], [8, 8, 3, 2, 1, 0]])
    own, plain = load_model(folder, "tiny", {}), AutoModelForCausalLM.from_pretrained(folder)
    changed = {type(layer) for layer in own.modules()} & set(kernels.ONEDNN_LAYERS.values())
    assert bool(changed) is faster
    if mode == "lora":
        targets = ["c_attn"] if kind == "gpt2_folder" else ["q_proj", "v_proj"]
        lora = {"r": 4, "lora_alpha": 8, "target_modules": targets}
        own, plain = add_lora(own, lora).eval(), add_lora(plain, lora).eval()
        for name, weight in own.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.3)
        plain.load_state_dict(own.state_dict())
    else:
        kernels.speed_up_full(own)
        assert own.get_input_embeddings().sparse is (kind != "grouped_llama_folder")
    losses = [model(input_ids=ids, labels=ids).loss for model in (own, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    weights = [(n, p) for n, p in own.named_parameters() if p.requires_grad]
    largest = max(p.grad.abs().max() for _, p in weights)
    for (name, weight), other in zip(
        weights, (p for p in plain.parameters() if p.requires_grad), strict=True
    ):
        assert weight.grad.layout is torch.strided, name
        assert torch.allclose(weight.grad, other.grad, atol=1e-5 * largest, rtol=1e-4), name


@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),  # no such file: not Linux
    ],
)
def test_onednn_is_used_where_mkl_is_slow(
    maker: str | None, capability: str, expected: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if maker is not None:
        (tmp_path / "cpuinfo").write_text(f"processor: 0\nvendor_id: {maker}\n")
    monkeypatch.setattr(kernels, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in ("mkl", "mkldnn"):
        monkeypatch.setattr(getattr(torch.backends, name), "is_available", lambda: True)
    assert kernels.onednn_is_faster() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not kernels.onednn_is_faster()


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["wte"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
        {"target_modules": ["c_attn"], "trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_lora_on_a_tied_embedding(lora: dict[str, Any], gpt2_folder: Path) -> None:
    model = add_lora(load_model(gpt2_folder, "tiny", {}), {"r": 4, "lora_alpha": 8, **lora})
    ids = torch.tensor([[5, 6, 7, 5, 9, 11]])
    model(input_ids=ids, labels=ids).loss.backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    assert {p.grad.layout for p in weights} == {torch.strided}
    assert torch.nn.utils.clip_grad_norm_(weights, 1.0) > 0
    torch.optim.AdamW(weights, fused=True).step()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="not Linux")
def test_stored_frozen_weights_do_not_need_the_models_file(
    gpt2_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(gpt2_folder, tmp_path / "model")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}
    model = add_lora(load_model(tmp_path / "model", "tiny", {}), lora)
    file = str(tmp_path / "model" / "model.safetensors")
    assert file in Path("/proc/self/maps").read_text()
    store_weights(model, torch.bfloat16)
    assert file not in Path("/proc/self/maps").read_text()
