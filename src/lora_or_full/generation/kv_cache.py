"""Caches for decoding: all prompts are read at once (prefill), then answers grow token by token.

If the model can share a context (sharing), it is read once for all its questions, and
their answers grow in one sequence; otherwise each prompt is a row of its own.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lora_or_full.data.prompt import IGNORED, PromptTokens
from lora_or_full.modeling.prefix_packing import (
    PADDING_SEGMENT,
    Block,
    block_inputs,
    may_attend,
    packed,
)

Model = PreTrainedModel | PeftModel


def marked(
    prompts: Sequence[PromptTokens], references: Sequence[list[int]]
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Give contexts, questions with their gold answers, and marks in place of labels, to be packed.

    The mark of a question's last token is the number of its prompt; along the gold answer it grows
    by the number of prompts.
    """
    read = [ids[:-1] for ids in references]  # nothing is predicted after the last token
    marks = [
        [IGNORED] * (len(p.question) - 1)
        + [row + offset * len(prompts) for offset in range(len(answer) + 1)]
        for row, (p, answer) in enumerate(zip(prompts, read, strict=True))
    ]
    contexts = [p.prefix + p.context for p in prompts]
    branches = [p.question + answer for p, answer in zip(prompts, read, strict=True)]
    return contexts, branches, marks


def by_mark(marks: torch.Tensor) -> torch.Tensor:
    """Give the numbers of the tokens that have a mark, in the order of their marks (T)."""
    needed = (marks != IGNORED).nonzero().squeeze(1)
    return needed[marks[needed].argsort()]


class SharedPrefixCache:
    """A DecodingBackend for prompts that share contexts, packed into blocks of one sequence.

    Each block has its own region of the cache, with room for its new tokens, so that the keys which
    its tokens attend to are contiguous and never copied.

    Args:
        model: In eval mode.
        prompts: Those of the same context adjacent.
        packed_length: Tokens of a block.
        room: New tokens per prompt.
        references: Token ids of a gold answer per prompt; new tokens do not attend to them.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[PromptTokens],
        packed_length: int,
        room: int,
        references: Sequence[list[int]] | None = None,
    ) -> None:
        self.model = model
        self.references = references or [[]] * len(prompts)
        sequence = packed(*marked(prompts, self.references), packed_length).to(model.device)
        needed = by_mark(sequence.labels[0])
        self.marks = sequence.labels[0, needed]
        ends, answered = needed[: len(prompts)], needed[len(prompts) :]
        self.inputs = sequence.model_inputs(needed)
        # Per row: its block, its segment, the next position, and the cache slots of its new tokens.
        self.block, self.segment = sequence.block_of[ends], sequence.segment_of[ends]
        self.positions = sequence.position_ids[0, ends] + 1
        self.attended: list[list[int]] = [[] for _ in prompts]
        # Per block: the cache slots where it starts, where its prompts end, and where it ends.
        sizes = torch.tensor([block.stop - block.start for block in sequence.blocks])
        rooms = room * torch.bincount(self.block.cpu(), minlength=len(sizes))
        self.starts: list[int] = ((sizes + rooms).cumsum(0) - sizes - rooms).tolist()
        self.read = [start + size for start, size in zip(self.starts, sizes.tolist(), strict=True)]
        self.used = list(self.read)
        shift = torch.tensor(self.starts) - torch.tensor([b.start for b in sequence.blocks])
        slots = torch.arange(len(sequence.block_of)) + shift[sequence.block_of.cpu()]  # (T,)
        size = int((sizes + rooms).sum())
        self.segment_of = torch.full((size,), PADDING_SEGMENT, device=model.device)
        self.segment_of[slots] = sequence.segment_of
        self.segment_of[slots[answered.cpu()]] = PADDING_SEGMENT  # hidden from new tokens
        layers = model.config.get_text_config().num_hidden_layers
        self.layers = [PreallocatedLayer(size) for _ in range(layers)]
        self._write_to(slots)

    def prefill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read all prompts.

        Returns:
            The next logits (prompts, vocabulary), and the log-probability of each gold answer
            (prompts), 0 without one.
        """
        self.cache = Cache(layers=[*self.layers])
        output = self.model(**self.inputs, past_key_values=self.cache, use_cache=True)
        logits, count = output.logits[0], len(self.references)  # (marks, vocabulary)
        rows, offsets = self.marks % count, self.marks // count
        return logits[:count], log_probabilities(logits, rows, offsets, self.references)

    def step(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Append a token (A) to each of the kept rows (A); give the next logits (A, vocabulary)."""
        self.block, self.segment = self.block[kept], self.segment[kept]
        self.positions = self.positions[kept]
        before, self.attended = [self.attended[row] for row in kept.tolist()], []
        blocks: list[Block] = []
        numbers, counts = self.block.unique_consecutive(return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            first, begin, read = len(self.attended), self.starts[number], self.read[number]
            seen = may_attend(self.segment[first : first + count], self.segment_of[begin:read])
            new = torch.zeros(count, self.used[number] + count - read, dtype=torch.bool)
            for row in range(count):
                self.attended.append([*before[first + row], self.used[number] + row])
                new[row, torch.tensor(self.attended[-1]) - read] = True
            self.used[number] += count
            mask = torch.cat([seen, new.to(seen.device)], dim=1)  # (count, seen)
            blocks.append(Block(first, len(self.attended), mask, slice(begin, self.used[number])))
        self._write_to(torch.tensor([slots[-1] for slots in self.attended]))
        output = self.model(
            **block_inputs(tokens[None], self.positions[None], blocks),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        return output.logits[0]

    def _write_to(self, slots: torch.Tensor) -> None:
        """Set the cache slots of the next tokens."""
        for layer in self.layers:
            layer.slots = slots.to(self.model.device)


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer with `size` slots, written at `slots`.

    transformers' growing layer copies everything at each token, which took half of the decoding
    time. Its static one can't hold keys and values of different precision, which rotary positions
    make.
    """

    slots: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve the slots; memory is used only when they are written."""
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self.size, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (B, heads, new, width).

        Returns:
            All slots (B, heads, size, width); of the first call only the new keys and values.
        """
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.slots, key_states)
        self.values.index_copy_(2, self.slots, value_states)
        return (key_states, value_states) if first else (self.keys, self.values)


class PaddedCache:
    """A DecodingBackend with one row per prompt, padded on the left.

    Args:
        model: In eval mode.
        prompts: In any order.
        references: Token ids of a gold answer per prompt.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[PromptTokens],
        references: Sequence[list[int]] | None = None,
    ) -> None:
        self.model, self.prompts = model, prompts
        self.references = references or [[]] * len(prompts)
        longest = max(len(p.prompt) for p in prompts)
        rows = [[0] * (longest - len(p.prompt)) + p.prompt for p in prompts]
        self.ids = torch.tensor(rows, device=model.device)  # (B, T)
        lengths = torch.tensor([len(p.prompt) for p in prompts], device=model.device)
        columns = torch.arange(longest, device=model.device)
        self.mask = (columns >= longest - lengths[:, None]).long()  # (B, T)

    def prefill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read all prompts.

        Returns:
            The next logits (B, vocabulary), and the log-probability of each gold answer (B), 0
            without one.
        """
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1], self._of_references(output.logits)

    def step(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Append a token (A) to each of the kept rows (A); give the next logits (A, vocabulary)."""
        if len(kept) < len(self.mask):
            self.select(kept)
        return self.append(tokens[:, None])

    @torch.no_grad()
    def append(self, ids: torch.Tensor) -> torch.Tensor:
        """Append token ids (B, T) to all rows; give the next logits (B, vocabulary)."""
        return self._read(ids, torch.ones_like(ids), logits_to_keep=1)[:, -1]

    def _read(self, ids: torch.Tensor, real: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        """Append token ids, of which those that are not `real` (B, T) take no position."""
        self.mask = torch.cat([self.mask, real], dim=1)
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.mask.cumsum(-1)[:, -ids.shape[1] :] - 1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        return output.logits

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (B); a row may occur more than once."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def copy(self) -> "PaddedCache":
        """Give an independent copy, whose answers grow apart from this one's."""
        copied = copy.copy(self)
        copied.cache = copy.deepcopy(self.cache)
        return copied

    def _of_references(self, first: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the gold answers (B), by a copy of the cache that reads them.

        Args:
            first: The next logits after the prompts (B, 1, vocabulary).
        """
        longest = max(map(len, self.references))
        if not longest:
            return torch.zeros(len(self.references))
        rows = [answer + [0] * (longest - len(answer)) for answer in self.references]
        ids = torch.tensor(rows, device=self.model.device)  # (B, A), padded on the right
        sizes = torch.tensor(list(map(len, self.references)), device=ids.device)
        real = (torch.arange(longest, device=ids.device) < sizes[:, None]).long()
        logits = first
        if longest > 1:  # nothing is predicted after the last token
            following = self.copy()._read(ids[:, :-1], real[:, :-1], longest - 1)
            logits = torch.cat([first, following], dim=1)  # (B, A, vocabulary)
        scores = logits.float().log_softmax(-1).gather(2, ids[..., None]).squeeze(2)  # (B, A)
        return (scores * real).sum(1)


def log_probabilities(
    logits: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    answers: Sequence[list[int]],
) -> torch.Tensor:
    """Log-probability of each of some answers (B), 0 for an empty one.

    Args:
        logits: (N, vocabulary).
        rows: Number of the answer that each of the logits predicts (N).
        offsets: Index of the predicted token in that answer (N).
        answers: Token ids of the answers (B).
    """
    total = torch.zeros(len(answers), dtype=torch.float32, device=logits.device)
    pairs = enumerate(zip(rows.tolist(), offsets.tolist(), strict=True))
    held = [
        (n, row, answers[row][offset]) for n, (row, offset) in pairs if offset < len(answers[row])
    ]
    if not held:
        return total
    number, row, token = torch.tensor(held, device=logits.device).T
    scores = logits[number].float().log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    return total.index_add_(0, row, scores)
