"""Pretrain the built-in model: a small GPT-2 that has learned to look up facts in a paragraph.

It reads made-up paragraphs, each followed by its facts restated in other words. It never reads a
question: answering is what fine-tuning has to teach.

    python scripts/make_model.py
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from builtin_text import KINDS, Writer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
POSITIONS = 512
BATCH_TOKENS = 4096
HEADS = 6


@dataclass(frozen=True)
class Stage:
    """A stage of pretraining."""

    share: float  # of the steps
    length: int  # tokens a row
    sizes: tuple[tuple[int, ...], ...]  # facts of each subject of a paragraph, drawn from these
    retellings: int  # restated facts after a paragraph


# Short paragraphs first: looking up begins with copying, which short texts teach fastest.
STAGES = (
    Stage(0.15, 128, ((2,), (3,), (2, 1)), 6),
    Stage(0.15, 256, ((2, 2), (2, 3), (3, 2)), 8),
    Stage(0.70, POSITIONS, ((3, 3), (3, 4), (4, 3), (4, 4)), 12),
)


def document(writer: Writer, sizes: tuple[int, ...], retellings: int) -> list[tuple[str, bool]]:
    """Write a paragraph and facts restated, in pieces: text, and whether it is a value."""
    # Half of the paragraphs are hard: most facts have a rival, as few have in the data set.
    shared = writer.rng.choice((None, 1)) if len(sizes) == 2 else None
    paragraph = writer.paragraph(writer.rng.choice(list(KINDS)), writer.word(), sizes, shared)
    pieces = [(paragraph.text + "\n", False)]
    for number, fact in enumerate(writer.rng.choices(paragraph.facts, k=retellings)):
        before, value = writer.retelling(fact)
        pieces.append((" " * (number > 0) + before, False))
        pieces.append((f" {value}", True))
        pieces.append((".", False))
    return pieces


def train_tokenizer(writer: Writer, size: int, texts: int = 4000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer like GPT-2's; the end token has id 0."""
    read = ("".join(text for text, _ in document(writer, (4, 3), 8)) for _ in range(texts))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def batches(writer: Writer, tokenizer: Tokenizer, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the token ids of each step, and which of them belong to a restated value."""
    for stage in STAGES:
        for _ in range(round(stage.share * steps)):
            rows = [row(writer, tokenizer, stage) for _ in range(BATCH_TOKENS // stage.length)]
            ids, values = zip(*rows, strict=True)
            yield torch.tensor(ids), torch.tensor(values)  # (B, T) each


def row(writer: Writer, tokenizer: Tokenizer, stage: Stage) -> tuple[list[int], list[bool]]:
    """Fill a row with documents; the last one is cut off."""
    ids: list[int] = []
    values: list[bool] = []
    while len(ids) < stage.length:
        pieces = document(writer, writer.rng.choice(stage.sizes), stage.retellings)
        coded = tokenizer.encode_batch_fast([text for text, _ in pieces])
        for (_, is_value), code in zip(pieces, coded, strict=True):
            ids += code.ids
            values += [is_value] * len(code.ids)
        ids.append(0)
        values.append(False)
    return ids[: stage.length], values[: stage.length]


def untrained(vocabulary: int, end: int, width: int = 192, layers: int = 4) -> GPT2LMHeadModel:
    """Make a GPT-2 of random weights, except for heads that attend to earlier tokens."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    look_back(model)
    return model


def look_back(model: GPT2LMHeadModel) -> None:
    """Initialize three heads of the first layer to attend to the token one or two before.

    To copy a name, a model has to know which token came before it. Training alone finds that out
    only after many steps.
    """
    width = model.config.n_embd
    half, size = width // 2, width // HEADS
    rates = math.pi * torch.rand(half)  # radians a position
    rates[half // 2 :] = torch.logspace(
        0, -3, half // 2
    )  # slow ones, to distinguish distant positions
    angles = torch.arange(POSITIONS)[:, None] * rates
    weights = dict(model.transformer.named_parameters())
    with torch.no_grad():
        queries, keys, values = weights["h.0.attn.c_attn.weight"].split(width, dim=1)
        weights["wpe.weight"].copy_(0.04 * torch.cat([angles.sin(), angles.cos()], dim=1))
        for head, back in enumerate((1, 1, 2)):
            pairs = torch.arange(head, half // 2, 3)  # a third of the fast rates
            cos, sin = ((rates[pairs] * back).cos().diag(), (rates[pairs] * back).sin().diag())
            one, none = torch.eye(len(pairs)), torch.zeros(len(pairs), len(pairs))
            # The query is the position turned back, so it is most like the key `back` before it.
            query, key = torch.zeros(2, width, size)
            query[pairs], query[pairs + half] = torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)
            key[pairs], key[pairs + half] = torch.cat([one, none], 1), torch.cat([none, one], 1)
            here = slice(head * size, (head + 1) * size)
            queries[:, here], keys[:, here] = 2 * query, 2 * key
            nn.init.orthogonal_(values[:, here])
            nn.init.orthogonal_(weights["h.0.attn.c_proj.weight"][here], gain=0.05)


def pretrain(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, writer: Writer, steps: int, lr: float
) -> None:
    """Train the model in place, and print its loss."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".h." not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    model.train()
    start, mean = time.time(), torch.zeros(2)
    for step, (ids, values) in enumerate(batches(writer, tokenizer, steps), start=1):
        targets, values = ids[:, 1:], values[:, 1:]
        # A quarter of the other tokens is enough: new random names can't be learned.
        learned = values | (torch.rand(values.shape) < 0.25)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.transformer(ids[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden[learned])  # (N, V)
        losses = nn.functional.cross_entropy(logits.float(), targets[learned], reduction="none")
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, step / 50, 1.01 - step / steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()
        means = torch.stack([losses.mean(), losses[values[learned]].mean()]).detach()
        mean += (1.0 if step == 1 else 0.05) * (means - mean)
        if step % 50 == 0:
            figures = "loss {:.3f}, of restated values {:.3f}".format(*mean.tolist())
            print(f"step {step}: {figures}, {time.time() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("assets/model"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=5e-3)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(Writer("pretrain", args.seed + 1), size=1536)
    model = untrained(len(tokenizer), end=tokenizer.eos_token_id)
    pretrain(model, tokenizer.backend_tokenizer, Writer("pretrain", args.seed), args.steps, args.lr)
    model.bfloat16().save_pretrained(args.output)
    # The weights are stored in 16 bits, but are to be loaded in float32, as fine-tuning does.
    file = args.output / "config.json"
    file.write_text(file.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
