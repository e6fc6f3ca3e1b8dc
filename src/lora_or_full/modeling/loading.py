"""Loading a causal language model, its tokenizer and adapters from folders."""

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lora_or_full.config.schema import AdapterConfig
from lora_or_full.errors import UserError, first_line
from lora_or_full.modeling.architecture import AS_DATA, no_model, settings_of
from lora_or_full.modeling.attention import ATTENTION
from lora_or_full.modeling.kernels import speed_up, speed_up_dropout
from lora_or_full.modeling.precision import in_float32

PROMPT_LEARNING = (
    "it adds tokens to a prompt. LoRA and other types that change weights are supported."
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder.

    Raises:
        UserError: There is none, it is not a fast one, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **AS_DATA)
    except Exception as error:  # its type depends on the library that fails
        raise UserError(f"No tokenizer loads from {folder}: {first_line(error)}") from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer in {folder} is not a fast one with an end-of-text token.")
    return tokenizer


def load_model(folder: Path, name: str, config: Mapping[str, Any]) -> PreTrainedModel:
    """Load a model in eval mode and its file's dtype, with faster kernels that compute the same.

    Weights of the file are mapped into memory, not copied, until `store_weights` or training.

    Args:
        folder: Local folder of the model.
        name: What an adapter's file names as its base model.
        config: Values of the model's own configuration to change, such as attn_pdrop.

    Raises:
        UserError: The folder holds no supported causal language model, its weights are not
            safetensors, or `config` does not fit it.
    """
    settings = settings_of(folder)
    if getattr(settings, "quantization_config", None):
        raise UserError(
            f"{folder} is quantized, which is not supported (no QLoRA): name the model that it was "
            "made of."
        )
    text = settings.get_text_config()
    known = text.to_dict() | text.attribute_map  # attribute_map: other names for the same
    for key, value in config.items():
        if key not in known:
            raise UserError(
                f"model.config.{key}: a {settings.model_type} has no such setting; "
                f"it has {', '.join(sorted(text.to_diff_dict()))}."
            )
        try:
            setattr(text, key, value)
        except Exception as error:  # of whatever type the configuration's own checks raise
            raise UserError(f"model.config.{key}={value}: {first_line(error)}") from None
    loaded: Any  # a pair, which transformers' types do not say
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=settings,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            **AS_DATA,
        )
    except Exception as error:  # its type depends on the library that fails
        raise no_model(folder, first_line(error)) from None
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{folder} lacks {len(missing)} weights of its model, the first: {missing[0]}. They "
            "would be random. Check model.name and model.config."
        )
    with in_float32(model):
        if problem := _unlike_alone(model):
            raise UserError(
                f"The model type {model.config.model_type!r} is not supported: {problem}. GPT-2, "
                "Llama, Qwen, Gemma, GPT-NeoX, OPT and Phi are."
            )
    model.config.name_or_path = model.name_or_path = name
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    speed_up(model)
    return model


def add_adapter(model: PreTrainedModel, adapter: AdapterConfig) -> PeftModel:
    """Put an adapter on a model and freeze the model's own weights.

    Args:
        model: The base model; it is changed.
        adapter: A PEFT configuration class and its arguments.

    Raises:
        UserError: The adapter does not fit the model, or changes the model's own weights.
    """
    arguments = adapter.arguments()
    targets = arguments.get("target_modules")
    layers = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(False))}
    if isinstance(targets, list):  # a string is a pattern or 'all-linear'
        unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in layers)]
        if unknown:
            raise UserError(
                f"adapter.target_modules: {model.name_or_path} has no {', '.join(unknown)}; "
                f"it has {', '.join(sorted({n.rpartition('.')[2] for n in layers}))}."
            )
    elif isinstance(targets, str) and any(n.endswith(f".{targets}") for n in layers):
        raise UserError(
            f"adapter.target_modules={targets}: one text is a pattern of whole names. A list is "
            f"written in brackets: adapter.target_modules=[{targets}]"
        )
    kind = getattr(peft, adapter.target.partition(".")[2], None)
    if not (isinstance(kind, type) and issubclass(kind, PeftConfig)):
        raise UserError(f"adapter._target_={adapter.target}: PEFT has no such configuration class.")
    if "fan_in_fan_out" in inspect.signature(kind).parameters:
        transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
        arguments = {"fan_in_fan_out": transposed, **arguments}
    # By default only LoRA's own matrices are drawn; methods such as PiSSA change the model's.
    method = arguments.get("init_lora_weights", True)
    held = [(w, w.detach().clone()) for w in model.parameters()] if isinstance(method, str) else []
    try:
        config = kind(task_type="CAUSAL_LM", **arguments)
        if config.is_prompt_learning:
            raise UserError(f"adapter._target_={adapter.target}: {PROMPT_LEARNING}")
        with warnings.catch_warnings():  # PEFT's own type for layer norms warns of them
            warnings.filterwarnings("ignore", "Unsupported layer type .*LayerNorm")
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"PEFT refuses these values of adapter.*: {first_line(error)}") from None
    if any(not torch.equal(weight, before) for weight, before in held):
        raise UserError(
            f"adapter.init_lora_weights={method} changes the model's own weights, which an adapter "
            "does not hold: it would answer otherwise than it was scored. Leave it out."
        )
    assert isinstance(adapted, PeftModel)
    speed_up_dropout(adapted)
    return adapted


def check_adapter(model: PeftModel, adapter: AdapterConfig) -> None:
    """Refuse an adapter that a training loop and answers from a cache do not suffice for.

    Args:
        model: The adapted model; it is put into eval mode.
        adapter: What `add_adapter` put on it.

    Raises:
        UserError: With the reason.
    """
    with in_float32(model):
        problem = _unlike_alone(model.eval())
    if hasattr(model.base_model, "update_and_allocate"):
        problem = "it needs a training loop of its own"
    elif not any(weight.requires_grad for weight in model.parameters()):
        problem = "it trains nothing"
    if problem:
        raise UserError(
            f"adapter._target_={adapter.target} is not supported with "
            f"{model.get_base_model().name_or_path}: {problem}. LoRA, DoRA, IA3 and others that "
            "change each token alike are."
        )


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load an adapter in PEFT's format onto a model, both in eval mode.

    Raises:
        UserError: There is none, it is of another base model, or of a type that adds tokens.
    """
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if missing := [file.name for file in (settings, weights) if not file.is_file()]:
        raise UserError(f"There is no adapter in {folder}: {' and '.join(missing)} missing.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise UserError(f"{folder} is a {config.peft_type.value} adapter: {PROMPT_LEARNING}")
        with warnings.catch_warnings(action="ignore"):  # missing weights, which are refused below
            adapted = PeftModel.from_pretrained(model, str(folder), config=config)
        with safe_open(weights, "pt") as file:
            saved = set(file.keys())
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise _other_base(folder, model, first_line(error)) from None
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    surplus = {name for name in saved - expected if adapted.base_model.prefix in name}
    if missing_weights := expected - saved:
        raise _other_base(folder, model, f"it lacks {len(missing_weights)} weights")
    if surplus:
        raise _other_base(folder, model, f"{len(surplus)} of its weights do not belong to it")
    return adapted.eval()


@torch.no_grad()
def _unlike_alone(model: PreTrainedModel | PeftModel) -> str:
    """Say how a model fails to answer in a padded batch as alone, on a few tokens; else nothing."""
    ids = torch.arange(1, 7).unsqueeze(0) % model.config.get_text_config().vocab_size  # (1, 6)
    padded = torch.cat([ids[:, :1].repeat(1, 2), ids], dim=1)  # (1, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    try:
        alone = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batched = model(
            input_ids=padded, attention_mask=mask, position_ids=positions, logits_to_keep=1
        )
        left = model(input_ids=ids[:, :-1], logits_to_keep=1).logits[:, -1]
        causal = torch.allclose(model(input_ids=ids).logits[:, -2], left, atol=1e-3)
        same = alone.past_key_values is not None and torch.allclose(
            alone.logits, batched.logits, atol=1e-3
        )
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        return f"it can't answer ({first_line(error)})"
    if not causal:
        return "it reads a text in both directions"
    return "" if same else "in a padded batch it answers differently than alone"


def _other_base(folder: Path, model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"The adapter in {folder} does not fit the base model {model.name_or_path}: {reason}"
    )
