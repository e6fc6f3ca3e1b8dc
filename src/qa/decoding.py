"""Answers from a model: greedy decoding of many prompts at once, ending where an answer ends."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said: text, natural log-probability with the end token, and if it ended."""

    text: str
    log_probability: float
    ended: bool


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
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    max_new_tokens: int,
) -> list[Answer]:
    """The greedy answer to each prompt (token ids), the same as if it were asked alone.

    `model` is in eval mode. Prompts are padded on the left, with positions counted from their
    first real token; padding is masked out.
    """
    device = model.device
    longest = max(map(len, prompts))
    # (B, T) each
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
    )  # (B, T)
    ends = torch.tensor(stops, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
    log_probability = torch.zeros(len(prompts), device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    generated: list[torch.Tensor] = []
    cache = None
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        scores = output.logits[:, -1].float().log_softmax(-1)  # (B, vocabulary)
        best, token = scores.max(-1)  # (B,)
        log_probability += best.masked_fill(ended, 0.0)
        generated.append(token.masked_fill(ended, -1))
        ended |= torch.isin(token, ends)
        if ended.all():
            break
        ids = token.unsqueeze(1)  # (B, 1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    rows = torch.stack(generated, dim=1).tolist()  # B lists of tokens, -1 behind an answer's end
    return [
        Answer(text_of(tokenizer, [i for i in row if i >= 0]), probability, end)
        for row, probability, end in zip(
            rows, log_probability.tolist(), ended.tolist(), strict=True
        )
    ]
