"""The most probable answers among the spans of the context, found exactly.

The tokens of all spans form a tree, shared beginnings once. A span is at most as probable as what
it begins with: the tree is searched from the most probable beginning on, for all questions of a
batch side by side, and left where no span can beat those that are found.
"""

import heapq
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qa import prompt
from qa.decoding import Answer, Model, Shared, text_of
from qa.prompt import Parts

WORD = re.compile(r"\w+|[^\w\s]")  # where spans begin
CHARACTERS = 8  # of a token, at most on average: a longer span is not looked at
AT_ONCE = 3  # beginnings of a question that are read at once
LIMIT = 8  # times max_new_tokens: beginnings that are read of a question, at most

Tree = dict[int, Any]  # the tokens that may come next, and what may come behind each


@dataclass
class _Search:
    """What is known of one question: `open` beginnings and complete `found` spans, as heaps."""

    count: int
    open: list[tuple[float, int, int, int, Tree, tuple[int, ...]]] = field(default_factory=list)
    found: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    read: int = 0

    @property
    def bound(self) -> float:
        """What a span must be more probable than."""
        return self.found[0][0] if len(self.found) == self.count else float("-inf")

    def add(self, score: float, ids: tuple[int, ...]) -> None:
        """Keep a complete span, if it is among the best `count`."""
        put = heapq.heappush if len(self.found) < self.count else heapq.heappushpop
        put(self.found, (score, ids))

    @property
    def done(self) -> bool:
        """Whether no open beginning can become a better span."""
        return not self.open or -self.open[0][0] <= self.bound

    def next(self, limit: int) -> list[tuple[float, int, int, int, Tree, tuple[int, ...]]]:
        """The beginnings to read now."""
        chosen = []
        while not self.done and len(chosen) < AT_ONCE and self.read < limit:
            chosen.append(heapq.heappop(self.open))
            self.read += 1
        return chosen


@torch.no_grad()
def most_probable_spans(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Parts],
    stops: Sequence[int],
    max_new_tokens: int,
    packed_length: int,
    attention: str = "causal",
    count: int = 1,
) -> list[list[Answer]]:
    """The `count` most probable spans of each prompt's context, the most probable first.

    The log-probability is that of the span's tokens and of any of `stops` behind them. An answer
    has `ended` if the search has: if it was not given up after too many beginnings.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda n: prompts[n].context)
    prompts = [prompts[n] for n in order]
    trees: dict[tuple[int, ...], Tree] = {}
    for parts in prompts:
        key = tuple(parts.context)
        if key not in trees:
            trees[key] = tree(tokenizer, tokenizer.decode(parts.context), max_new_tokens - 1)
    way = Shared(model, prompts, packed_length, LIMIT * max_new_tokens, attention)
    ends = torch.tensor(stops, device=model.device)
    searches = [_Search(count) for _ in prompts]
    serial = itertools.count()  # heaps compare no trees
    logits = way.start()  # (prompts, vocabulary)
    reading = [(row, 0.0, trees[tuple(parts.context)], ()) for row, parts in enumerate(prompts)]
    node = 0
    while reading:
        scores = logits.float().log_softmax(-1)
        over = scores[:, ends].logsumexp(-1).tolist()
        for place, (row, score, behind, ids) in enumerate(reading):
            search = searches[row]
            if ids or not behind:  # where there is no span, to say nothing is the answer
                search.add(score + over[place], ids)
            children = list(behind)
            values = (score + scores[place, children]).tolist()
            for token, value in zip(children, values, strict=True):
                if value > search.bound:
                    entry = (-value, next(serial), node + place, token, behind[token])
                    heapq.heappush(search.open, (*entry, (*ids, token)))
        node += len(reading)
        reading, tokens, parents = [], [], []
        for row, search in enumerate(searches):
            for value, _, parent, token, behind, ids in search.next(LIMIT * max_new_tokens):
                reading.append((row, -value, behind, ids))
                tokens.append(token)
                parents.append(parent)
        if reading:
            fed, behind_of = (torch.tensor(t, device=model.device) for t in (tokens, parents))
            logits = way.go_on(fed, behind_of)
    answers = {
        number: [
            Answer(text_of(tokenizer, ids), score, search.done)
            for score, ids in sorted(search.found, reverse=True)
        ]
        for number, search in zip(order, searches, strict=True)
    }
    return [answers[number] for number in range(len(answers))]


def tree(tokenizer: PreTrainedTokenizerBase, context: str, longest: int) -> Tree:
    """The spans of `context` that begin with a word or a sign, of at most `longest` tokens, as an
    answer is tokenized."""
    characters = CHARACTERS * longest
    starts = [match.start() for match in WORD.finditer(context)]
    texts = [context[start : start + characters].split("\n")[0] for start in starts]
    root: Tree = {}
    for text, ids in zip(
        texts, prompt.encode(tokenizer, [prompt.answer_text(t) for t in texts]), strict=True
    ):
        cut = len(text) == characters  # perhaps in the middle of a token
        behind = root
        for token in ids[: len(ids) - cut][:longest]:
            behind = behind.setdefault(token, {})
    return root
