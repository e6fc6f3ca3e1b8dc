"""SQuAD in, batches out: tokens, labels, and the loaders for training, validation and test."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from errors import UserError
from qa import prompt
from qa.prompt import IGNORED, Parts
from qa.squad import Question
from splits import NAMES, Splits
from steps import ResumableLoader, StepSampler

FORMAT = 1  # part of the cache's key: raise it when what a row holds changes
Row = dict[str, Any]


class SquadDataModule(L.LightningDataModule):
    """The questions of `splits` as batches.

    `batch_size` questions make an optimizer step, dealt to `parts`. `max_length` is the most tokens
    of a training row, `max_prompt_length` of a prompt that is evaluated, `positions` of all that
    the model can read.

    After `setup`, `train`, `validation` and `test` hold rows: id, title, paragraph (a number for
    each context of the split), context, question, answers, the token ids context_ids, question_ids
    and answer_ids (with end of text), and context_cut. `facts` holds counts and fingerprints.
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
        parts: int,
        cache_dir: Path,
    ) -> None:
        super().__init__()
        self.tokenizer, self.splits, self.cache_dir = tokenizer, splits, cache_dir
        self.batch_size, self.eval_batch_size, self.parts = batch_size, eval_batch_size, parts
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.positions, self.mask_prompt = positions, mask_prompt
        self.head = prompt.head_ids(tokenizer)
        self.train: Dataset
        self.validation: Dataset
        self.test: Dataset
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

            def build(name: str = name) -> tuple[Dataset, dict[str, Any]]:
                if not read:
                    read.append(self.splits.read())
                splits, counts = read[0]
                return self._build(name, splits[name], counts)

            table, facts[name] = _cached(self._place(name, source), build)
            setattr(self, name, table)
        self.facts = facts

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return -(-len(self.train) // self.batch_size)

    def train_dataloader(self) -> DataLoader:
        """The parts of each step, in an order that the seed and the epoch fix."""
        labels = [len(answer) for answer in self.train["answer_ids"]]
        if not self.mask_prompt:
            prompts = zip(self.train["context_ids"], self.train["question_ids"], strict=True)
            before = [len(Parts(self.head, *ids).prompt) - 1 for ids in prompts]
            labels = [count + more for count, more in zip(labels, before, strict=True)]
        sampler = StepSampler(labels, self.batch_size, self.parts, self.splits.seed)
        dataset = _Parts(self.train, self.collate_training)
        return ResumableLoader(dataset, sampler=sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """All validation questions, in batches of similar length."""
        return self._evaluation_loader(self.validation, skip=0)

    def test_dataloader(self, skip: int = 0) -> DataLoader:
        """All test questions, in batches of similar length, without the first `skip` batches."""
        return self._evaluation_loader(self.test, skip)

    def collate_training(self, rows: Sequence[Row], step_labels: int) -> dict[str, Any]:
        """`input_ids` and `labels` (B, T), padded on the right, the label count of the whole step,
        and how many `samples` and `tokens` these rows are."""
        pairs = [self._ids_and_labels(row, self.mask_prompt) for row in rows]
        return {
            **_padded(pairs),
            "step_labels": step_labels,
            "samples": len(rows),
            "tokens": sum(len(ids) for ids, _ in pairs),
        }

    def collate_evaluation(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The `rows`, their `prompts` (None where one is too long) and, over those that fit with
        their answer, `input_ids` and `labels` (B, T); the labels are the answers' alone, always."""
        prompts = [self._parts(row).prompt for row in rows]
        asked = [ids if len(ids) <= self.max_prompt_length else None for ids in prompts]
        pairs = [self._ids_and_labels(row, mask_prompt=True) for row in rows]
        fitting = [
            pair
            for pair, ids in zip(pairs, asked, strict=True)
            if ids is not None and len(pair[0]) <= self.positions
        ]
        return {"rows": list(rows), "prompts": asked, **_padded(fitting)}

    def _parts(self, row: Row) -> Parts:
        return Parts(self.head, row["context_ids"], row["question_ids"])

    def _ids_and_labels(self, row: Row, mask_prompt: bool) -> tuple[list[int], list[int]]:
        before, answer = self._parts(row).prompt, row["answer_ids"]
        return before + answer, prompt.labels(before, answer, mask_prompt)

    def _evaluation_loader(self, table: Dataset, skip: int) -> DataLoader:
        rows = sorted(table, key=lambda row: -len(self._parts(row).prompt))
        size = self.eval_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)][skip:]
        return DataLoader(
            batches,  # type: ignore[arg-type]  # a list is a dataset: it has items and a length
            batch_size=None,
            collate_fn=self.collate_evaluation,
        )

    def _place(self, name: str, source: str) -> Path:
        """Where the rows of a split are cached: named by all that they depend on."""
        key = {
            "format": FORMAT,
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
    ) -> tuple[Dataset, dict[str, Any]]:
        """The rows of a split, and its facts: counts, and a fingerprint of its questions."""
        contexts = list(dict.fromkeys(question.context for question in questions))
        numbers = {context: number for number, context in enumerate(contexts)}
        context_tokens = self._encode(prompt.context_text(context) for context in contexts)
        asked = self._encode(prompt.question_text(q.question) for q in questions)
        said = self._encode(prompt.answer_text(q.answers[0]) for q in questions)
        rows = []
        for q, question_ids, answer_ids in zip(questions, asked, said, strict=True):
            context_ids = context_tokens[numbers[q.context]]
            room = (self.max_length if name == "train" else self.max_prompt_length) - (
                len(self.head) + len(question_ids) + (len(answer_ids) + 1) * (name == "train")
            )
            if name == "train" and room < 1:
                continue
            cut = len(context_ids) > room
            gold = self._gold_tokens(q) if name == "train" and cut and q.starts[0] >= 0 else None
            rows.append(
                {
                    "id": q.id,
                    "title": q.title,
                    "paragraph": numbers[q.context],
                    "context": q.context,
                    "question": q.question,
                    "answers": q.answers,
                    "context_ids": context_ids[prompt.window(len(context_ids), max(room, 0), gold)],
                    "question_ids": question_ids,
                    "answer_ids": [*answer_ids, self.tokenizer.eos_token_id],
                    "context_cut": cut,
                }
            )
        if not rows:
            raise UserError(
                f"No question of the {name} split fits into max_length={self.max_length}."
            )
        digest = hashlib.sha256()
        for q in questions:
            digest.update(json.dumps(asdict(q), sort_keys=True).encode())
        facts = {
            "questions": len(rows),
            "paragraphs": len({row["paragraph"] for row in rows}),
            "articles": len({row["title"] for row in rows}),
            "truncated": sum(bool(row["context_cut"]) for row in rows),
            "dropped": len(questions) - len(rows),
            "fingerprint": digest.hexdigest()[:16],
            "in_all_files": source_counts,
        }
        return Dataset.from_list(rows), facts

    def _encode(self, texts: Iterable[str]) -> list[list[int]]:
        return prompt.encode(self.tokenizer, list(texts))

    def _gold_tokens(self, q: Question) -> tuple[int, int]:
        """The first token of the gold answer within the context, and one past its last."""
        offsets = self.tokenizer(
            prompt.context_text(q.context),
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )["offset_mapping"]
        first = q.starts[0] + 1  # behind the space that context_text begins with
        last = first + len(q.answers[0])
        touched = [n for n, (start, end) in enumerate(offsets) if start < last and end > first]
        return touched[0], touched[-1] + 1


class _Parts(torch.utils.data.Dataset):
    """What a StepSampler asks for, collated."""

    def __init__(self, rows: Dataset, collate: Callable[[Sequence[Row], int], Any]) -> None:
        self.rows, self.collate = rows, collate

    def __getitem__(self, part: tuple[list[int], int]) -> Any:
        numbers, step_labels = part
        if numbers:
            return self.collate([self.rows[number] for number in numbers], step_labels)
        # A part without a row runs one for which no label counts, so that each part is alike.
        batch = self.collate([self.rows[0]], step_labels)
        batch["labels"].fill_(IGNORED)
        return batch | {"samples": 0, "tokens": 0}


def _padded(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max((len(ids) for ids, _ in pairs), default=0)
    # Padding on the right needs no attention mask: no real token looks to its right.
    ids = [ids + [0] * (longest - len(ids)) for ids, _ in pairs]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in pairs]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.long),
    }


def _cached(
    place: Path, build: Callable[[], tuple[Dataset, dict[str, Any]]]
) -> tuple[Dataset, dict[str, Any]]:
    """A table and its facts: loaded from `place`, or built and put there, whole or not at all."""
    disable_progress_bars()
    if not place.exists():
        table, facts = build()
        made = place.with_name(f"{place.name}.{os.getpid()}.partial")
        shutil.rmtree(made, ignore_errors=True)  # of a process of this number that was killed
        made.mkdir(parents=True)
        table.save_to_disk(made / "rows")
        (made / "facts.json").write_text(json.dumps(facts))
        try:
            made.rename(place)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    table = load_from_disk(str(place / "rows"))
    assert isinstance(table, Dataset)
    return table, json.loads((place / "facts.json").read_text())
