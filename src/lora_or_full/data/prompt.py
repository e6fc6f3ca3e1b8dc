"""The prompt and its labels, for training, evaluation and asking.

    Context: <context>\\nQuestion: <question>\\nAnswer: <answer><end of text>

Each part is tokenized by itself and the ids are joined. For GPT-2 this equals tokenizing the whole,
because its tokenizer splits at the start of every part, and no text has white space at its ends. So
a part can be shortened or shared without changing the others.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # texts tokenized at once: a tokenizer's output takes much memory
IGNORED = -100  # label that torch's cross entropy ignores


class PromptTokens(NamedTuple):
    """Token ids of a prompt: the prefix, the context, and what follows it."""

    prefix: list[int]
    context: list[int]
    question: list[int]

    @property
    def prompt(self) -> list[int]:
        """All token ids in their order."""
        return self.prefix + self.context + self.question


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], wanted: str = "input_ids"
) -> list[list[Any]]:
    """Tokenize texts without special tokens; '<|endoftext|>' in a text is only its letters.

    Returns:
        Token ids of each text, or for 'offset_mapping' start and end of each token in its text.
    """
    found: list[list[Any]] = []
    for start in range(0, len(texts), CHUNK):
        found += tokenizer(
            list(texts[start : start + CHUNK]),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_offsets_mapping=wanted == "offset_mapping",
            verbose=False,
        )[wanted]
    return found


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the prompt prefix: the start token, if the tokenizer adds one, and 'Context:'."""
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] * starts + encode(tokenizer, ["Context:"])[0]


def context_text(context: str) -> str:
    """Give the context as it follows 'Context:'."""
    return f" {context.strip()}"


def question_text(question: str) -> str:
    """Give the question as it follows the context, up to and including 'Answer:'."""
    return f"\nQuestion: {question.strip()}\nAnswer:"


def answer_text(answer: str) -> str:
    """Give the answer as it follows 'Answer:'; the end-of-text token comes after it."""
    return f" {answer.strip()}"


def window(length: int, room: int, gold: tuple[int, int] | None = None) -> slice:
    """Choose which tokens of a context are kept.

    Args:
        length: Tokens of the context.
        room: Tokens that fit.
        gold: First and one past the last token of a gold answer; known in training only.

    Returns:
        The first tokens, or a window around the gold answer if it would be lost.
    """
    if length <= room:
        return slice(0, length)
    start = 0
    if gold is not None and gold[1] > room:
        middle = (gold[0] + gold[1]) // 2
        start = min(max(0, middle - room // 2), length - room)
    return slice(start, start + room)


def labels(prompt: Sequence[int], answer: Sequence[int], mask_prompt: bool) -> list[int]:
    """Give the label of each position of prompt and answer.

    Args:
        prompt: Token ids.
        answer: Token ids, the end-of-text token last.
        mask_prompt: Whether only the answer carries loss; otherwise every token does but the first,
            which nothing predicts.
    """
    before = [IGNORED] * len(prompt) if mask_prompt else [IGNORED, *prompt[1:]]
    return before + list(answer)
