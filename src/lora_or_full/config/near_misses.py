"""Keys that do not exist, and the ones that are most probably meant."""

import difflib
from collections.abc import Sequence

from lora_or_full.errors import UserError

# Names that other projects have for our keys.
HABITS = {
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout", "learning_rate": "lr", "arm": "mode",
    "epochs": "trainer.max_epochs", "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs", "bs": "batch_size", "batch": "batch_size",
    "train_batch_size": "batch_size", "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size", "fp16": "trainer.precision",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "bf16": "trainer.precision", "max_grad_norm": "trainer.gradient_clip_val",
    "grad_clip": "trainer.gradient_clip_val", "gpus": "trainer.devices",
    "max_seq_length": "max_length", "max_seq_len": "max_length",
    "model_name": "model.name", "model_name_or_path": "model.name", "dataset": "data.path",
    "dataset_name": "data.path", "train_file": "data.path", "test_file": "data.test_path",
    "resume_from_checkpoint": "resume", "ckpt_path": "resume", "method": "mode",
    "optimizer.warmup_steps": "scheduler.num_warmup_steps",  # of older versions
    "scheduler.warmup_steps": "scheduler.num_warmup_steps",
    "warmup_steps": "scheduler.num_warmup_steps",
}  # fmt: skip


def unknown(name: str, valid: Sequence[str], near: str = "") -> UserError:
    """Give the refusal of a key that does not exist, with the nearest one and all valid ones.

    Args:
        name: The key.
        valid: Keys that can be given instead.
        near: What is probably meant, if that is known.
    """
    near = near or nearest(name, valid)
    if near:
        return UserError(f"There is no key {name!r}. Did you mean {near}? All keys: --help.")
    return UserError(f"There is no key {name!r}. Valid keys: {', '.join(valid)}.")


def nearest(name: str, valid: Sequence[str]) -> str:
    """Give the key that a wrong one most probably stands for; empty if there is none."""
    section, _, last = name.rpartition(".")
    for known in (name, last):
        if known in HABITS and HABITS[known] in valid:
            return HABITS[known]
    if section in ("lora", "peft"):
        section, name = "adapter", f"adapter.{last}"
    if name in valid:
        return name
    if section in ("", "adapter") and (same := [n for n in valid if n.endswith(f".{last}")]):
        return " or ".join(same)
    # These sections take further arguments of PEFT's or Lightning's class.
    cutoff = 0.8 if section == "adapter" else 0.6
    near = difflib.get_close_matches(name, valid, n=1, cutoff=cutoff)
    habits = difflib.get_close_matches(name, HABITS, n=1, cutoff=0.8)
    if not near and habits and HABITS[habits[0]] in valid:
        return HABITS[habits[0]]
    return near[0] if near else f"+{name}" if section == "adapter" else ""
