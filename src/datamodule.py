"""SQuAD in, batches out: tokens, labels, and the loaders for training, validation and test."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lora_or_full.data import prompt, tokenized
from lora_or_full.data.prompt import IGNORED, PromptTokens
from lora_or_full.data.sampler import ResumableLoader, StepSampler
from lora_or_full.data.splits import NAMES, Splits
from lora_or_full.data.squad import Question, fingerprint
from lora_or_full.data.tokenized import TokenizedQuestion, TokenizedQuestions
from lora_or_full.errors import UserError
from lora_or_full.modeling.prefix_packing import Sequences, packed, padded


class EvaluationBatch(NamedTuple):
    """Questions to evaluate: their `rows`, their `prompts` (None where one is too long), and the
    token ids of their `golds`, the answers that are taught (empty where prompt and answer do not
    fit)."""

    rows: list[TokenizedQuestion]
    prompts: list[PromptTokens | None]
    golds: list[list[int]]


class SquadDataModule(L.LightningDataModule):
    """The questions of `splits` as batches.

    `batch_size` questions make an optimizer step, dealt to `parts` on each device. `max_length` is
    the most tokens of a question with its context and answer in training, `max_prompt_length` of a
    prompt that is evaluated, `positions` of all that the model can read. The questions of a batch
    share equal contexts in blocks of `packed_length` tokens; None gives each a row of its own, and
    so does training without `mask_prompt`, where a shared context would count once.

    After `setup`, `train`, `validation` and `test` hold rows, and `facts` counts and fingerprints.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits,
        batch_size: int,
        eval_batch_size: int,
        max_length: int,
        max_prompt_length: int,
        positions: int,
        mask_prompt: bool,
        packed_length: int | None,
        parts: int,
        cache_dir: Path,
    ) -> None:
        super().__init__()
        self.tokenizer, self.splits, self.cache_dir = tokenizer, splits, cache_dir
        self.batch_size, self.eval_batch_size, self.parts = batch_size, eval_batch_size, parts
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.positions, self.mask_prompt, self.packed_length = positions, mask_prompt, packed_length
        self.devices, self.device = 1, 0
        self.prefix = prompt.prefix_ids(tokenizer)
        self.train: TokenizedQuestions
        self.validation: TokenizedQuestions
        self.test: TokenizedQuestions
        self.facts: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load the rows of all splits: from the cache, or made now and put there.

        Raises:
            UserError: the data can't be had, or is not what it should be.
        """
        if self.facts:
            return
        source = self.splits.fingerprint()
        facts: dict[str, Any] = {"source": source}
        read: list[tuple[dict[str, list[Question]], dict[str, int]]] = []
        for name in NAMES:

            def build(name: str = name) -> tuple[TokenizedQuestions, dict[str, Any]]:
                if not read:
                    read.append(self.splits.read())
                splits, counts = read[0]
                return self._build(name, splits[name], counts)

            table, facts[name] = tokenized.cached(self._place(name, source), build)
            setattr(self, name, table)
        sizes = zip(*map(self.validation.column, ("prompt_tokens", "answer_tokens")), strict=True)
        if not any(p <= self.max_prompt_length and p + a <= self.positions for p, a in sizes):
            raise UserError(
                f"No validation question fits into max_length={self.max_length} and, with its "
                f"answer, into the {self.positions} tokens that the model reads. There "
                "would be no validation loss."
            )
        self.facts = facts

    def deal(self, devices: int, device: int) -> None:
        """Share each step and the batches to evaluate among `devices`, of which this is one."""
        self.devices, self.device = devices, device

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return -(-len(self.train) // self.batch_size)

    def train_dataloader(self) -> DataLoader:
        """The parts of each step, in an order that the seed and the epoch fix."""
        labels = self.train.column("answer_tokens")
        if not self.mask_prompt:
            before = self.train.column("prompt_tokens")
            labels = [own + more - 1 for own, more in zip(labels, before, strict=True)]
        together = self.splits.draw_by == "paragraph"
        sampler = StepSampler(
            labels,
            self.train.column("paragraph") if together else None,
            self.batch_size,
            self.parts,
            self.splits.seed,
            self.devices,
            self.device,
        )
        dataset = _Parts(self.train, self.collate_training)
        return ResumableLoader(dataset, sampler=sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """All validation questions, those of a paragraph together, the longest first."""
        return self._evaluation_loader(self.validation, skip=0)

    def test_dataloader(self, skip: int = 0) -> DataLoader:
        """All test questions, in the same way, without the first `skip` batches."""
        return self._evaluation_loader(self.test, skip)

    def collate_training(
        self, rows: Sequence[TokenizedQuestion], step_labels: int
    ) -> dict[str, Any]:
        """The `sequences` of these rows, the label count of the whole step, and how many `samples`
        and `tokens` (of prompts and answers, a shared context each time) these rows are."""
        prompts = [self._parts(row) for row in rows]
        answers = [row["answer_ids"] for row in rows]
        length = self.packed_length if self.mask_prompt else None
        return {
            "sequences": sequences(prompts, answers, self.mask_prompt, length),
            "step_labels": step_labels,
            "samples": len(rows),
            "tokens": sum(row["prompt_tokens"] + row["answer_tokens"] for row in rows),
        }

    def collate_evaluation(self, rows: Sequence[TokenizedQuestion]) -> EvaluationBatch:
        """Rows to evaluate."""
        parts = [self._parts(row) for row in rows]
        asked = [part if len(part.prompt) <= self.max_prompt_length else None for part in parts]
        golds = [
            row["answer_ids"]
            if part is not None and len(part.prompt + row["answer_ids"]) <= self.positions
            else []
            for part, row in zip(asked, rows, strict=True)
        ]
        return EvaluationBatch(list(rows), asked, golds)

    def _parts(self, row: TokenizedQuestion) -> PromptTokens:
        return PromptTokens(self.prefix, row["context_ids"], row["question_ids"])

    def _evaluation_loader(self, table: TokenizedQuestions, skip: int) -> DataLoader:
        lengths, paragraphs = table.column("prompt_tokens"), table.column("paragraph")
        longest: dict[int, int] = {}
        for length, paragraph in zip(lengths, paragraphs, strict=True):
            longest[paragraph] = max(length, longest.get(paragraph, 0))
        order = sorted(range(len(table)), key=lambda n: (-longest[paragraphs[n]], paragraphs[n]))
        size = self.eval_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)][skip:]
        # Devices answer in step, so that each gets as many; which batch a question is in does not
        # depend on their number, and so its answer does not.
        batches += [[] for _ in range(-len(batches) % self.devices)]
        own = batches[self.device :: self.devices]
        return DataLoader(table, batch_sampler=own, collate_fn=self.collate_evaluation)

    def _place(self, name: str, source: str) -> Path:
        """Where the rows of a split are cached: named by all that they depend on."""
        key = {
            "format": tokenized.FORMAT,
            "source": source,
            **self.splits.key(name),
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "end": self.tokenizer.eos_token_id,
            "length": self.max_length if name == "train" else self.max_prompt_length,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
        return self.cache_dir / "data" / digest.hexdigest()[:24]

    def _build(
        self, name: str, questions: list[Question], source_counts: dict[str, int]
    ) -> tuple[TokenizedQuestions, dict[str, Any]]:
        """The rows of a split, and its facts: counts, and a fingerprint of its questions."""
        training = name == "train"
        length = self.max_length if training else self.max_prompt_length
        table = tokenized.make(questions, self.tokenizer, self.prefix, length, training)
        if not len(table):
            raise UserError(
                f"No question of the {name} split fits into max_length={self.max_length}."
            )
        return table, {
            "questions": len(table),
            "paragraphs": len(set(table.column("paragraph"))),
            "articles": len(set(table.column("title"))),
            "truncated": sum(table.column("context_cut")),
            "dropped": len(questions) - len(table),
            "fingerprint": fingerprint(questions),
            "in_all_files": source_counts,
        }


def sequences(
    prompts: Sequence[PromptTokens],
    answers: Sequence[list[int]],
    mask_prompt: bool,
    packed_length: int | None,
) -> Sequences:
    """Prompts with their answers, and the labels of both; packed, or as padded rows for None."""
    labels = [
        prompt.labels(part.prompt, answer, mask_prompt)
        for part, answer in zip(prompts, answers, strict=True)
    ]
    if packed_length is None:
        ids = [part.prompt + answer for part, answer in zip(prompts, answers, strict=True)]
        return padded(ids, labels)
    contexts = [part.prefix + part.context for part in prompts]
    branches = [part.question + answer for part, answer in zip(prompts, answers, strict=True)]
    behind = [own[-len(branch) :] for own, branch in zip(labels, branches, strict=True)]
    return packed(contexts, branches, behind, packed_length)


class _Parts(torch.utils.data.Dataset):
    """What a StepSampler asks for, collated."""

    def __init__(
        self, rows: TokenizedQuestions, collate: Callable[[Sequence[TokenizedQuestion], int], Any]
    ) -> None:
        self.rows, self.collate = rows, collate

    def __getitem__(self, part: tuple[list[int], int]) -> Any:
        numbers, step_labels = part
        if numbers:
            return self.collate([self.rows[number] for number in numbers], step_labels)
        # A part without a row runs one for which no label counts, so that each part is alike.
        batch = self.collate([self.rows[0]], step_labels)
        batch["sequences"].labels.fill_(IGNORED)
        return batch | {"samples": 0, "tokens": 0}
