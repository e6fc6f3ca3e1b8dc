"""A context that a model reads once for many questions."""

import torch
from transformers import PreTrainedTokenizerBase

from lora_or_full.data.prompt import (
    PromptTokens,
    context_text,
    encode,
    prefix_ids,
    question_text,
    window,
)
from lora_or_full.errors import UserError
from lora_or_full.evaluation.predictions import Answer
from lora_or_full.generation.decoding import continue_greedily
from lora_or_full.generation.kv_cache import Model, PaddedCache


class ContextSession:
    """The keys and values of a context, kept for any number of questions.

    A context that is too long loses its end, as in evaluation.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        context: Any text.
        max_prompt_length: Largest number of tokens of a prompt.

    Attributes:
        tokens: Number of tokens of the context.
        read: How many of them were read for the last question.
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
        """Answer greedily, as `decoding.greedy` does, and give alternatives.

        Args:
            question: The question.
            stops: Tokens that end an answer.
            max_new_tokens: Largest number of tokens of an answer.
            alternatives: Number of other answers, which begin with the next most probable tokens
                and continue greedily; equal texts are given once.

        Returns:
            The greedy answer, then the alternatives, the most probable first.

        Raises:
            UserError: The question is empty, too long, or no text.
        """
        backend, logits = self.continuation(question)
        scores = logits.float().log_softmax(-1)  # (1, vocabulary)
        value, token = scores.max(-1)
        if alternatives:
            others = scores.scatter(1, token[:, None], float("-inf")).topk(alternatives)
            value = torch.cat([value, others.values[0]])  # (1 + alternatives)
            token = torch.cat([token, others.indices[0]])
            backend.select(torch.zeros_like(token))
        first, *rest = continue_greedily(
            backend, token, value, self.tokenizer, stops, max_new_tokens
        )
        by_text = {first.text: first}
        for answer in sorted(rest, key=lambda answer: -answer.log_probability):
            by_text.setdefault(answer.text, answer)
        return list(by_text.values())

    def continuation(self, question: str) -> tuple[PaddedCache, torch.Tensor]:
        """Read a question after the context.

        Returns:
            A backend of one row, from which answers grow, and the logits (1, vocabulary) of their
            first token.

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
        backend = self._after_context.copy()
        return backend, backend.append(torch.tensor([ids], device=self.model.device))

    def _kept(self, question_ids: list[int]) -> int:
        """Number of context tokens that fit into a prompt with a question."""
        room = self.max_prompt_length - len(self.prefix) - len(question_ids)
        if room < 0:
            raise UserError(
                f"The question has {len(question_ids):,} tokens, but question and context may "
                f"have {self.max_prompt_length:,} together: ask a shorter one."
            )
        return window(self.tokens, room).stop

    @torch.no_grad()
    def _read(self, tokens: int) -> None:
        """Read the first tokens of the context, unless these were read last."""
        if tokens != self.read:
            prompt = PromptTokens(self.prefix, self.context_ids[:tokens], [])
            self._after_context, self.read = PaddedCache(self.model, [prompt]), tokens
            self._after_context.prefill()
