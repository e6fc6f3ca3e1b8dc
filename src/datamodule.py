"""SQuAD in, batches out: tokens, labels, and the loaders for training, validation and test."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lora_or_full.config.schema import Config
from lora_or_full.data import prompt, tokenized
from lora_or_full.data.prompt import IGNORED, Prompt, PromptTokens
from lora_or_full.data.sampler import ResumableLoader, StepSampler, evaluation_batches
from lora_or_full.data.splits import NAMES, Read, Splits
from lora_or_full.data.squad import fingerprint
from lora_or_full.data.tokenized import TokenizedQuestion, TokenizedQuestions
from lora_or_full.errors import UserError
from lora_or_full.modeling.packed_rows import Sequences, in_rows
from lora_or_full.modeling.prefix_packing import packed, padded


class EvaluationBatch(NamedTuple):
    """Questions to answer.

    Attributes:
        rows: The tokenized questions.
        prompts: Their prompts; None where one is too long.
        references: Token ids of the gold answers that are taught; empty where prompt and answer
            together do not fit into the model.
    """

    rows: list[TokenizedQuestion]
    prompts: list[PromptTokens | None]
    references: list[list[int]]

    def to(self, device: torch.device) -> "EvaluationBatch":
        """Stay as it is. Without this Lightning would look for tensors in all of it."""
        return self


class SquadDataModule(L.LightningDataModule):
    """Tokenized questions of a data set in SQuAD's format, as batches.

    A step of `batch_size` questions is dealt to `accumulate_grad_batches` micro-batches on each
    device. The questions of a batch share equal contexts in blocks of `packed_length` tokens.

    Args:
        config: The run's configuration.
        tokenizer: The model's tokenizer.
        positions: Tokens that the model can read at once.

    Attributes:
        packed_length: None, until it is set, gives each question a row of its own. Training without
            `mask_prompt` always does, since a shared context would count once.
        in_rows: Whether packed questions lie in rows of recurring shapes, for a GPU.
        max_prompt_length: Largest number of tokens of a prompt in evaluation.
        train: Tokenized questions, after `setup`; `validation` and `test` likewise.
        facts: Counts and fingerprints, after `setup`.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        super().__init__()
        self.config, self.tokenizer, self.positions = config, tokenizer, positions
        self.splits = Splits(config.data, config.seed, Path(config.cache_dir))
        self.max_prompt_length = min(config.max_length, positions - config.max_new_tokens)
        self.packed_length: int | None = None
        self.in_rows = False
        self.devices, self.device = 1, 0
        self.prompt = Prompt(tokenizer, config.prompt)
        self.train: TokenizedQuestions
        self.validation: TokenizedQuestions
        self.test: TokenizedQuestions
        self.facts: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load the questions of all splits from the cache, or tokenize and cache them.

        Raises:
            UserError: The data is not available, or not in SQuAD's format.
        """
        if self.facts:
            return
        facts: dict[str, Any] = {"source": self.splits.fingerprint()}
        read = cache(self.splits.read)  # once for all splits, and not at all if they are cached
        for name in NAMES:
            folder = self._cache_folder(name, facts["source"])
            table, facts[name] = tokenized.cached(folder, partial(self._build, name, read))
            setattr(self, name, table)
            longest = self.config.max_new_tokens
            facts[name]["answers_too_long"] = sum(n > longest for n in table.column("gold_tokens"))
        sizes = zip(*map(self.validation.column, ("prompt_tokens", "answer_tokens")), strict=True)
        if not any(p <= self.max_prompt_length and p + a <= self.positions for p, a in sizes):
            raise UserError(
                f"No validation question fits into max_length={self.config.max_length} and, with "
                f"its answer, into the {self.positions} tokens that the model reads. There "
                "would be no validation loss."
            )
        self.facts = facts

    def deal(self, devices: int, device: int) -> None:
        """Share each step and the batches to evaluate among devices; this is `device`, from 0."""
        self.devices, self.device = devices, device

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return -(-len(self.train) // self.config.batch_size)

    def train_dataloader(self) -> DataLoader:
        """Give the micro-batches of each step, in an order that seed and epoch fix."""
        labels = self.train.column("answer_tokens")
        if not self.config.mask_prompt:
            before = self.train.column("prompt_tokens")
            labels = [own + more - 1 for own, more in zip(labels, before, strict=True)]
        together = self.config.data.draw_by == "paragraph"
        sampler = StepSampler(
            labels,
            self.train.column("paragraph") if together else None,
            self.config.batch_size,
            self.config.trainer.accumulate_grad_batches,
            self.config.seed,
            self.devices,
            self.device,
        )
        dataset = _MicroBatches(self.train, self.collate_training)
        return ResumableLoader(dataset, sampler=sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Give all validation questions, those of a paragraph together, the longest first."""
        return self._evaluation_loader(self.validation, skip=0)

    def test_dataloader(self, skip: int = 0) -> DataLoader:
        """Give all test questions in the same way, without the first `skip` batches."""
        return self._evaluation_loader(self.test, skip)

    def collate_training(
        self, rows: Sequence[TokenizedQuestion], step_labels: int
    ) -> dict[str, Any]:
        """Collate a micro-batch.

        Args:
            rows: Its tokenized questions.
            step_labels: Number of labels of the whole step.

        Returns:
            `sequences` (packed or padded), `step_labels`, and the number of `samples` and of
            `tokens` of prompts and answers, where a shared context counts for each question.
        """
        prompts = list(map(tokenized.prompt_of, rows))
        answers = [row["answer_ids"] for row in rows]
        length = self.packed_length if self.config.mask_prompt else None
        made = sequences(prompts, answers, self.config.mask_prompt, length, self.in_rows)
        return {
            "sequences": made,
            "step_labels": step_labels,
            "samples": len(rows),
            "tokens": sum(row["prompt_tokens"] + row["answer_tokens"] for row in rows),
        }

    def collate_evaluation(self, rows: Sequence[TokenizedQuestion]) -> EvaluationBatch:
        """Collate questions to answer."""
        parts = list(map(tokenized.prompt_of, rows))
        asked = [part if len(part.prompt) <= self.max_prompt_length else None for part in parts]
        references = [
            row["answer_ids"]
            if part is not None and len(part.prompt + row["answer_ids"]) <= self.positions
            else []
            for part, row in zip(asked, rows, strict=True)
        ]
        return EvaluationBatch(list(rows), asked, references)

    def _evaluation_loader(self, table: TokenizedQuestions, skip: int) -> DataLoader:
        batches = evaluation_batches(table, self.config.eval_batch_size)[skip:]
        # Devices work in step, so each gets as many batches. Batches do not depend on the number of
        # devices, and so the answers do not.
        batches += [[] for _ in range(-len(batches) % self.devices)]
        own = batches[self.device :: self.devices]
        return DataLoader(table, batch_sampler=own, collate_fn=self.collate_evaluation)

    def _cache_folder(self, name: str, source: str) -> Path:
        """Cache folder of a split, named by all that it depends on."""
        key = {
            "format": tokenized.FORMAT,
            "source": source,
            **self.splits.key(name),
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "prompt": [*self.prompt.template, self.prompt.start, self.prompt.end],
            "length": self.config.max_length if name == "train" else self.max_prompt_length,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
        return Path(self.config.cache_dir) / "data" / digest.hexdigest()[:24]

    def _build(
        self, name: str, read: Callable[[], Read]
    ) -> tuple[TokenizedQuestions, dict[str, Any]]:
        """Tokenize a split of those that `read` gives, and count it."""
        data = read()
        questions, training = data.splits[name], name == "train"
        length = self.config.max_length if training else self.max_prompt_length
        table = tokenized.make(questions, self.prompt, length, training)
        if not len(table):
            raise UserError(
                f"No question of the {name} split fits into max_length={self.config.max_length}."
            )
        return table, {
            "questions": len(table),
            "paragraphs": len(set(table.column("paragraph"))),
            "articles": len(set(table.column("title"))),
            "truncated": sum(table.column("context_cut")),
            "dropped": len(questions) - len(table),
            "fingerprint": fingerprint(questions),
            "in_all_files": data.counts,
            "split_by": data.split_by,
            "notes": data.notes,
        }


def sequences(
    prompts: Sequence[PromptTokens],
    answers: Sequence[list[int]],
    mask_prompt: bool,
    packed_length: int | None,
    rows: bool = False,
) -> Sequences:
    """Put prompts and answers into sequences with labels.

    Args:
        prompts: Token ids of the prompts.
        answers: Token ids of their answers, each with the end-of-text token.
        mask_prompt: Whether only the answers carry loss.
        packed_length: Tokens of a block that shares a context; None for padded rows.
        rows: Whether blocks lie in rows.
    """
    labels = [
        prompt.labels(part.prompt, answer, mask_prompt)
        for part, answer in zip(prompts, answers, strict=True)
    ]
    if packed_length is None:
        ids = [part.prompt + answer for part, answer in zip(prompts, answers, strict=True)]
        return padded(ids, labels)
    contexts = [part.prefix + part.context for part in prompts]
    branches = [part.question + answer for part, answer in zip(prompts, answers, strict=True)]
    targets = [own[-len(branch) :] for own, branch in zip(labels, branches, strict=True)]
    return (in_rows if rows else packed)(contexts, branches, targets, packed_length)


class _MicroBatches(torch.utils.data.Dataset):
    """The micro-batches that a StepSampler names, collated."""

    def __init__(
        self, rows: TokenizedQuestions, collate: Callable[[Sequence[TokenizedQuestion], int], Any]
    ) -> None:
        self.rows, self.collate = rows, collate

    def __getitem__(self, item: tuple[list[int], int]) -> Any:
        numbers, step_labels = item
        if numbers:
            return self.collate([self.rows[number] for number in numbers], step_labels)
        # An empty micro-batch computes a row without labels, so that devices stay in step.
        batch = self.collate([self.rows[0]], step_labels)
        batch["sequences"].wanted[1].fill_(IGNORED)
        return batch | {"samples": 0, "tokens": 0}
