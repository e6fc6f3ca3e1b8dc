"""Tiny models, their tokenizer and SQuAD files, all made here: no test needs a network."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread of torch in the commands that tests start: the tests of two processes run at once, and
# threads that share a core wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import pytest
import torch
from configs import FULL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lora_or_full.config import compose, schema

# Of the property tests: the same few inputs each time; or many, by --hypothesis-profile=whole
# (1,000) or =trial (10,000).
hypothesis.settings.register_profile(
    "short",
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,  # it says how busy a machine is
        hypothesis.HealthCheck.function_scoped_fixture,  # each example starts from what it made
    ],
)
hypothesis.settings.register_profile(
    "whole", hypothesis.settings.get_profile("short"), max_examples=1000, derandomize=False
)
hypothesis.settings.register_profile(
    "trial", hypothesis.settings.get_profile("whole"), max_examples=10_000
)
hypothesis.settings.load_profile("short")

torch.set_num_threads(1)  # the models are tiny, and the tests of two processes run at once

END = "<|endoftext|>"
NAMES = ("Ada", "Bruno", "Carla", "Dimitri", "Emeka", "Frida", "Goran", "Hana", "Ines", "Jonas")
PLACES = ("Lisbon", "Oslo", "Quito", "Turin", "Accra", "Kyoto", "Riga", "Perth", "Malmö", "Łódź")
THINGS = ("bridge", "mill", "library", "canal", "tower", "observatory", "harbour", "school")
SENTENCES = (
    "In {year}, {name} built the {thing} of {place}.",
    "The {thing} in {place} was opened by {name} on 3 May {year}.",
    "{name} left {place} in {year} and never saw the {thing} again.",
    "About {year} people lived near the {thing} of {place}, says {name}.",
)
QUESTIONS = (
    ("Who is named with the {thing} of {place}?", "name"),
    ("Where was the {thing}?", "place"),
    ("What number goes with {name} and {place}?", "year"),
)

SquadWriter = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches out of the home folder, here and in processes started here."""
    folder = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> None:
    """Leave what is imported out of the collections of garbage: a run has one a measurement."""
    gc.freeze()


def _sentence(rng: random.Random) -> tuple[str, dict[str, str]]:
    words = {
        "name": rng.choice(NAMES),
        "place": rng.choice(PLACES),
        "thing": rng.choice(THINGS),
        "year": str(rng.randrange(1000, 2000)),
    }
    return rng.choice(SENTENCES).format(**words), words


def _save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 400 tokens that splits text as GPT-2's does."""
    rng = random.Random(0)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    prompts = (
        f"Context: {_sentence(rng)[0]} {_sentence(rng)[0]}\nQuestion: Who was it?\nAnswer: Ada"
        for _ in range(100)
    )
    backend.train_from_iterator(prompts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END
    ).save_pretrained(folder)


def _save_model(folder: Path, kind: type[PreTrainedModel], config: PreTrainedConfig) -> Path:
    """A tokenizer, and a model with random weights, large enough that its attention tells tokens
    apart; gives the folder."""
    _save_tokenizer(folder)
    config.vocab_size = len(AutoTokenizer.from_pretrained(folder))
    config.bos_token_id = config.eos_token_id = 0
    config.initializer_range = 0.2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    """A GPT-2 of two tiny layers, and its tokenizer."""
    config = GPT2Config(n_positions=256, n_embd=32, n_layer=2, n_head=2)
    return _save_model(folder, GPT2LMHeadModel, config)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")


LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two tiny layers with tied embeddings, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(**LLAMA, num_attention_heads=2, tie_word_embeddings=True)
    return _save_model(folder, LlamaForCausalLM, config)


@pytest.fixture(scope="session")
def grouped_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose four heads share two of keys and values."""
    folder = tmp_path_factory.mktemp("models") / "grouped-llama"
    config = LlamaConfig(**LLAMA, num_attention_heads=4, num_key_value_heads=2)
    return _save_model(folder, LlamaForCausalLM, config)


@pytest.fixture(scope="session")
def windowed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral whose tokens see the eight before them alone: it can't share a context."""
    folder = tmp_path_factory.mktemp("models") / "windowed"
    config = MistralConfig(**LLAMA, num_attention_heads=2, num_key_value_heads=2, sliding_window=8)
    return _save_model(folder, MistralForCausalLM, config)


@pytest.fixture(scope="session")
def tokenizer(gpt2_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(gpt2_folder, local_files_only=True)


@pytest.fixture(scope="session")
def squad_file() -> SquadWriter:
    """`write_squad(path, articles=4, paragraphs=2, questions=3, seed=0)`, which gives the path."""
    return write_squad


def write_squad(
    path: Path, articles: int = 4, paragraphs: int = 2, questions: int = 3, seed: int = 0
) -> Path:
    """A file in SQuAD v1.1's format; the counts are per file, per article and per paragraph.

    Every third question has more than one gold answer. Ids and titles begin with the seed.
    """
    rng = random.Random(seed)
    data: list[dict[str, Any]] = []
    for a in range(articles):
        title = f"Article {seed}-{a}"
        data.append({"title": title, "paragraphs": []})
        for p in range(paragraphs):
            sentences = [_sentence(rng) for _ in range(rng.randrange(2, 5))]
            context = " ".join(text for text, _ in sentences)
            qas = []
            for q in range(questions):
                number = rng.randrange(len(sentences))
                text, words = sentences[number]
                asked, kind = rng.choice(QUESTIONS)
                before = len(" ".join(text for text, _ in sentences[:number])) + (number > 0)
                start = before + text.index(words[kind])
                answers = [{"text": words[kind], "answer_start": start}]
                if q % 3 == 2:
                    answers += [answers[0], {"text": text, "answer_start": before}]
                qas.append(
                    {
                        "id": f"{seed}-{a}-{p}-{q}",
                        "question": asked.format(**words),
                        "answers": answers,
                    }
                )
            data[-1]["paragraphs"].append({"context": context, "qas": qas})
    path.write_text(json.dumps({"version": "1.1", "data": data}, ensure_ascii=False), "utf-8")
    return path


@pytest.fixture
def settings(gpt2_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Values of the default configuration on the tiny model and a few questions, to change and
    `validate`: three steps an epoch."""
    return tiny_settings(gpt2_folder, tmp_path)


@pytest.fixture(scope="session")
def make_settings(gpt2_folder: Path) -> Callable[[Path], dict[str, Any]]:
    """`make_settings(folder)` gives the values of `settings`, with their files in `folder`."""
    return lambda folder: tiny_settings(gpt2_folder, folder)


@pytest.fixture(scope="session")
def finished_runs(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of finished runs, by mode; not to be changed. Their answers are not those of the
    model before training."""
    import experiment

    folder = tmp_path_factory.mktemp("finished")
    settings = tiny_settings(gpt2_folder, folder)
    experiment.run(schema.validate(settings | {"lr": 0.1}), folder / "lora")
    experiment.run(schema.validate(settings | FULL), folder / "full")
    for mode in ("lora", "full"):
        (folder / mode / "status.json").write_text(json.dumps({"state": "finished"}))
    return {mode: folder / mode for mode in ("lora", "full")}


def tiny_settings(model: Path, folder: Path) -> dict[str, Any]:

    files = [write_squad(folder / f"{n}.json", 6, 2, 2, seed=n) for n in range(2)]
    return compose.compose(
        [
            "mode=lora",
            "lr=1e-2",
            f"model.name='{model}'",
            f"data.path='{files[0]}'",
            f"data.test_path='{files[1]}'",
            "data.train_size=10",
            "data.validation_size=3",
            "data.test_size=6",
            "eval_batch_size=2",
            "max_length=200",
            "max_new_tokens=4",
            "trainer.enable_progress_bar=false",
            "trainer.log_every_n_steps=1",
            "trainer.accelerator=cpu",
            "trainer.precision=32-true",
            f"cache_dir='{folder / 'cache'}'",
        ]
    )
