"""Greedy decoding on a GPU: prompts in rows of one batch, each further token by one CUDA graph.

All answers grow until the last one ends, and the host looks at them now and then only: a GPU that
waits for it computes nothing. (On a CPU answers that have ended cost time: see kv_cache.)
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache

from lora_or_full.data.prompt import PromptTokens
from lora_or_full.generation.kv_cache import (
    Model,
    PreallocatedLayer,
    by_mark,
    log_probabilities,
    marked,
)
from lora_or_full.modeling.cuda_graphs import Recorder
from lora_or_full.modeling.packed_rows import PackedRows, laid_out
from lora_or_full.modeling.prefix_packing import CONTEXT_SEGMENT, PADDING_SEGMENT

LOOK = 4  # tokens between two looks whether all answers have ended
# Not cuDNN's, which takes long to prepare each new shape, and each batch has its own.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@cache
def _recorder() -> Recorder:
    return Recorder()


class _ZeroedLayer(PreallocatedLayer):
    """Slots that can be read before they are written: their weight is zero, but 0 · NaN is NaN."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys.zero_()
        self.values.zero_()


class RowsDecoder:
    """Answers that grow side by side in R rows of contexts, at most Q answers each.

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
        references: Sequence[list[int]],
    ) -> None:
        self.model, self.references, self.room = model, references, room
        planes = laid_out(*marked(prompts, references), packed_length)  # (5, R, L)
        marks = planes[4].flatten()
        needed = by_mark(marks)
        ends, answered = needed[: len(prompts)], needed[len(prompts) :]
        self.marks = marks[needed]
        rows, length = planes.shape[1:]
        row_of = ends // length  # (prompts,)
        counts = torch.bincount(row_of, minlength=rows)
        self.width = int(counts.max())  # Q
        order = row_of.argsort(stable=True)
        column = torch.empty_like(order)
        column[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[row_of[order]]
        self.place = row_of * self.width + column  # of each prompt among all R·Q answers
        # Position, block and segment of the next token of each answer. Where a row has fewer
        # answers than Q, the others attend to nothing but themselves.
        next_of = torch.full((3, rows * self.width), PADDING_SEGMENT - 1)
        next_of[0] = 0
        next_of[2] = torch.arange(rows * self.width)
        next_of[:, self.place] = planes[1:4].flatten(1)[:, ends]
        next_of[0, self.place] += 1
        cached = planes[2:4].flatten(1).clone()  # blocks and segments (2, R·L)
        cached[1, answered] = PADDING_SEGMENT  # hidden from new tokens
        ended = torch.ones(rows * self.width, dtype=torch.bool)
        ended[self.place] = False

        device = model.device
        self.batch = PackedRows(planes[:4], torch.stack([needed, needed])).to(device)
        self.positions, block, segment = next_of.to(device).unflatten(1, (rows, self.width))
        cached_block, cached_segment = (
            torch.cat([own, new.repeat(1, room)], dim=1)[:, None]  # (R, 1, C)
            for own, new in zip(
                cached.to(device).unflatten(1, (rows, length)), (block, segment), strict=True
            )
        )
        self.visible = (cached_block == block[..., None]) & (
            (cached_segment == CONTEXT_SEGMENT) | (cached_segment == segment[..., None])
        )  # (R, Q, C), once they are written
        self.ended = ended.to(device)
        # Number of the new token that each slot of the cache holds; a prompt's are always there.
        written = torch.arange(length + self.width * room) - length
        self.number = written.div(self.width, rounding_mode="floor").clamp(min=-1).to(device)
        self.now = torch.zeros((), dtype=torch.long, device=device)
        self.columns = torch.arange(self.width, device=device) + length
        layers = model.config.get_text_config().num_hidden_layers
        self.layers = [_ZeroedLayer(len(written)) for _ in range(layers)]
        self.cache = Cache(layers=[*self.layers])
        self._write_to(torch.arange(length, device=device))

    def answers(
        self, stops: Sequence[int], record: bool
    ) -> tuple[list[list[int]], list[list[float]], list[float]]:
        """Answer all prompts.

        Args:
            stops: Tokens that end an answer.
            record: Whether to record a CUDA graph.

        Returns:
            Of each prompt the new tokens, which may go on after the answer's end, with their
            log-probabilities; and the log-probability of the gold answer, 0 without one.
        """
        inputs = self.batch.model_inputs(self.batch.wanted[0])
        with sdpa_kernel(KERNELS):
            output = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        logits, count = output.logits[0], len(self.references)  # (marks, vocabulary)
        of_references = log_probabilities(
            logits, self.marks % count, self.marks // count, self.references
        )
        self.stop = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        self.stop[torch.tensor(stops, dtype=torch.long, device=logits.device)] = True
        value, token = logits[:count].float().log_softmax(-1).max(-1)
        place = self.place.to(token.device)
        shape = (self.room + 1, len(self.ended))
        self.tokens = torch.zeros(shape, dtype=torch.long, device=token.device)
        self.values = torch.zeros(shape, device=token.device)
        self.tokens[0, place], self.values[0, place] = token, value
        self.ended |= self.stop[self.tokens[0]]
        graph = None
        for number in range(self.room):
            if number % LOOK == 0 and bool(self.ended.all()):
                break
            if graph is not None:
                graph.replay()
            else:
                self._advance()  # also prepares kernels, which a recording must not
                if record and number + 1 < self.room:
                    graph = _recorder().record(self._advance)
        return (
            self.tokens[:, place].T.tolist(),
            self.values[:, place].T.tolist(),
            of_references.tolist(),
        )

    def _advance(self) -> None:
        """Read the newest token of each answer, and write the next; everything on the device."""
        shape = self.positions.shape  # (R, Q)
        self._write_to(self.columns + self.now * self.width)
        with sdpa_kernel(KERNELS):
            logits = self.model(
                input_ids=self.tokens.index_select(0, self.now[None]).view(shape),
                position_ids=self.positions,
                attention_mask=(self.visible & (self.number <= self.now))[:, None],  # (R, 1, Q, C)
                past_key_values=self.cache,
                use_cache=True,
            ).logits  # (R, Q, vocabulary)
        value, token = logits.float().log_softmax(-1).flatten(0, 1).max(-1)
        self.now += 1
        self.positions += 1
        self.tokens.index_copy_(0, self.now[None], token[None])
        self.values.index_copy_(0, self.now[None], value[None])
        self.ended |= self.stop[token]

    def _write_to(self, slots: torch.Tensor) -> None:
        for layer in self.layers:
            layer.slots = slots
