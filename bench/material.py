"""What measurements are made with: nonsense questions, random models; and where they are from."""

import os
import platform
import random
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

PROJECT = Path(__file__).resolve().parents[1]
BUILTIN = PROJECT / "assets" / "model"


def made_up(
    paragraphs: int,
    questions: int,
    context_words: Callable[[random.Random], int],
    question_words: int,
) -> dict[str, Any]:
    """Questions in SQuAD's format over nonsense words.

    The distribution of lengths is the same for any number of paragraphs.

    Args:
        paragraphs: Number of paragraphs, each with a context of its own.
        questions: Questions per paragraph.
        context_words: Draws the number of words of a context.
        question_words: Words of a question besides those that all begin with.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioulmnrst", k=rng.randrange(2, 8))) for _ in range(3000)]
    articles: list[dict[str, Any]] = []
    for number in range(paragraphs):
        context = " ".join(rng.choices(words, k=context_words(rng)))
        qas = []
        for question in range(questions):
            answer = rng.choice(context.split())
            asked = " ".join(rng.choices(words, k=question_words))
            qas.append({
                "id": f"{number}-{question}",
                "question": f"Which one is the {asked}?",
                "answers": [{"text": answer, "answer_start": context.index(answer)}],
            })  # fmt: skip
        if number % 20 == 0:
            articles.append({"title": f"Article {number}", "paragraphs": []})
        articles[-1]["paragraphs"].append({"context": context, "qas": qas})
    return {"version": "1.1", "data": articles}


def gpt2(folder: Path) -> Path:
    """Make a GPT-2 of full size with random weights."""
    return _saved(folder / "gpt2", lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()))


LARGE: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    name: partial(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64),
    )
    for name, width, layers in (
        ("gpt2-medium", 1024, 24), ("gpt2-large", 1280, 36), ("gpt2-xl", 1600, 48),
    )
} | {
    "llama-1b": partial(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        ),
    )
}  # fmt: skip


def large(folder: Path, name: str) -> Path:
    """Make a model of LARGE with weights that are quickly drawn, in bfloat16: for memory."""

    def build() -> transformers.PreTrainedModel:
        with torch.device("meta"):
            model = LARGE[name]()
        model.bfloat16().to_empty(device="cpu").tie_weights()
        with torch.no_grad():
            for weight in model.parameters():
                weight.uniform_(-0.03, 0.03)
        return model

    return _saved(folder / name, build)


def llama(folder: Path) -> Path:
    """Make a small model of Llama's type with grouped-query attention and random weights."""
    config = transformers.LlamaConfig(
        vocab_size=transformers.AutoConfig.from_pretrained(BUILTIN).vocab_size,
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return _saved(folder / "llama", lambda: transformers.LlamaForCausalLM(config))


def _saved(folder: Path, build: Callable[[], transformers.PreTrainedModel]) -> Path:
    """Save a model with the built-in tokenizer, unless it is there."""
    if not folder.exists():
        torch.manual_seed(0)
        build().save_pretrained(folder)
        for file in BUILTIN.glob("tokenizer*"):
            shutil.copy(file, folder)
    return folder


def origin(device: torch.device) -> str:
    """Say which hardware, versions and commit figures are of."""
    hardware = f"{os.cpu_count()} cores, {platform.machine()}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        hardware = f"{torch.cuda.get_device_name(device)} ({major}.{minor}), {hardware}"
    names = ["torch", "transformers", "peft", "lightning", *["trl"] * bool(find_spec("trl"))]
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    commit = subprocess.run(
        ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"],
        capture_output=True, text=True,
    ).stdout.strip() or "unknown"  # fmt: skip
    return f"{hardware}, Python {platform.python_version()}, {packages}; commit {commit}"
