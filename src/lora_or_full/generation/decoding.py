"""Greedy decoding of many prompts at once, each ending where its answer ends."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from lora_or_full.data.prompt import PromptTokens
from lora_or_full.evaluation.predictions import Answer
from lora_or_full.generation.kv_cache import Model, PaddedCache, SharedPrefixCache
from lora_or_full.generation.rows import RowsDecoder

ROW_DEVICES = ("cuda",)  # where the decoding in rows is faster


class DecodingBackend(Protocol):
    """Computes the logits of answers that grow side by side."""

    def step(self, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Append a token (A) to each of the kept rows (A), and give the next logits.

        Returns:
            Logits (A, vocabulary).
        """


def stop_ids(tokenizer: PreTrainedTokenizerBase, *ends: int) -> list[int]:
    """Tokens that end an answer: end of text, `ends`, and all whose text holds a newline."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return sorted(
        {tokenizer.eos_token_id, *ends, *(i for i, text in enumerate(texts) if "\n" in text)}
    )


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode an answer, up to the first newline."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.lstrip(" ").split("\n")[0].strip()


@torch.no_grad()
def greedy(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptTokens],
    stops: Sequence[int],
    max_new_tokens: int,
    packed_length: int | None,
    references: Sequence[list[int]] | None = None,
    cuda_graphs: bool = True,
) -> list[Answer]:
    """Answer each prompt greedily, with the same result as if it were the only one.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        prompts: Prompts in any order.
        stops: Tokens that end an answer.
        max_new_tokens: Largest number of tokens of an answer.
        packed_length: Tokens of a block whose questions share a context; None if the model can't.
        references: Token ids of a gold answer per prompt, whose log-probability is computed too.
        cuda_graphs: Whether to record and replay steps on a GPU.

    Returns:
        An answer per prompt, in their order.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda n: prompts[n].context)
    prompts = [prompts[n] for n in order]
    ordered = None if references is None else [references[n] for n in order]
    if packed_length is not None and model.device.type in ROW_DEVICES:
        decoder = RowsDecoder(
            model, prompts, packed_length, max_new_tokens - 1, ordered or [[]] * len(prompts)
        )
        record = cuda_graphs and model.device.type == "cuda"
        ids, values, of_references = decoder.answers(stops, record)
        found = [answer(tokenizer, stops, *row) for row in zip(ids, values, strict=True)]
    else:
        backend = (
            PaddedCache(model, prompts, ordered)
            if packed_length is None
            else SharedPrefixCache(model, prompts, packed_length, max_new_tokens - 1, ordered)
        )
        logits, log_probabilities = backend.prefill()  # (prompts, vocabulary), (prompts,)
        of_references = log_probabilities.tolist()
        value, token = logits.float().log_softmax(-1).max(-1)  # (prompts,)
        found = continue_greedily(backend, token, value, tokenizer, stops, max_new_tokens)
    if references is not None:
        found = [
            replace(answer, reference_log_probability=number)
            for answer, number in zip(found, of_references, strict=True)
        ]
    answers = dict(zip(order, found, strict=True))
    return [answers[number] for number in range(len(answers))]


def continue_greedily(
    backend: DecodingBackend,
    token: torch.Tensor,
    value: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    max_new_tokens: int,
) -> list[Answer]:
    """Continue answers greedily from their first tokens.

    Args:
        backend: Computes the next logits.
        token: First token of each answer (B).
        value: Its log-probability (B).
        tokenizer: The model's tokenizer.
        stops: Tokens that end an answer.
        max_new_tokens: Largest number of tokens of an answer, the first included.
    """
    ends = torch.tensor(stops, device=token.device)
    generated: list[list[int]] = [[] for _ in token]
    values: list[list[float]] = [[] for _ in token]
    active = list(range(len(token)))  # rows whose answers are not finished
    for left in reversed(range(max_new_tokens)):
        for row, number, chosen in zip(active, value.tolist(), token.tolist(), strict=True):
            generated[row].append(chosen)
            values[row].append(number)
        kept = (~torch.isin(token, ends)).nonzero().squeeze(1)
        active = [active[row] for row in kept.tolist()]
        if not active or not left:
            break
        logits = backend.step(token[kept], kept)  # (active, vocabulary)
        value, token = logits.float().log_softmax(-1).max(-1)
    return [answer(tokenizer, stops, *row) for row in zip(generated, values, strict=True)]


def answer(
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    ids: Sequence[int],
    values: Sequence[float],
) -> Answer:
    """Make an answer of generated tokens and their log-probabilities, up to the first stop."""
    ends = set(stops)
    size = next((n for n, token in enumerate(ids, 1) if token in ends), len(ids))
    ended = size > 0 and ids[size - 1] in ends
    return Answer(text_of(tokenizer, ids[:size]), sum(values[:size]), ended)
