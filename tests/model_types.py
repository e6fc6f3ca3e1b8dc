"""Tiny random models of many types."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
NEO = {
    "max_position_embeddings": 256, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
    "attention_types": [[["global", "local"], 1]], "window_size": 8,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 256, "word_embed_proj_dim": 32,
}  # fmt: skip
GPT2 = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
# Of each type: values of its configuration, and the layers of its queries, keys and values.
SPLIT, FUSED = ["k_proj", "q_proj", "v_proj"], ["query_key_value"]
TYPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gpt2": (GPT2, ["c_attn"]),
    "gpt_bigcode": (GPT2, ["c_attn"]),
    "gpt_neo": (NEO, SPLIT),
    "gpt_neox": (LLAMA, FUSED),
    "gptj": (GPT2 | {"rotary_dim": 8}, SPLIT),
    "opt": (OPT, SPLIT),
    "llama": (LLAMA, SPLIT),
    "qwen2": (LLAMA, SPLIT),
    "qwen3": (LLAMA | {"head_dim": 16}, SPLIT),
    "mistral": (LLAMA | {"sliding_window": 300}, SPLIT),
    "gemma": (LLAMA | {"head_dim": 16}, SPLIT),
    "gemma2": (LLAMA | {"head_dim": 16}, SPLIT),
    "gemma3_text": (LLAMA | {"head_dim": 16, "sliding_window": 16}, SPLIT),
    "phi": (LLAMA, SPLIT),
    "phi3": (LLAMA, ["qkv_proj"]),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2}, FUSED),
    "falcon": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}, FUSED),
    "mpt": ({"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 256}, ["Wqkv"]),
    "starcoder2": (LLAMA, SPLIT),
    "olmo": (LLAMA, SPLIT),
    "granite": (LLAMA, SPLIT),
    "stablelm": (LLAMA, SPLIT),
}


def save_model(kind: str, folder: Path, vocabulary: int) -> Path:
    """Write a model with random weights, large enough that its attention tells tokens apart."""
    config = CONFIG_MAPPING[kind](
        **TYPES[kind][0], vocab_size=vocabulary, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
