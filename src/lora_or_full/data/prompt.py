"""The one prompt text and its labels, for training, evaluation and asking.

    Context: <context>\\nQuestion: <question>\\nAnswer: <answer><end of text>

Each part is tokenized by itself and the ids are joined. For GPT-2 this equals tokenizing the whole,
because every part but the first begins where its tokenizer splits anyway, and because no text keeps
white space at its ends. A part can thus be shortened or shared without touching the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # texts that are tokenized at once: what a tokenizer gives takes much memory
IGNORED = -100  # the label that torch's cross entropy leaves out


class PromptTokens(NamedTuple):
    """Token ids of a prompt: what stands before the context, the context, what stands after."""

    prefix: list[int]
    context: list[int]
    question: list[int]

    @property
    def prompt(self) -> list[int]:
        """All token ids in their order."""
        return self.prefix + self.context + self.question


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added; '<|endoftext|>' in a text is only its letters."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        ids += tokenizer(
            list(texts[start : start + CHUNK]),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
    return ids


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a prompt begins with: the start token, if the tokenizer adds one, and 'Context:'."""
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] * starts + encode(tokenizer, ["Context:"])[0]


def context_text(context: str) -> str:
    """The context as it stands behind 'Context:'."""
    return f" {context.strip()}"


def question_text(question: str) -> str:
    """The question as it stands behind the context, up to and with 'Answer:'."""
    return f"\nQuestion: {question.strip()}\nAnswer:"


def answer_text(answer: str) -> str:
    """The answer as it stands behind 'Answer:'; the end-of-text token follows it."""
    return f" {answer.strip()}"


def window(length: int, room: int, gold: tuple[int, int] | None = None) -> slice:
    """Which `room` of a context's `length` tokens are kept.

    The first ones; but where the tokens `gold` (first, one past the last) are known and would be
    lost, a window around them. Evaluation knows no gold.
    """
    if length <= room:
        return slice(0, length)
    start = 0
    if gold is not None and gold[1] > room:
        middle = (gold[0] + gold[1]) // 2
        start = min(max(0, middle - room // 2), length - room)
    return slice(start, start + room)


def labels(prompt: Sequence[int], answer: Sequence[int], mask_prompt: bool) -> list[int]:
    """The label of each position of prompt + answer; the answer ends with the end-of-text token.

    With `mask_prompt` only the answer's tokens carry loss. Without it every token does but the
    first, which nothing predicts.
    """
    before = [IGNORED] * len(prompt) if mask_prompt else [IGNORED, *prompt[1:]]
    return before + list(answer)
