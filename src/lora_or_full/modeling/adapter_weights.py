"""An adapter that starts from the weights of another one."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

from lora_or_full.errors import UserError, first_line

# What an adapter's file says of how it was made and stored. All else decides what its weights mean.
NOT_COMPARED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights",
    "lora_dropout", "peft_version", "revision", "task_type",
}  # fmt: skip


def set_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Give the adapter of a model the weights of an adapter in a folder, in PEFT's format.

    Raises:
        UserError: The two adapters differ in more than their weights, or one can't be read.
    """
    try:
        own, other = model.peft_config["default"], PeftConfig.from_pretrained(str(folder))
        wanted, found = own.to_dict(), other.to_dict()
        differ = [
            f"{key} is {found.get(key)} there, {value} here"
            for key, value in wanted.items()
            if key not in NOT_COMPARED and _comparable(value) != _comparable(found.get(key))
        ]
        if differ:
            raise UserError(
                f"init_from={folder} does not fit this run's adapter: {'; '.join(differ)}. Give "
                "rank and adapter.* the values that it has."
            )
        weights = load_peft_weights(str(folder), device="cpu")
        result: Any = set_peft_model_state_dict(model, weights)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"init_from={folder} can't be read: {first_line(error)}") from None
    lacking = [name for name in result.missing_keys if model.base_model.prefix in name]
    if lacking or result.unexpected_keys:
        raise UserError(
            f"init_from={folder} does not fit this run's adapter: it lacks {len(lacking)} weights "
            f"and has {len(result.unexpected_keys)} that do not belong to it."
        )


def _comparable(value: object) -> object:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value
