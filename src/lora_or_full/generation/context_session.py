"""A context that a model reads once for many questions."""

import torch

from lora_or_full.data.prompt import Prompt, PromptTokens, window
from lora_or_full.errors import UserError
from lora_or_full.evaluation.predictions import Answer
from lora_or_full.generation.decoding import continue_greedily
from lora_or_full.generation.kv_cache import Model, PaddedCache


class ContextSession:
    """The keys and values of a context, kept for any number of questions.

    A context that is too long loses its end, as in evaluation.

    Args:
        model: In eval mode.
        prompt: Makes its prompts.
        context: Any text.
        max_prompt_length: Largest number of tokens of a prompt.

    Attributes:
        tokens: Number of tokens of the context.
        read: How many of them were read for the last question.
    """

    def __init__(self, model: Model, prompt: Prompt, context: str, max_prompt_length: int) -> None:
        self.model, self.prompt, self.context = model, prompt, context
        self.max_prompt_length = max_prompt_length
        self.ids: list[int] = []
        first = self._tokens("")
        self.tokens, self.read = len(first.context), 0
        self._read(first)

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
            backend, token, value, self.prompt.tokenizer, stops, max_new_tokens
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
        parts = self._tokens(question)
        self._read(parts)
        backend = self._after_context.copy()
        return backend, backend.append(torch.tensor([parts.question], device=self.model.device))

    def _tokens(self, question: str) -> PromptTokens:
        """Tokenize the prompt of a question; the context and its question are not yet shortened."""
        [parts] = self.prompt.tokens([(self.context, question)])
        return parts

    @torch.no_grad()
    def _read(self, parts: PromptTokens) -> None:
        """Read what comes before a question, with as much of the context as fits, unless that was
        read last."""
        around = len(parts.prefix) + len(parts.question)
        kept = window(len(parts.context), max(0, self.max_prompt_length - around)).stop
        ids = parts.prefix + parts.context[:kept]
        if around > self.max_prompt_length or not ids:
            raise UserError(
                f"The question has {len(parts.question):,} tokens, but question and context may "
                f"have {self.max_prompt_length:,} together: ask a shorter one."
            )
        if ids != self.ids:
            self._after_context = PaddedCache(self.model, [PromptTokens([], ids, [])])
            self._after_context.prefill()
            self.ids, self.read = ids, kept
