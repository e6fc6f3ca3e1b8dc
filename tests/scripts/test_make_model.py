"""The built-in model: small, plain GPT-2, and pretrained without questions."""

from pathlib import Path

import make_model
import pytest
import torch
from builtin_text import KINDS, Writer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from lora_or_full.modeling.loading import load_model, load_tokenizer

MODEL = Path(__file__).parents[2] / "assets" / "model"


def test_it_is_a_gpt2_of_less_than_eight_megabytes() -> None:
    assert isinstance(load_model(MODEL, "built-in", {}), GPT2LMHeadModel)
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 8_000_000
    assert not [file for file in MODEL.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


def test_plain_transformers_computes_with_it_as_the_project_does() -> None:
    plain = AutoModelForCausalLM.from_pretrained(MODEL)
    own = load_model(MODEL, "built-in", {})
    for (name, weight), other in zip(plain.named_parameters(), own.parameters(), strict=True):
        assert weight.dtype == other.dtype == torch.float32, name
        assert torch.equal(weight, other)


def test_its_tokenizer_adds_nothing_and_knows_every_character() -> None:
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer("")["input_ids"] == []
    text = "Łódź – €5, 東京\nQuestion: Who?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_never_read_a_question() -> None:
    writer = Writer("pretrain", 3)
    for number in range(300):
        sizes = make_model.STAGES[number % len(make_model.STAGES)].sizes
        document = make_model.document(writer, writer.rng.choice(sizes), 10)
        text = "".join(piece for piece, _ in document)
        assert "?" not in text
        for word in ("Context:", "Question:", "Answer:"):
            assert word not in text


def test_names_of_pretraining_are_not_those_of_the_data() -> None:
    words = {split: {Writer(split, 1).word() for _ in range(1)} for split in ("train", "dev")}
    writers = {split: Writer(split, 5) for split in ("pretrain", "train", "dev")}
    words = {split: {writer.word() for _ in range(3000)} for split, writer in writers.items()}
    assert not words["pretrain"] & words["train"]
    assert not words["pretrain"] & words["dev"]
    assert not words["train"] & words["dev"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_restated_facts_are_in_the_paragraph(kind: str) -> None:
    writer = Writer("pretrain", 4)
    paragraph = writer.paragraph(kind, writer.word(), (3, 3))
    for fact in paragraph.facts:
        assert paragraph.text.count(fact.answers[0]) == 1


def test_pretraining_repeats_itself_and_learns() -> None:
    def trained() -> torch.Tensor:
        torch.manual_seed(0)
        tokenizer = make_model.train_tokenizer(Writer("pretrain", 2), size=400, texts=50)
        model = make_model.untrained(len(tokenizer), end=tokenizer.eos_token_id, width=24, layers=1)
        before = model.lm_head.weight.detach().clone()
        make_model.pretrain(
            model, tokenizer.backend_tokenizer, Writer("pretrain", 1), steps=2, lr=1e-3
        )
        assert not torch.equal(before, model.lm_head.weight)
        return model.lm_head.weight.detach()

    assert torch.equal(trained(), trained())


def test_the_saved_tokenizer_is_fast() -> None:
    assert AutoTokenizer.from_pretrained(MODEL).is_fast
