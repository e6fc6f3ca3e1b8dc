"""Types of model: which layers an adapter changes, and answers and losses as of each row alone."""

import json
import random
from pathlib import Path

import pytest
import torch
from model_types import TYPES, save_model
from transformers import PreTrainedTokenizerBase

from datamodule import sequences
from lora_or_full.config.schema import AdapterConfig
from lora_or_full.data.prompt import PromptTokens
from lora_or_full.errors import UserError
from lora_or_full.generation.decoding import greedy
from lora_or_full.generation.sharing import shares_context
from lora_or_full.modeling.architecture import (
    attention_projections,
    given_values,
    max_positions,
    settings_of,
    sliding_window,
    without_dropout,
)
from lora_or_full.modeling.loading import add_adapter, load_model
from lora_or_full.modeling.packed_rows import PackedRows

ALONE = {  # types that share no context: their own attention, a window, or positions of their own
    "gpt_neo", "gptj", "gemma2", "gemma3_text", "bloom", "falcon", "mpt", "stablelm",
}  # fmt: skip


def questions() -> tuple[list[PromptTokens], list[list[int]]]:
    """Five questions over two contexts, and their answers."""
    rng = random.Random(0)

    def ids(size: int) -> list[int]:
        return [rng.randrange(1, 300) for _ in range(size)]

    contexts = [ids(22), ids(9)]
    prompts = [PromptTokens([7, 8], contexts[n % 2], ids(rng.randrange(3, 9))) for n in range(5)]
    return prompts, [[*ids(rng.randrange(1, 5)), 0] for _ in prompts]


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", TYPES)
def test_answers_and_losses_are_those_of_each_question_alone(
    kind: str, mode: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = save_model(kind, tmp_path, len(tokenizer))
    dropouts = without_dropout(settings_of(folder))
    model = load_model(folder, "tiny", dropouts)
    layers = attention_projections(model)
    assert sorted(layers) == TYPES[kind][1]
    assert shares_context(model, 40) is (kind not in ALONE)
    packed_length = None if kind in ALONE else 100
    if mode == "lora":
        lora = {"_target_": "peft.LoraConfig", "r": 4, "target_modules": layers}
        lora |= {"init_lora_weights": False, "lora_dropout": 0.0}
        model = add_adapter(model, AdapterConfig.model_validate(lora))
    prompts, answers = questions()
    together = greedy(model.eval(), tokenizer, prompts, [0], 5, packed_length)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = greedy(model, tokenizer, [prompt], [0], 5, None)
        assert (answer.text, answer.ended) == (alone.text, alone.ended)
        assert answer.log_probability == pytest.approx(alone.log_probability, rel=1e-3, abs=1e-3)
    losses = []
    model.train()  # without its dropouts it computes the same twice
    for length in (packed_length, None):
        made = sequences(prompts, answers, True, length)
        assert not isinstance(made, PackedRows)
        needed, targets = made.wanted
        logits = model(**made.model_inputs(needed), use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_dropouts_are_zero_unless_given_and_those_of_another_type_are_left_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "opt", "dropout": 0.1}')
    opt = settings_of(tmp_path)
    own = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    assert without_dropout(opt) == own == given_values(opt, {"resid_pdrop": 0.0})
    assert given_values(opt, {"dropout": 0.1, "resid_pdrop": 0.2}) == (
        own | {"dropout": 0.1, "resid_pdrop": 0.2}  # which is then refused by name
    )


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, None),
        ({"model_type": "gpt_neo", "window_size": 16}, 16),
        ({"model_type": "gemma3", "text_config": {"sliding_window": 16}}, 16),
        ({"model_type": "llama"}, None),
    ],
    ids=str,
)
def test_a_window_is_found_where_layers_have_one(
    values: dict[str, object], seen: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert sliding_window(settings_of(tmp_path)) == seen


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("t5", "an encoder-decoder model"),
        ("bart", "an encoder-decoder model"),
        ("mamba", "a state-space or recurrent model"),
        ("rwkv", "a state-space or recurrent model"),
        ("jamba", "a state-space or recurrent model"),
        ("clip", "no model that generates text"),
    ],
)
def test_other_kinds_of_model_are_refused_as_what_they_are(
    kind: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=rf"is {words}.* \({kind}\)"):
        settings_of(tmp_path)


@pytest.mark.parametrize("content", [None, '{"model_type": "of-nobody"}', "{"])
def test_a_folder_without_a_known_configuration_is_refused(
    content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="no causal language model"):
        settings_of(tmp_path)


def test_a_model_without_a_limit_reads_any_length_and_one_in_parts_that_of_its_text(
    tmp_path: Path,
) -> None:
    for values, size in (
        ({"model_type": "bloom"}, 2**31),
        ({"model_type": "mpt", "max_seq_len": 300}, 300),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 400}}, 400),
        ({"model_type": "gpt2", "n_positions": 200}, 200),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert max_positions(settings_of(tmp_path)) == size
