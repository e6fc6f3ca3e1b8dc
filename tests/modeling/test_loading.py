"""Loading models and adapters: what is trained, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import add_lora
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.activations import ACT2FN

from lora_or_full.config.schema import AdapterConfig
from lora_or_full.data.prompt import IGNORED
from lora_or_full.errors import UserError
from lora_or_full.modeling.loading import (
    add_adapter,
    check_adapter,
    load_model,
    load_tokenizer,
)
from lora_or_full.modeling.precision import in_float32, store_weights
from lora_or_full.modeling.prefix_packing import packed

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["c_attn"]}
LLAMA = {**LORA, "target_modules": ["q_proj", "v_proj"]}


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_counts_of_the_full_size_gpt2() -> None:
    with torch.device("meta"):  # the shapes alone, without half a gigabyte of weights
        model = AutoModelForCausalLM.from_config(GPT2Config())
        assert trainable(model) == 124_439_808
        adapted = add_lora(model, LORA)
    assert adapted.get_nb_trainable_parameters() == (294_912, 124_734_720)
    assert round(100 * 294_912 / 124_734_720, 4) == 0.2364


def test_all_linear_layers_of_the_full_size_gpt2_and_no_head() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config())
        adapted = add_lora(model, {**LORA, "target_modules": "all-linear"})
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    layers = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert {name.split(".lora_")[0].split(".", 5)[-1] for name in names} == layers
    assert len(names) == 2 * 4 * 12
    # A and B of each of twelve blocks: 768 to 2304, 768 to 768, 768 to 3072 and back
    assert trainable(adapted) == 8 * 12 * (3072 + 1536 + 3840 + 3840)


def test_full_trains_every_weight_and_lora_only_its_own(gpt2_folder: Path) -> None:
    full = load_model(gpt2_folder, "tiny", {})
    assert trainable(full) == sum(p.numel() for p in full.parameters())
    lora = add_lora(full, LORA)
    assert isinstance(lora, PeftModel)
    names = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2  # A and B in each of two layers
    assert all("c_attn.lora_" in name for name in names)


@pytest.mark.parametrize("kind", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changes_the_models_own_weights_is_refused(
    init: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """An adapter does not hold them: one of PiSSA's answered otherwise than it was scored."""
    model = load_model(request.getfixturevalue(kind), "tiny", {})
    lora = (LORA if kind == "gpt2_folder" else LLAMA) | {"init_lora_weights": init}
    with pytest.raises(UserError, match=f"init_lora_weights={init} changes the model's own"):
        add_lora(model, lora)


@pytest.mark.parametrize(
    "more", [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}], ids=str
)
def test_an_adapter_that_only_adds_weights_is_accepted(
    more: dict[str, Any], gpt2_folder: Path
) -> None:
    model = load_model(gpt2_folder, "tiny", {})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = add_lora(model, LORA | more)
    after = {
        n.replace(".base_layer", ""): w for n, w in adapted.base_model.model.state_dict().items()
    }
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_lora_changes_nothing_before_training(gpt2_folder: Path) -> None:
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        full = load_model(gpt2_folder, "tiny", {})(input_ids=ids).logits
        lora = add_lora(load_model(gpt2_folder, "tiny", {}), LORA).eval()(input_ids=ids).logits
    assert torch.equal(full, lora)


@pytest.fixture(params=["gpt2_folder", "grouped_llama_folder"])
def half(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose file is in bfloat16."""
    folder = request.getfixturevalue(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    shutil.copytree(folder, tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def test_a_model_is_loaded_in_eval_mode_and_the_dtype_of_its_file(half: Path) -> None:
    model = load_model(half, "tiny", {})
    layers = [module for module in model.modules() if not isinstance(module, torch.nn.GELU)]
    assert not any(module.training for module in layers)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_of_low_precision_computes_in_float32_for_a_while(half: Path) -> None:
    ids = torch.arange(1, 9).unsqueeze(0)
    plain = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).eval()
    model = load_model(half, "tiny", {})
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad(), in_float32(model):
        assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-6)
        with pytest.raises(IndexError):
            model(input_ids=ids + 10**6)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.dtype == torch.bfloat16
    assert model(input_ids=ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_low_precision_train_as_those_of_float32(half: Path, dtype: torch.dtype) -> None:
    """As PEFT does, the adapter is drawn in the precision of the file."""
    ids = torch.arange(1, 9).unsqueeze(0)
    found = []
    for stored in (torch.float32, dtype):
        torch.manual_seed(0)
        model = load_model(half, "tiny", {})
        targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj"]
        model = add_lora(model, {**LORA, "lora_dropout": 0.0, "target_modules": targets})
        store_weights(model, stored)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        for weight in trained:
            torch.nn.init.normal_(weight, std=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss, *(p.grad for p in trained)])
    assert all(map(torch.equal, *found))


def test_llama_types_are_supported(llama_folder: Path) -> None:
    model = add_lora(load_model(llama_folder, "tiny", {"attention_dropout": 0.0}), LLAMA)
    assert trainable(model) == 2 * 2 * 8 * (32 + 32)


def test_dropouts_reach_the_layers(gpt2_folder: Path) -> None:
    model = load_model(gpt2_folder, "tiny", {"resid_pdrop": 0.25, "attn_pdrop": 0.5})
    assert model.transformer.h[0].mlp.dropout.p == 0.25
    assert model.transformer.h[0].attn.attn_dropout.p == 0.5


def test_the_fused_gelu_is_that_of_gpt2_and_an_export_names_the_original(
    gpt2_folder: Path, tmp_path: Path
) -> None:
    model = load_model(gpt2_folder, "tiny", {})
    fused = [layer.mlp.act for layer in model.transformer.h]
    assert all(isinstance(act, torch.nn.GELU) for act in fused)
    values = torch.linspace(-12, 12, 5001, requires_grad=True)
    for act in fused:
        own, original = act(values), ACT2FN["gelu_new"](values)
        assert torch.allclose(own, original, atol=1e-6, rtol=0)
        slopes = [torch.autograd.grad(y.sum(), values)[0] for y in (own, original)]
        assert torch.allclose(*slopes, atol=5e-6, rtol=0)
    model.save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.config.activation_function == "gelu_new"
    assert isinstance(exported.transformer.h[0].mlp.act, type(ACT2FN["gelu_new"]))
    assert exported.config._attn_implementation == "sdpa"


# Frozen weights


def adapted(folder: Path, targets: list[str]) -> PeftModel:
    """A model with LoRA whose matrices B are not zero, without dropout."""
    lora = {**LORA, "lora_dropout": 0.0, "target_modules": targets}
    torch.manual_seed(0)
    model = add_lora(load_model(folder, "tiny", {}), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt2_folder", ["c_attn"]),
        ("gpt2_folder", ["c_fc", "c_proj"]),
        ("llama_folder", ["q_proj", "v_proj", "down_proj"]),
        ("grouped_llama_folder", ["k_proj", "o_proj", "lm_head"]),
    ],
)
def test_frozen_weights_of_low_precision_change_no_bit_under_autocast(
    kind: str, targets: list[str], request: pytest.FixtureRequest
) -> None:
    sequence = packed(
        [[1, 2, 3, 4]] * 3 + [[5, 6]], [[7, 8], [9, 10, 11], [12], [13, 14]],
        [[IGNORED, 8], [IGNORED, 10, 11], [IGNORED], [IGNORED, 14]], 100,
    )  # fmt: skip
    results = []
    for dtype in (None, torch.bfloat16):
        model = adapted(request.getfixturevalue(kind), targets)
        if dtype is not None:
            store_weights(model, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**sequence.model_inputs(), use_cache=False).logits
        loss = cross_entropy(logits[0, :-1].float(), sequence.labels[0, 1:], ignore_index=IGNORED)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss, logits, gradients))
    (loss, logits, gradients), (other_loss, other_logits, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert torch.equal(logits, other_logits)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, other_gradients[name]), name


@pytest.mark.parametrize(
    ("kind", "targets"), [("gpt2_folder", ["c_attn"]), ("llama_folder", ["q_proj", "v_proj"])]
)
def test_only_matrices_of_products_are_stored_in_low_precision(
    kind: str, targets: list[str], request: pytest.FixtureRequest
) -> None:
    model = adapted(request.getfixturevalue(kind), targets)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    store_weights(model, torch.bfloat16)
    low = {name for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16}
    after = dict(model.named_parameters())
    kept = {name for name in after if any(part in name for part in ("norm", "ln_", "wte", "wpe"))}
    kept |= {name for name in after if "embed_tokens" in name or "lora_" in name}
    assert low == set(after) - kept
    assert len(low) > 8
    for name, weight in before.items():  # where the head was tied, its name is new
        assert torch.equal(after[name], weight.to(after[name].dtype))
        assert after[name].requires_grad == ("lora_" in name)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embedding
    assert (head.dtype, embedding.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(head, embedding.bfloat16())
    assert not head.requires_grad


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_lora_trains_are_not_frozen(bias: str, gpt2_folder: Path) -> None:
    model = add_lora(load_model(gpt2_folder, "tiny", {}), {**LORA, "bias": bias})
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("bias") for name in before)
    store_weights(model, torch.bfloat16)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


# What is refused


def test_a_quantized_model_is_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_folder, tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantized))
    with pytest.raises(UserError, match="is quantized, which is not supported"):
        load_model(tmp_path / "quantized", "tiny", {})


def test_an_unknown_setting_is_refused_with_the_known_ones(gpt2_folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.config\.pdrop: a gpt2 has no such.*attn_pdrop"):
        load_model(gpt2_folder, "tiny", {"pdrop": 0.1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_layer": 3}, "lacks 12 weights of its model, the first: transformer.h.2"),
        ({"attn_pdrop": "high"}, "attn_pdrop"),
        ({"to_dict": 1}, "model.config.to_dict: a gpt2 has no such setting"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(
    config: dict[str, object], message: str, gpt2_folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(gpt2_folder, "name", config)


def test_target_modules_that_the_model_lacks_are_refused_with_those_it_has(
    gpt2_folder: Path,
) -> None:
    wrong = {**LORA, "target_modules": ["c_attn", "q_proj"]}
    with pytest.raises(UserError, match=r"has no q_proj; it has c_attn, c_fc, c_proj"):
        add_lora(load_model(gpt2_folder, "tiny", {}), wrong)


def test_a_refusal_by_peft_is_reported_in_one_line(gpt2_folder: Path) -> None:
    for change in ({"target_modules": "nothing_like_it"}, {"rang": 8}):
        model = load_model(gpt2_folder, "tiny", {})
        with pytest.raises(UserError, match="PEFT refuses"):
            add_lora(model, {**LORA, **change})


def test_an_adapter_that_adds_tokens_to_a_prompt_is_refused(gpt2_folder: Path) -> None:
    adapter = AdapterConfig.model_validate(
        {"_target_": "peft.PromptTuningConfig", "num_virtual_tokens": 3}
    )
    with pytest.raises(UserError, match=r"peft\.PromptTuningConfig: it adds tokens to a prompt"):
        add_adapter(load_model(gpt2_folder, "tiny", {}), adapter)


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [
        ({"_target_": "peft.IA3Config"}, "ia3_l"),
        ({"_target_": "peft.LNTuningConfig"}, "ln_"),
        ({"_target_": "peft.LNTuningConfig", "target_modules": ["ln_f"]}, "ln_f"),
        ({"_target_": "peft.HiraConfig", "r": 2, "target_modules": ["c_attn"]}, "hira_"),
        ({"_target_": "peft.VeraConfig", "r": 2, "target_modules": ["c_attn"]}, "vera_lambda"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_adapter_of_another_type_trains_its_own_weights_alone(
    adapter: dict[str, object], trained: str, gpt2_folder: Path
) -> None:
    model = load_model(gpt2_folder, "tiny", {}).float()
    adapted = add_adapter(model, AdapterConfig.model_validate(adapter))
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert names
    assert all(trained in name for name in names)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"_target_": "peft.OSFConfig", "target_modules": ["c_attn"]}, "it trains nothing"),
        (
            {"_target_": "peft.AdaLoraConfig", "total_step": 9, "target_modules": ["c_attn"]},
            "it needs a training loop of its own",
        ),
        ({"_target_": "peft.ShadowConfig", "target_modules": ["c_attn"]}, "it can't answer"),
        ({"_target_": "peft.LoHaConfig", "target_modules": ["c_attn"]}, "PEFT refuses"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_adapter_that_can_not_be_trained_or_asked_is_refused(
    adapter: dict[str, object], reason: str, gpt2_folder: Path
) -> None:
    config = AdapterConfig.model_validate(adapter)
    with pytest.raises(UserError, match=reason):
        check_adapter(add_adapter(load_model(gpt2_folder, "tiny", {}), config), config)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an encoder-decoder model"):
        load_model(tmp_path, "t5", {})


def test_pickled_weights_are_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_folder, tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(tmp_path / "model", "pickled", {})


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No tokenizer"):
        load_tokenizer(tmp_path)
