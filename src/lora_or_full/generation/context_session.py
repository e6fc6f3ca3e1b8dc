"""A context that is read once, for all the questions that are then asked about it."""

import copy

import torch
from transformers import Cache, PreTrainedTokenizerBase

from lora_or_full.data.prompt import context_text, encode, prefix_ids, question_text, window
from lora_or_full.errors import UserError
from lora_or_full.evaluation.predictions import Answer
from lora_or_full.generation.decoding import continue_greedily
from lora_or_full.generation.kv_cache import Model


class ContextSession:
    """A context as a model has read it: its keys and values are kept for each question.

    The context is shortened from its end, as in evaluation.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        context: Any text.
        max_prompt_length: Largest number of tokens of a prompt.

    Attributes:
        tokens: Number of tokens of the whole context.
        read: Number of its tokens that were read last.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        context: str,
        max_prompt_length: int,
    ) -> None:
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.max_prompt_length = max_prompt_length
        self.prefix = prefix_ids(tokenizer)
        self.context_ids = encode(tokenizer, [context_text(context)])[0]
        self.tokens, self.read = len(self.context_ids), -1
        self._read(self._kept([]))

    def ask(
        self, question: str, stops: list[int], max_new_tokens: int, alternatives: int
    ) -> list[Answer]:
        """Answer greedily, as `decoding.greedy` does, followed by alternatives.

        Args:
            question: The question.
            stops: Tokens that end an answer.
            max_new_tokens: Largest number of tokens of an answer.
            alternatives: Number of other answers. They begin with the next most probable tokens and
                continue greedily; a text that repeats another one is left out.

        Returns:
            The greedy answer, then the alternatives, the most probable first.

        Raises:
            UserError: The question is empty, too long, or no text.
        """
        continuation, logits = self.continuation(question)
        scores = logits.float().log_softmax(-1)  # (1, vocabulary)
        value, token = scores.max(-1)
        if alternatives:
            others = scores.scatter(1, token[:, None], float("-inf")).topk(alternatives)
            value = torch.cat([value, others.values[0]])  # (1 + alternatives)
            token = torch.cat([token, others.indices[0]])
            continuation.select(torch.zeros_like(token))
        first, *rest = continue_greedily(
            continuation, token, value, self.tokenizer, stops, max_new_tokens
        )
        by_text = {first.text: first}
        for answer in sorted(rest, key=lambda answer: -answer.log_probability):
            by_text.setdefault(answer.text, answer)
        return list(by_text.values())

    def continuation(self, question: str) -> tuple["Continuation", torch.Tensor]:
        """Read a question after the context.

        Returns:
            What answers grow from, and the logits (1, vocabulary) of their first token.

        Raises:
            UserError: The question is empty, too long, or no text.
        """
        if not question.strip():
            raise UserError("The question is empty.")
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UserError("The question holds half a character, which is no text.") from None
        ids = encode(self.tokenizer, [question_text(question)])[0]
        self._read(self._kept(ids))
        continuation = Continuation(
            self.model, copy.deepcopy(self.cache), len(self.prefix) + self.read
        )
        return continuation, continuation.read(torch.tensor([ids], device=self.model.device))

    def _kept(self, question_ids: list[int]) -> int:
        """Number of context tokens that there is room for besides a question."""
        room = self.max_prompt_length - len(self.prefix) - len(question_ids)
        if room < 0:
            raise UserError(
                f"The question has {len(question_ids):,} tokens, but question and context may "
                f"have {self.max_prompt_length:,} together: ask a shorter one."
            )
        return window(self.tokens, room).stop

    @torch.no_grad()
    def _read(self, tokens: int) -> None:
        if tokens != self.read:
            ids = torch.tensor([self.prefix + self.context_ids[:tokens]], device=self.model.device)
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            self.cache, self.read = output.past_key_values, tokens


class Continuation:
    """Rows of tokens that grow side by side after the same context; a DecodingBackend.

    Args:
        model: In eval mode.
        cache: Keys and values of one row; they are changed.
        size: Number of tokens in the cache.
    """

    def __init__(self, model: Model, cache: Cache, size: int) -> None:
        self.model, self.cache, self.size, self.rows = model, cache, size, 1

    def copy(self) -> "Continuation":
        """Give an independent copy, of one row."""
        return Continuation(self.model, copy.deepcopy(self.cache), self.size)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (B); a row may occur more than once."""
        self.cache.batch_select_indices(rows)
        self.rows = len(rows)

    def step(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Append a token (A) to each of the kept rows (A), and give the next logits."""
        if len(kept) < self.rows:
            self.select(kept)
        return self.read(tokens[:, None])

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Append token ids (B, T) to all rows; give the next logits (B, vocabulary)."""
        count = ids.shape[1]
        positions = torch.arange(self.size, self.size + count, device=ids.device)
        self.size += count
        output = self.model(
            input_ids=ids,
            attention_mask=ids.new_ones(len(ids), self.size),
            position_ids=positions.expand(len(ids), -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
