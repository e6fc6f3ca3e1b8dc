"""What was trained, and can be asked: about one context, or many questions at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from lora_or_full.data import prompt
from lora_or_full.data.prompt import PromptTokens
from lora_or_full.errors import UserError
from lora_or_full.evaluation.spans import Span, spans
from lora_or_full.generation.context_session import ContextSession
from lora_or_full.generation.decoding import Answer, greedy, stop_ids
from lora_or_full.generation.kv_cache import Model, shares_context
from lora_or_full.modeling.precision import autocast_for
from lora_or_full.runs import provenance

CONF = provenance.PROJECT / "conf"
BASE = "--model=FOLDER (or a hub id) names its base model."


class Reply(NamedTuple):
    """An answer: its text (empty: the model says nothing), how probable the model finds it, whether
    it ended by itself, and its places in the context (none: it does not stand there)."""

    text: str
    probability: float
    ended: bool
    places: list[Span]


class Given(NamedTuple):
    """The answer to a question of many (None: the question alone is too long), and whether its
    context was shortened."""

    answer: Answer | None
    context_cut: bool


@dataclass(frozen=True)
class Predictor:
    """A model in eval mode that can be asked, and how: limits in tokens, precision as in its run.

    `results` is its run's record; None for what was made elsewhere. `label` tells it from others.
    """

    label: str
    model: Model
    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int
    max_new_tokens: int
    packed_length: int
    batch_size: int
    precision: str
    results: dict[str, Any] | None

    @cached_property
    def stops(self) -> list[int]:
        return stop_ids(self.tokenizer)

    @cached_property
    def _packed_length(self) -> int | None:
        """None if the model can't share a context, which its run knows."""
        if self.results is not None:
            shares = self.results["model"].get("shares_context", False)
        else:
            shares = shares_context(self.model, self.max_prompt_length + self.max_new_tokens)
        return self.packed_length if shares else None

    def read(self, context: str) -> ContextSession:
        """The context, read, to be asked about by `ask`.

        Raises:
            UserError: it is empty.
        """
        if not context.strip():
            raise UserError("The context is empty.")
        with autocast_for(self.precision, self.model.device):
            return ContextSession(self.model, self.tokenizer, context, self.max_prompt_length)

    def ask(self, reading: ContextSession, question: str, alternatives: int) -> list[Reply]:
        """The greedy answer, and up to so many `alternatives` (`ContextSession.ask` tells which).

        Raises:
            UserError: the question is empty or too long.
        """
        with autocast_for(self.precision, self.model.device):
            answers = reading.ask(question, self.stops, self.max_new_tokens, alternatives)
        return [
            Reply(
                answer.text,
                math.exp(answer.log_probability),
                answer.ended,
                spans(answer.text, reading.context),
            )
            for answer in answers
        ]

    def answers(self, asked: Sequence[tuple[str, str]]) -> list[Given]:
        """The greedy answers to pairs of context and question, in batches as a run's own test."""
        contexts = list(dict.fromkeys(context for context, _ in asked))
        numbers = {context: number for number, context in enumerate(contexts)}
        of = [numbers[context] for context, _ in asked]
        ids = prompt.encode(self.tokenizer, [prompt.context_text(text) for text in contexts])
        prefix = prompt.prefix_ids(self.tokenizer)
        prompts, longest = [], [0] * len(contexts)
        questions = [prompt.question_text(question) for _, question in asked]
        for number, own in zip(of, prompt.encode(self.tokenizer, questions), strict=True):
            room = self.max_prompt_length - len(prefix) - len(own)
            kept = ids[number][prompt.window(len(ids[number]), max(room, 0))]
            prompts.append(PromptTokens(prefix, kept, own))
            longest[number] = max(longest[number], len(prompts[-1].prompt))
        order = sorted(range(len(asked)), key=lambda n: (-longest[of[n]], of[n]))
        starts, packed_length = range(0, len(order), self.batch_size), self._packed_length
        found: dict[int, Answer] = {}
        console = Console(stderr=True)
        hidden = not console.is_terminal
        for start in track(starts, self.label, console=console, transient=True, disable=hidden):
            batch = order[start : start + self.batch_size]
            fit = [n for n in batch if len(prompts[n].prompt) <= self.max_prompt_length]
            with autocast_for(self.precision, self.model.device):
                answers = greedy(
                    self.model, self.tokenizer, [prompts[n] for n in fit], self.stops,
                    self.max_new_tokens, packed_length,
                )  # fmt: skip
            found |= zip(fit, answers, strict=True)
        return [
            Given(found.get(n), len(part.context) < len(ids[of[n]]))
            for n, part in enumerate(prompts)
        ]
