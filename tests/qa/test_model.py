"""LoRA or full by one switch: what is trained, how much of it, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, T5Config, T5ForConditionalGeneration

from errors import UserError
from qa.model import add_lora, load_model, load_tokenizer, max_positions

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


def test_full_trains_every_weight_and_lora_its_own_only(gpt2_folder: Path) -> None:
    full = load_model(gpt2_folder, "tiny", {}, None)
    assert trainable(full) == sum(p.numel() for p in full.parameters())
    lora = load_model(gpt2_folder, "tiny", {}, LORA)
    assert isinstance(lora, PeftModel)
    names = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2  # A and B in each of two layers
    assert all("c_attn.lora_" in name for name in names)


def test_lora_changes_nothing_before_training(gpt2_folder: Path) -> None:
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        full = load_model(gpt2_folder, "tiny", {}, None).eval()(input_ids=ids).logits
        lora = load_model(gpt2_folder, "tiny", {}, LORA).eval()(input_ids=ids).logits
    assert torch.equal(full, lora)


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_model_comes_in_train_mode_and_float32(
    gpt2_folder: Path, lora: Any, tmp_path: Path
) -> None:
    half = AutoModelForCausalLM.from_pretrained(gpt2_folder).to(torch.bfloat16)
    shutil.copytree(gpt2_folder, tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    model = load_model(tmp_path / "half", "tiny", {}, lora)
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_llama_types_are_served(llama_folder: Path) -> None:
    model = load_model(llama_folder, "tiny", {"attention_dropout": 0.0}, LLAMA)
    assert trainable(model) == 2 * 2 * 8 * (32 + 32)


def test_dropouts_reach_the_layers(gpt2_folder: Path) -> None:
    model = load_model(gpt2_folder, "tiny", {"resid_pdrop": 0.25, "attn_pdrop": 0.5}, None)
    assert model.transformer.h[0].mlp.dropout.p == 0.25
    assert model.transformer.h[0].attn.attn_dropout.p == 0.5


def test_an_unknown_setting_is_refused_with_those_that_there_are(gpt2_folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.config\.pdrop: a gpt2 has no such.*attn_pdrop"):
        load_model(gpt2_folder, "tiny", {"pdrop": 0.1}, None)


def test_target_modules_that_the_model_lacks_are_refused_with_those_it_has(
    gpt2_folder: Path,
) -> None:
    wrong = {**LORA, "target_modules": ["c_attn", "q_proj"]}
    with pytest.raises(UserError, match=r"has no q_proj; it has c_attn, c_fc, c_proj"):
        load_model(gpt2_folder, "tiny", {}, wrong)


def test_what_peft_refuses_is_said_in_one_line(gpt2_folder: Path) -> None:
    with pytest.raises(UserError, match="PEFT refuses"):
        load_model(gpt2_folder, "tiny", {}, {**LORA, "target_modules": "nothing_like_it"})
    with pytest.raises(UserError, match="PEFT refuses"):
        load_model(gpt2_folder, "tiny", {}, {**LORA, "rang": 8})


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no causal language model"):
        load_model(tmp_path, "t5", {}, None)


def test_pickled_weights_are_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_folder, tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(tmp_path / "model", "pickled", {}, None)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No tokenizer"):
        load_tokenizer(tmp_path)


def test_positions_of_both_types(gpt2_folder: Path, llama_folder: Path) -> None:
    assert max_positions(gpt2_folder) == max_positions(llama_folder) == 256
