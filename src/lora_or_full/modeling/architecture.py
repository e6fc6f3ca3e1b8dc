"""What a model's configuration and layers say: whether it is supported, limits, dropouts, and the
layers that an adapter changes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lora_or_full.errors import UserError, first_line

# Folders are read as data: code in them is never run.
AS_DATA: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Names of the number of tokens that a model reads at once. Types whose attention weakens with the
# distance (ALiBi) may have none.
POSITIONS = ("max_position_embeddings", "max_seq_len", "seq_length")
UNLIMITED = 2**31
# Names of the layers that make queries, keys and values: together, in pairs, or one by one.
PROJECTIONS = frozenset({
    "c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "q_proj", "k_proj", "v_proj", "query",
    "key", "value", "Wq", "Wk", "Wv", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
})  # fmt: skip
ATTENTION_BLOCK = re.compile(r"attn|attention", re.IGNORECASE)
OF_CLASSIFIERS = ("summary", "classifier")  # dropouts of heads that no causal language model has


def settings_of(folder: Path) -> PreTrainedConfig:
    """Read the configuration of the model in a folder.

    Raises:
        UserError: It can't be read, or is of no causal language model with attention.
    """
    try:
        settings = AutoConfig.from_pretrained(folder, **AS_DATA)
    except Exception as error:  # its type depends on the library that fails
        raise no_model(folder, first_line(error)) from None
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    if settings.is_encoder_decoder:
        what = "an encoder-decoder model"
    elif getattr(kind, "_is_stateful", False):
        what = "a state-space or recurrent model, which keeps a state in the place of its tokens"
    elif kind is None:
        what = "no model that generates text"
    else:
        return settings
    raise UserError(
        f"{folder} is {what} ({settings.model_type}). Causal language models with attention are "
        "supported, such as GPT-2, Llama, Qwen, Gemma, GPT-NeoX, OPT and Phi."
    )


def no_model(folder: Path, reason: str) -> UserError:
    """Give the refusal of a folder without a model."""
    return UserError(f"{folder} holds no causal language model with safetensors weights: {reason}")


def max_positions(settings: PreTrainedConfig) -> int:
    """Give the number of tokens that a model can read at once."""
    text = settings.get_text_config()
    found = (getattr(text, name, None) for name in POSITIONS)
    return next((size for size in found if isinstance(size, int) and size > 0), UNLIMITED)


def hidden_size(settings: PreTrainedConfig) -> int:
    """Give the width of a model; 0 if its configuration does not say."""
    return int(getattr(settings.get_text_config(), "hidden_size", 0))


def sliding_window(settings: PreTrainedConfig) -> int | None:
    """Give how many tokens a layer with a sliding window attends to; None without such a layer."""
    text = settings.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None) or []
    if not getattr(text, "use_sliding_window", True):
        return None
    if kinds and not {"sliding_attention", "local"}.intersection(kinds):
        return None
    found = getattr(text, "sliding_window", None) or getattr(text, "window_size", None)
    return found if isinstance(found, int) else None


def without_dropout(settings: PreTrainedConfig) -> dict[str, float]:
    """Give every dropout of a model's configuration as zero, by its name there."""
    return {
        name: 0.0
        for name, value in settings.get_text_config().to_dict().items()
        if "drop" in name and type(value) in (int, float) and not name.startswith(OF_CLASSIFIERS)
    }


def given_values(settings: PreTrainedConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Give all values of a model's configuration that a run sets: `given`, its other dropouts zero.

    A dropout of zero that the model does not have is left out: a preset may name those of GPT-2.
    """
    own = without_dropout(settings)
    lacking = {k for k, value in given.items() if "drop" in k and value == 0 and k not in own}
    return own | {k: value for k, value in given.items() if k not in lacking}


def attention_projections(model: PreTrainedModel) -> list[str] | str:
    """Find the layers that make queries, keys and values, as PEFT's `target_modules` names them.

    Without layers of a known name these are all linear layers of the attention blocks.

    Returns:
        The ends of their names; a pattern where the model has other parts than a language model.
        Empty if no attention block has a linear layer.
    """
    whole = model.config.get_text_config() is model.config
    text = model if whole else model.get_decoder()
    linear = [name for name, layer in text.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    inner = [name for name in linear if ATTENTION_BLOCK.search(name.rpartition(".")[0])]
    named = [name for name in inner if name.rpartition(".")[2] in PROJECTIONS]
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in named or inner))
    if whole:
        return ends
    place = next(name for name, layer in model.named_modules() if layer is text)
    return rf"{re.escape(place)}\..*\.({'|'.join(ends)})"
