"""The prompt and its labels, for training, evaluation and asking.

    Context: <context>\\nQuestion: <question>\\nAnswer: <answer><end of text>

A prompt is tokenized as a whole: many tokenizers join the end of one field to what follows (".\\n"
in Llama 3 and Qwen) or mark the start of each text (Llama 2, Mistral), so that its parts alone
would give other tokens. Its tokens are then divided into what comes before the context, the
context, and what follows, so that the context can be shortened or shared.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from lora_or_full.config.template import CHAT, CHAT_TURN, DEFAULT, Template, from_parts, parse
from lora_or_full.errors import UserError, first_line

CHUNK = 1000  # texts tokenized at once: a tokenizer's output takes much memory
MARKS = "\ue000\ue001\ue002"  # stand for the fields of a chat; of Unicode's private use
IGNORED = -100  # label that torch's cross entropy ignores


class PromptTokens(NamedTuple):
    """Token ids of a prompt: what comes before the context, the context, and what follows it.

    A token that is partly of the context belongs to what is beside it.
    """

    prefix: list[int]
    context: list[int]
    question: list[int]

    @property
    def prompt(self) -> list[int]:
        """All token ids in their order."""
        return self.prefix + self.context + self.question


class Prompt:
    """Makes the token ids of prompts and answers.

    Args:
        tokenizer: The model's tokenizer, a fast one.
        template: Text with the fields {context}, {question} and, at its end, {answer}; or 'chat'
            for the tokenizer's own chat template.

    Attributes:
        template: The template, taken apart.
        special: Whether it holds special tokens, such as those of a chat. Then such a token's
            letters in a context or question are the token too, as in every chat.
        start: Tokens that the tokenizer puts before every text.
        end: Token that ends an answer.

    Raises:
        UserError: The tokenizer has no chat template, or one that does not fit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = DEFAULT) -> None:
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        if template == CHAT:
            self.template, end = _chat(tokenizer)
            self.end = self.end if end is None else end
        else:
            self.template = parse(template)
        text = self.template.text("", "")
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special = any(token in text for token in special)
        bos = tokenizer.bos_token
        started = self.special and bos is not None and text.startswith(bos)
        self.start = [] if started else start_ids(tokenizer)

    def text(self, context: str, question: str) -> str:
        """Give the text of a prompt."""
        return self.template.text(context.strip(), question.strip())

    def tokens(self, pairs: Sequence[tuple[str, str]]) -> Iterator[PromptTokens]:
        """Tokenize prompts, each of a context and a question."""
        for chunk in range(0, len(pairs), CHUNK):
            some = pairs[chunk : chunk + CHUNK]
            texts = [self.text(*pair) for pair in some]
            made = _tokenized(self.tokenizer, texts, self.special)
            for number, (text, (context, question)) in enumerate(zip(texts, some, strict=True)):
                ids: list[int] = made["input_ids"][number]
                before = self.template.before_context(question.strip())
                start = len(before.rstrip(" "))  # the spaces before a context go with it
                first = _token_at(made, number, start, text)
                if start and made.char_to_token(number, start - 1) == first:
                    first += 1
                end = len(before) + len(context.strip())
                # The last token, from which the answer is predicted, always follows the context.
                stop = min(max(first, _token_at(made, number, end, text)), len(ids) - 1)
                yield PromptTokens(self.start + ids[:first], ids[first:stop], ids[stop:])

    def context_offsets(self, context: str, question: str) -> list[tuple[int, int]]:
        """Give start and end of each of the context's tokens, in the stripped context."""
        [parts] = self.tokens([(context, question)])
        made = _tokenized(self.tokenizer, [self.text(context, question)], self.special)
        start = len(self.template.before_context(question.strip()))
        first = len(parts.prefix) - len(self.start)
        spans = made[0].offsets[first : first + len(parts.context)]
        return [(begin - start, end - start) for begin, end in spans]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize answers as they continue a prompt, each with the token that ends it.

        White space within one becomes one space: a line break would end the answer.
        """
        texts = [" ".join(text.split()) for text in texts]
        before = f"?{self.template.closing}"  # all of a prompt that can matter
        said = [self.template.lead + text.strip() for text in texts]
        whole = [before, *(before + text for text in said)]
        anchor, *found = encode(self.tokenizer, whole, self.special)
        size = len(anchor)
        # A tokenizer may join the end of the prompt to an answer, which generation can't.
        joined = [n for n, ids in enumerate(found) if ids[:size] != anchor]
        alone = encode(self.tokenizer, [said[n] for n in joined], self.special)
        own = [ids[size:] for ids in found]
        for n, ids in zip(joined, alone, strict=True):
            own[n] = ids
        return [[*ids, self.end] for ids in own]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the tokens that a tokenizer puts before every text, such as a start token."""
    [plain], whole = encode(tokenizer, ["a"]), tokenizer("a")["input_ids"]
    at = next(n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    return whole[:at]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = False
) -> list[list[int]]:
    """Tokenize texts, and add no special tokens.

    '<|endoftext|>' in a text is only its letters, unless `special` says that it is the token.
    """
    found: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        found += _tokenized(tokenizer, texts[start : start + CHUNK], special)["input_ids"]
    return found


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool
) -> BatchEncoding:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not special,
        return_attention_mask=False,
        verbose=False,
    )


def _chat(tokenizer: PreTrainedTokenizerBase) -> tuple[Template, int | None]:
    """Give CHAT_TURN in a tokenizer's chat template, and the token that ends a turn, if one does.

    The template is rendered once, around marks in the places of the fields.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "prompt=chat: the model's tokenizer has no chat template; models that were tuned for "
            "chats have one. Leave it out, or give a text with {context}, {question} and {answer}."
        )
    content = CHAT_TURN.format(context=MARKS[0], question=MARKS[1])
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": MARKS[2]}]
    # Where a template has them: no thinking aloud, and not the date of today.
    options = {"enable_thinking": False, "date_string": "1 Jan 2025", "tokenize": False}
    render: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        asked: str = render(turns[:1], add_generation_prompt=True, **options)
        whole: str = render(turns, **options)
        opening, between, closing = re.split("[" + "".join(MARKS[:2]) + "]", asked)
        before, after = whole.split(MARKS[2])
    except Exception as error:  # of whatever type a template's own code raises
        raise UserError(
            f"prompt=chat: the chat template of the tokenizer fails: {first_line(error)}"
        ) from None
    lead = before.removeprefix(asked) if before.startswith(asked) else ""
    fields = ["context", "question", "answer"]
    ends = encode(tokenizer, [after], special=True)[0][:1]
    end = next((token for token in ends if token in tokenizer.all_special_ids), None)
    return from_parts([opening, between, closing + lead], fields), end


def _token_at(made: BatchEncoding, number: int, place: int, text: str) -> int:
    """Give the first token that holds a character of a text from `place` on."""
    found = (made.char_to_token(number, n) for n in range(place, len(text)))
    return next((token for token in found if token is not None), len(made["input_ids"][number]))


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
