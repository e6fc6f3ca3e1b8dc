"""Tokenizers of the types that causal language models have, trained on a few sentences."""

import random
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
WORDS = (
    "Context: Question: Answer: who what when where the of in and built was bridge mill river "
    "Ada Oslo Quito 1200 1310 3.14 (a) [b] ... 's don't Łódź 東京 e.g. U.S.A. a-b x:y"
).split()
# Published with the models: digits alone or by three, and line ends joined to what is before them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def _corpus() -> list[str]:
    rng = random.Random(0)
    return [
        f"Context: {' '.join(rng.choices(WORDS, k=9))}.\n"
        f"Question: {' '.join(rng.choices(WORDS, k=4))}?\nAnswer: {rng.choice(WORDS)}"
        for _ in range(300)
    ]


def _finished(
    backend: Tokenizer, trainer: trainers.Trainer, start: str | None
) -> PreTrainedTokenizerBase:
    backend.train_from_iterator(_corpus(), trainer)
    if start is not None:
        ids = [(start, backend.token_to_id(start))]
        backend.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start or END, eos_token=END, unk_token=END
    )


def by_bytes(
    pattern: str | None = None,
    start: str | None = None,
    normalizer: normalizers.Normalizer | None = None,
    digits: bool = False,
) -> PreTrainedTokenizerBase:
    """BPE over bytes, of the words that GPT-2's pattern gives, or another one."""
    backend = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps: list[pre_tokenizers.PreTokenizer] = [plain]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    if digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END, "<s>"],
        show_progress=False,
    )
    return _finished(backend, trainer, start)


def by_pieces(
    kind: str, normalizer: bool = True, prepend: bool = True, start: str | None = "<s>"
) -> PreTrainedTokenizerBase:
    """SentencePiece's BPE or unigram: a mark in the place of spaces, unknown characters as bytes.

    Args:
        kind: bpe or unigram.
        normalizer: Whether the mark is set before words are parted, as in Llama 2 and Gemma.
        prepend: Whether a text begins with a mark.
        start: Start token.
    """
    special = [END, "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE(byte_fallback=True, unk_token=END) if kind == "bpe" else models.Unigram()
    )
    if normalizer:
        marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prepend + marks)
    # To learn, as SentencePiece does: no piece goes over a line's end or holds a mark but first.
    words = pre_tokenizers.Metaspace(prepend_scheme="always" if prepend else "never")
    lines = pre_tokenizers.Split("\n", "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, lines])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer: trainers.Trainer = (
        trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
        if kind == "bpe"
        else trainers.UnigramTrainer(
            vocab_size=400, special_tokens=[END, "<s>"], unk_token=END, show_progress=False
        )
    )
    made = _finished(backend, trainer, start)
    made.backend_tokenizer.pre_tokenizer = None if normalizer else words
    return made


TYPES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "gpt2": by_bytes,
    "gpt_neox": lambda: by_bytes(normalizer=normalizers.NFC()),
    "opt": lambda: by_bytes(start="<s>"),
    "llama3": lambda: by_bytes(LLAMA3, start="<s>"),
    "qwen2": lambda: by_bytes(QWEN, normalizer=normalizers.NFC()),
    "smollm2": lambda: by_bytes(digits=True),
    "bloom": lambda: by_bytes(BLOOM),
    "llama2": lambda: by_pieces("bpe"),
    "mistral": lambda: by_pieces("bpe", normalizer=False),
    "gemma": lambda: by_pieces("bpe", prepend=False),
    "unigram": lambda: by_pieces("unigram", normalizer=False, start=None),
}
