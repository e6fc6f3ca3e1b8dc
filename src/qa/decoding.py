"""Answers from a model: greedy decoding of many prompts at once, ending where an answer ends.

Where a model can share a context (`shares_context`), it is prefilled once for all its questions,
and their answers grow side by side in one sequence; else each prompt is a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from qa.packing import NOTHING, Block, block_inputs, packed, padded, sees
from qa.prompt import IGNORED, Parts

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said: text, natural log-probability with the end token, and if it ended; and the
    log-probability of the gold answer, where one was given."""

    text: str
    log_probability: float
    ended: bool
    gold_log_probability: float | None = None


class Way(Protocol):
    """How answers that grow side by side are computed.

    The ends of prompts, and each token behind them, are nodes, numbered as they come."""

    def go_on(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """The logits behind one token more each (A) of the nodes `parents` (A): the next nodes."""


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: end of text, and all whose text holds a newline."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return sorted({tokenizer.eos_token_id, *(i for i, text in enumerate(texts) if "\n" in text)})


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The answer that generated token ids spell, up to the first newline."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.lstrip(" ").split("\n")[0].strip()


@torch.no_grad()
def greedy(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Parts],
    stops: Sequence[int],
    max_new_tokens: int,
    packed_length: int | None,
    attention: str = "causal",
    golds: Sequence[list[int]] | None = None,
) -> list[Answer]:
    """The greedy answer to each prompt, the same as if it were asked alone.

    `model` is in eval mode. Questions share equal contexts in blocks of `packed_length` tokens;
    None if the model can't. `attention` is that of `Parts.shared`. `golds` are token ids, read in
    the same pass as the prompts.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda n: prompts[n].context)
    prompts = [prompts[n] for n in order]
    ordered = None if golds is None else [golds[n] for n in order]
    way = (
        Rows(model, prompts, ordered)
        if packed_length is None
        else Shared(model, prompts, packed_length, max_new_tokens - 1, attention, ordered)
    )
    value, token = way.start().float().log_softmax(-1).max(-1)  # (prompts,)
    found = continued(way, token, value, tokenizer, stops, max_new_tokens)
    if golds is not None:
        found = [
            replace(answer, gold_log_probability=number)
            for answer, number in zip(found, way.gold_log_probability.tolist(), strict=True)
        ]
    answers = dict(zip(order, found, strict=True))
    return [answers[number] for number in range(len(answers))]


def continued(
    way: Way,
    token: torch.Tensor,
    value: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    max_new_tokens: int,
) -> list[Answer]:
    """The answers that begin with each `token` (B), of log-probability `value` (B), and go on
    greedily."""
    ends = torch.tensor(stops, device=token.device)
    generated: list[list[int]] = [[] for _ in token]
    log_probability = [0.0] * len(token)
    ended = [False] * len(token)
    active = list(range(len(token)))  # the rows whose answers go on
    nodes = torch.arange(len(token), device=token.device)  # their ends
    for left in reversed(range(max_new_tokens)):
        going = ~torch.isin(token, ends)
        for row, number, chosen, goes in zip(
            active, value.tolist(), token.tolist(), going.tolist(), strict=True
        ):
            generated[row].append(chosen)
            log_probability[row] += number
            ended[row] = not goes
        kept = going.nonzero().squeeze(1)
        active = [active[row] for row in kept.tolist()]
        if not active or not left:
            break
        logits = way.go_on(token[kept], nodes[kept])  # (active, vocabulary)
        nodes = nodes[-1] + 1 + torch.arange(len(kept), device=token.device)
        value, token = logits.float().log_softmax(-1).max(-1)
    return [
        Answer(text_of(tokenizer, ids), number, end)
        for ids, number, end in zip(generated, log_probability, ended, strict=True)
    ]


def shares_context(model: Model, length: int) -> bool:
    """Whether `model` (float32, eval mode) answers over a shared context as over one of its own:
    tried on two prompts and two tokens behind each, `length` tokens or all that the model reads."""
    length = max(2, min(length, model.config.max_position_embeddings) - 2)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (length,), generator=draw).tolist()
    size = max(1, length // 8)
    prompts = [Parts([], ids[size:], ids[:size]), Parts([], ids[size:], ids[size - 1 :: -1])]
    try:
        shared, alone = (
            _trial(Shared(model, prompts, 2 * length, 2)),
            _trial(Rows(model, prompts)),
        )
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False  # it does not take these arguments, or can't compute with them
    return bool((shared - alone).abs().max() < 1e-3 * alone.std())


@torch.no_grad()
def _trial(way: "Shared | Rows") -> torch.Tensor:
    """The logits (3, 2, vocabulary) behind two prompts, and behind one and two tokens more."""
    both = torch.arange(2)
    return torch.stack([way.start(), way.go_on(both, both), way.go_on(both, both + 2)])


class Shared:
    """Prompts as blocks of one sequence; new tokens see what theirs may see.

    The ends of prompts, and each new token, are nodes, numbered as they come. In the cache each
    block has a place of its own, with room for `room` new tokens a prompt: what its tokens see lies
    together, and is not copied to be read. Prompts of the same context stand together.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Parts],
        packed_length: int,
        room: int,
        attention: str = "causal",
        golds: Sequence[list[int]] | None = None,
    ) -> None:
        self.model = model
        contexts, questions = zip(*(p.shared(attention) for p in prompts), strict=True)
        self.golds = golds or [[]] * len(prompts)
        read = [gold[:-1] for gold in self.golds]  # behind its last token nothing is predicted
        # The label of a question's last token says which prompt it is of; the tokens of its gold
        # answer go on from there in steps of the number of prompts.
        marks = [
            [IGNORED] * (len(q) - 1) + [row + n * len(prompts) for n in range(1 + len(gold))]
            for row, (q, gold) in enumerate(zip(questions, read, strict=True))
        ]
        given = None if attention == "causal" else list(map(len, questions))
        branches = [q + gold for q, gold in zip(questions, read, strict=True)]
        sequence = packed(contexts, branches, marks, packed_length, given).to(model.device)
        marked = (sequence.labels[0] != IGNORED).nonzero().squeeze(1)
        marked = marked[sequence.labels[0, marked].argsort()]
        self.of_marked = sequence.labels[0, marked]
        ends, answered = marked[: len(prompts)], marked[len(prompts) :]
        self.inputs = sequence.model_inputs(marked)
        # Of each node (N): its block, its branch, the position behind it, and where in the
        # cache the new tokens on the way to it lie.
        self.block, self.branch = sequence.block_of[ends], sequence.branch_of[ends]
        self.positions = sequence.position_ids[0, ends] + 1
        self.ways: list[list[int]] = [[] for _ in prompts]
        # Of each block: where in the cache it begins, its prompts' tokens end, and all do.
        sizes = torch.tensor([block.stop - block.start for block in sequence.blocks])
        rooms = room * torch.bincount(self.block.cpu(), minlength=len(sizes))
        self.starts: list[int] = ((sizes + rooms).cumsum(0) - sizes - rooms).tolist()
        self.read = [start + size for start, size in zip(self.starts, sizes.tolist(), strict=True)]
        self.used = list(self.read)
        shift = torch.tensor(self.starts) - torch.tensor([b.start for b in sequence.blocks])
        places = torch.arange(len(sequence.block_of)) + shift[sequence.block_of.cpu()]  # (T,)
        size = int((sizes + rooms).sum())
        self.branch_of = torch.full((size,), NOTHING, device=model.device)
        self.branch_of[places] = sequence.branch_of
        self.branch_of[places[answered.cpu()]] = NOTHING  # new tokens must not see them
        layers = model.config.get_text_config().num_hidden_layers
        self.layers = [_Room(size) for _ in range(layers)]
        self._write_to(places)

    def start(self) -> torch.Tensor:
        """The logits behind each prompt: (prompts, vocabulary)."""
        self.cache = Cache(layers=[*self.layers])
        output = self.model(**self.inputs, past_key_values=self.cache, use_cache=True)
        count = len(self.golds)
        rows, places = self.of_marked % count, self.of_marked // count
        self.gold_log_probability = _of_golds(output.logits[0], rows, places, self.golds)
        return output.logits[0, :count]

    def go_on(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """The logits behind one token more each (A) of the nodes `parents` (A): the next nodes."""
        order = self.block[parents].argsort(stable=True)  # a block's tokens stand together
        tokens, parents = tokens[order], parents[order]
        block, branch = self.block[parents], self.branch[parents]
        blocks: list[Block] = []
        ways: list[list[int]] = []
        numbers, counts = block.unique_consecutive(return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            first, begin, read = len(ways), self.starts[number], self.read[number]
            seen = sees(branch[first : first + count], self.branch_of[begin:read])
            new = torch.zeros(count, self.used[number] + count - read, dtype=torch.bool)
            for row, parent in enumerate(parents[first : first + count].tolist()):
                ways.append([*self.ways[parent], self.used[number] + row])
                new[row, torch.tensor(ways[-1]) - read] = True
            self.used[number] += count
            mask = torch.cat([seen, new.to(seen.device)], dim=1)  # (count, seen)
            blocks.append(Block(first, len(ways), mask, slice(begin, self.used[number])))
        self._write_to(torch.tensor([way[-1] for way in ways]))
        positions = self.positions[parents]
        output = self.model(
            **block_inputs(tokens[None], positions[None], blocks),
            past_key_values=self.cache,
            use_cache=True,
        )
        back = order.argsort()
        self.block = torch.cat([self.block, block[back]])
        self.branch = torch.cat([self.branch, branch[back]])
        self.positions = torch.cat([self.positions, positions[back] + 1])
        self.ways += [ways[row] for row in back.tolist()]
        return output.logits[0, back]

    def _write_to(self, places: torch.Tensor) -> None:
        """Where in the cache the tokens that are read next go."""
        for layer in self.layers:
            layer.places = places.to(self.model.device)


def _of_golds(
    logits: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, golds: Sequence[list[int]]
) -> torch.Tensor:
    """The summed log-probability of each of `golds` (B): `logits` (N, vocabulary) are those of the
    token at each of `places` (N) in the gold of each of `rows` (N); those behind its end count for
    nothing."""
    total = logits.new_zeros(len(golds), dtype=torch.float32)
    held = [
        (n, row, golds[row][place])
        for n, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True))
        if place < len(golds[row])
    ]
    if not held:
        return total
    number, row, token = (
        torch.tensor(part, device=logits.device) for part in zip(*held, strict=True)
    )
    scores = logits[number].float().log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    return total.index_add_(0, row, scores)


class _Room(DynamicLayer):
    """The keys and values of a layer, `size` places of them, written at `places`.

    transformers' growing layer copies all that there is at each token, which took half of the time;
    its static one can't hold keys and values of unlike precision, as rotary positions make them.
    """

    places: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve the room; memory is taken when it is written."""
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self.size, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (1, heads, new, width); gives all places (1, heads, size, width),
        but the first ones, which see nothing older, as they came."""
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.places, key_states)
        self.values.index_copy_(2, self.places, value_states)
        return (key_states, value_states) if first else (self.keys, self.values)


class Rows:
    """Prompts as rows padded on the left, with positions counted from their first real token.

    Nodes are as in Shared; only the newest can go on."""

    def __init__(
        self, model: Model, prompts: Sequence[Parts], golds: Sequence[list[int]] | None = None
    ) -> None:
        self.model, self.first = model, 0  # of the newest nodes
        self.prompts, self.golds = prompts, golds
        longest = max(len(p.prompt) for p in prompts)
        rows = [[0] * (longest - len(p.prompt)) + p.prompt for p in prompts]
        self.ids = torch.tensor(rows, device=model.device)  # (B, T)
        lengths = torch.tensor([len(p.prompt) for p in prompts], device=model.device)
        columns = torch.arange(longest, device=model.device)
        self.mask = (columns >= longest - lengths[:, None]).long()  # (B, T)

    def start(self) -> torch.Tensor:
        """The logits behind each prompt: (B, vocabulary)."""
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        if self.golds is not None:
            self.gold_log_probability = self._golds()
        return output.logits[:, -1]

    def _golds(self) -> torch.Tensor:
        """The log-probability of each gold answer (B), read in a pass of its own: this one's rows
        end where their prompts end."""
        assert self.golds is not None
        ids = [p.prompt + gold[:-1] for p, gold in zip(self.prompts, self.golds, strict=True)]
        ends = torch.tensor([len(p.prompt) - 1 for p in self.prompts])
        longest = max(len(gold) for gold in self.golds)
        columns = torch.unique(ends[:, None] + torch.arange(max(1, longest)))
        rows = padded(ids, [[]] * len(ids)).to(self.model.device)
        columns = columns[columns < rows.input_ids.shape[1]]
        logits = self.model(**rows.model_inputs(columns.to(self.model.device))).logits
        places = columns - ends[:, None]  # (B, K): which token of the answer is predicted there
        of, at = (places >= 0).nonzero(as_tuple=True)
        return _of_golds(logits[of, at], of, places[of, at], self.golds)

    def go_on(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """The logits behind one token more each (A) of the nodes `parents` (A): the next nodes."""
        kept = parents - self.first
        self.first += len(self.mask)
        if len(kept) < len(self.mask):
            self.cache.batch_select_indices(kept)
        self.mask = torch.cat([self.mask[kept], torch.ones_like(tokens)[:, None]], dim=1)
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(-1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]
