"""A context that is read once, for all the questions that are then asked about it."""

import copy

import torch
from transformers import Cache, PreTrainedTokenizerBase

from lora_or_full.data.prompt import context_text, encode, prefix_ids, question_text, window
from lora_or_full.errors import UserError
from lora_or_full.generation.decoding import Answer, continued
from lora_or_full.generation.kv_cache import Model


class ContextSession:
    """A context as `model` (in eval mode) has read it: what it computed is kept, and each question
    goes on from there.

    A prompt has at most `max_prompt_length` tokens, the context being shortened from its end as in
    evaluation. `tokens` are those of the whole context, `read` how many of them were read last.
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
        """The greedy answer, the same as `decoding.greedy` gives, and others behind it.

        These begin with the `alternatives` tokens that are the next likely ones to begin with, and
        go on greedily: the most probable first, no text twice. An answer that is as probable as
        they are may begin otherwise.

        Raises:
            UserError: the question is empty or too long, or no text.
        """
        if not question.strip():
            raise UserError("The question is empty.")
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UserError("The question holds half a character, which is no text.") from None
        ids = encode(self.tokenizer, [question_text(question)])[0]
        self._read(self._kept(ids))
        backend = _Behind(self.model, copy.deepcopy(self.cache), len(self.prefix) + self.read)
        scores = backend.start(ids).float().log_softmax(-1)  # (1, vocabulary)
        value, token = scores.max(-1)
        if alternatives:
            others = scores.scatter(1, token[:, None], float("-inf")).topk(alternatives)
            value = torch.cat([value, others.values[0]])  # (1 + alternatives)
            token = torch.cat([token, others.indices[0]])
            backend.repeat(1 + alternatives)
        first, *rest = continued(backend, token, value, self.tokenizer, stops, max_new_tokens)
        by_text = {first.text: first}
        for answer in sorted(rest, key=lambda answer: -answer.log_probability):
            by_text.setdefault(answer.text, answer)
        return list(by_text.values())

    def _kept(self, question_ids: list[int]) -> int:
        """How many tokens of the context there is room for beside a question."""
        room = self.max_prompt_length - len(self.prefix) - len(question_ids)
        if room < 0:
            raise UserError(
                f"The question has {len(question_ids):,} tokens, and the model was to read at most "
                f"{self.max_prompt_length:,} of question and context: ask a shorter one."
            )
        return window(self.tokens, room).stop

    @torch.no_grad()
    def _read(self, tokens: int) -> None:
        if tokens != self.read:
            ids = torch.tensor([self.prefix + self.context_ids[:tokens]], device=self.model.device)
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            self.cache, self.read = output.past_key_values, tokens


class _Behind:
    """PaddedCache that go on side by side behind the `size` tokens in `cache`."""

    def __init__(self, model: Model, cache: Cache, size: int) -> None:
        self.model, self.cache, self.size, self.rows = model, cache, size, 1

    def start(self, ids: list[int]) -> torch.Tensor:
        """The logits (1, vocabulary) behind a question."""
        return self._logits(torch.tensor([ids], device=self.model.device))

    def repeat(self, rows: int) -> None:
        """Make `rows` of the one."""
        self.cache.batch_repeat_interleave(rows)
        self.rows = rows

    def step(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The logits behind one token more each (A) of the rows `kept` (A) of before."""
        if len(kept) < self.rows:
            self.cache.batch_select_indices(kept)
            self.rows = len(kept)
        return self._logits(tokens[:, None])

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Behind token ids (B, T): (B, vocabulary)."""
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
