"""SQuAD in, batches out: splits by article, tokens, labels, and which questions make a step."""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset, load_from_disk
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from errors import UserError
from hub import folder_of
from qa import prompt, squad
from qa.prompt import IGNORED, Parts
from qa.squad import Question

FORMAT = 1  # part of the cache's key: raise it when what a row holds changes
Row = dict[str, Any]


class SquadDataModule(L.LightningDataModule):
    """Questions of a data set in SQuAD's format as batches for training, validation and test.

    Train and validation share no article (`split_by` 'article'), or are drawn question by question
    from one pool ('question', the reference's way). The test set is `test_path`, or the
    'validation' split of a data set in the hub's layout, or else a third part of the articles.
    `seed` draws the training subset, `split_seed` everything else.

    After `setup`, `train`, `validation` and `test` hold rows: id, title, paragraph (a number for
    each context of the split), question, answers, the token ids context_ids, question_ids and
    answer_ids (with end of text), and context_cut. `facts` holds counts and fingerprints.

    Raises:
        UserError: on preparing, if the data can't be had or is not what it should be.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str | Sequence[str],
        test_path: str | Sequence[str] | None,
        split_by: str,
        split_seed: int,
        train_size: int | None,
        validation_size: int | None,
        test_size: int | None,
        validation_articles: float,
        test_articles: float,
        unanswerable: str,
        misaligned: str,
        seed: int,
        batch_size: int,
        eval_batch_size: int,
        max_length: int,
        max_prompt_length: int,
        mask_prompt: bool,
        cache_dir: Path,
        parts: int = 1,
    ) -> None:
        """`batch_size` questions make an optimizer step, dealt to `parts` (micro-batches).

        `max_length` is the most tokens of a training row, `max_prompt_length` of a prompt that is
        evaluated. A size of None takes all there is.
        """
        super().__init__()
        self.tokenizer, self.cache_dir, self.seed, self.parts = tokenizer, cache_dir, seed, parts
        self.path, self.test_path = _as_list(path), _as_list(test_path)
        self.split_by, self.split_seed = split_by, split_seed
        self.sizes = {"train": train_size, "validation": validation_size, "test": test_size}
        self.validation_articles, self.test_articles = validation_articles, test_articles
        self.unanswerable, self.misaligned = unanswerable, misaligned
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.mask_prompt = mask_prompt
        self.head = prompt.head_ids(tokenizer)
        self.facts: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load the rows of all three splits: from the cache, or made now and put there."""
        if self.facts:
            return
        source = self._source()
        splits: dict[str, list[Question]] = {}
        source_counts: dict[str, int] = {}

        def questions_of(name: str) -> list[Question]:
            if not splits:
                found, counts = self._read(source)
                splits.update(found)
                source_counts.update(counts)
            return splits[name]

        tables, facts = {}, {}
        for name in ("train", "validation", "test"):
            key = self._key(name, source)
            tables[name], facts[name] = _cached(
                self.cache_dir / "data",
                key,
                lambda name=name: self._build(name, questions_of(name), source_counts),
            )
        self.train, self.validation, self.test = (
            tables["train"], tables["validation"], tables["test"],
        )  # fmt: skip
        self.facts = {"source": source, **facts}

    def train_dataloader(self) -> DataLoader:
        """Batches of a part of a step each, in an order that `seed` and the epoch fix."""
        counts = [
            len(row["answer_ids"]) if self.mask_prompt else len(self._parts(row).prompt) - 1 + len(row["answer_ids"])
            for row in self.train
        ]
        sampler = StepSampler(counts, self.batch_size, self.parts, self.seed)
        dataset = _TrainingParts(self.train, self.collate_training)
        return ResumableLoader(dataset, sampler=sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """All validation questions, in batches of similar length."""
        return self._evaluation_loader(self.validation, 0)

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
        """The `rows`, their `prompts` (None where one is too long) and, over those that fit,
        `input_ids` and `labels` (B, T); the labels are the answers' alone, always."""
        fits = [len(self._parts(row).prompt) <= self.max_prompt_length for row in rows]
        pairs = [
            self._ids_and_labels(row, True) for row, fit in zip(rows, fits, strict=True) if fit
        ]
        prompts = [
            self._parts(row).prompt if fit else None for row, fit in zip(rows, fits, strict=True)
        ]
        return {"rows": list(rows), "prompts": prompts, **_padded(pairs)}

    def _parts(self, row: Row) -> Parts:
        return Parts(self.head, row["context_ids"], row["question_ids"])

    def _ids_and_labels(self, row: Row, mask_prompt: bool) -> tuple[list[int], list[int]]:
        before, answer = self._parts(row).prompt, row["answer_ids"]
        return before + answer, prompt.labels(before, answer, mask_prompt)

    def _evaluation_loader(self, table: Dataset, skip: int) -> DataLoader:
        rows = sorted(table, key=lambda row: -len(self._parts(row).prompt))
        size = self.eval_batch_size
        batches = [rows[i : i + size] for i in range(0, len(rows), size)][skip:]
        return DataLoader(batches, batch_size=None, collate_fn=self.collate_evaluation)  # type: ignore[arg-type]

    def _source(self) -> dict[str, Any]:
        """Which files the data comes from: what they are, by name and by content."""
        files = []
        for path in (self.path, self.test_path):
            for item in path or []:
                if Path(item).suffix in (".json", ".parquet"):
                    files.append(Path(item).expanduser())
                else:
                    folder = folder_of(item, "dataset", self.cache_dir)
                    files += sorted(f for f in folder.rglob("*") if f.suffix in (".json", ".parquet"))
        digest = hashlib.sha256()
        for file in files:
            if not file.is_file():
                raise UserError(f"There is no file {file}. Check data.path and data.test_path.")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return {"path": self.path, "test_path": self.test_path, "fingerprint": digest.hexdigest()[:16]}

    def _key(self, name: str, source: dict[str, Any]) -> dict[str, Any]:
        """All that the rows of a split depend on."""
        tokenizer = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return {
            "format": FORMAT,
            "split": name,
            "source": source["fingerprint"],
            "files": [len(self.path or []), len(self.test_path or [])],
            "tokenizer": tokenizer,
            "split_by": self.split_by,
            "split_seed": self.split_seed,
            "articles": [self.validation_articles, self.test_articles],
            "validation_size": self.sizes["validation"] if self.split_by == "question" else None,
            "size": self.sizes[name],
            "seed": self.seed if name == "train" else None,
            "checks": [self.unanswerable, self.misaligned],
            "length": self.max_length if name == "train" else self.max_prompt_length,
        }

    def _read(self, source: dict[str, Any]) -> tuple[dict[str, list[Question]], dict[str, int]]:
        """The questions of each split, and counts over all that was read."""
        pool, test = _load(self.path, self.test_path, self.cache_dir)
        questions, counts = squad.check(pool, self.unanswerable, self.misaligned)
        rng = random.Random(self.split_seed)
        tested: list[Question] = []
        if test is not None:
            tested, more = squad.check(test, self.unanswerable, self.misaligned)
            counts = {key: counts[key] + more[key] for key in counts}
        else:
            questions, tested = _hold_out_articles(questions, self.test_articles, rng, "test")
        if self.split_by == "article":
            rest, held = _hold_out_articles(questions, self.validation_articles, rng, "validation")
        else:
            rest = rng.sample(questions, len(questions))
            wanted = self.sizes["validation"] or round(self.validation_articles * len(rest))
            rest, held = rest[wanted:], rest[:wanted]
        splits = {
            "train": _draw(rest, self.sizes["train"], random.Random(self.seed)),
            "validation": _draw(held, self.sizes["validation"], rng),
            "test": _draw(tested, self.sizes["test"], random.Random(self.split_seed)),
        }
        for name, drawn in splits.items():
            if not drawn:
                raise UserError(
                    f"The {name} split is empty: {', '.join(source['path'])} has {len(questions)} "
                    f"questions left for training and validation, {len(tested)} for the test."
                )
        return splits, counts

    def _build(
        self, name: str, questions: list[Question], source_counts: dict[str, int]
    ) -> tuple[Dataset, dict[str, Any]]:
        """The rows of a split, and its facts: counts and a fingerprint of its questions."""
        contexts = list(dict.fromkeys(question.context for question in questions))
        numbers = {context: number for number, context in enumerate(contexts)}
        tokens = dict(zip(contexts, self._encode(map(prompt.context_text, contexts)), strict=True))
        asked = self._encode(prompt.question_text(q.question) for q in questions)
        said = self._encode(prompt.answer_text(q.answers[0]) for q in questions)
        rows, truncated, dropped = [], 0, 0
        for q, question_ids, answer_ids in zip(questions, asked, said, strict=True):
            context_ids = tokens[q.context]
            answer_ids = [*answer_ids, self.tokenizer.eos_token_id]
            taken = len(self.head) + len(question_ids)
            room = (
                self.max_length - taken - len(answer_ids)
                if name == "train"
                else self.max_prompt_length - taken
            )
            if room <= 0 and name == "train":
                dropped += 1
                continue
            gold = None
            if name == "train" and len(context_ids) > room and q.starts[0] >= 0:
                gold = self._gold_tokens(q)
            kept = prompt.window(len(context_ids), max(room, 0), gold)
            cut = len(context_ids) > kept.stop - kept.start
            truncated += cut
            rows.append(
                {
                    "id": q.id,
                    "title": q.title,
                    "paragraph": numbers[q.context],
                    "context": q.context,
                    "question": q.question,
                    "answers": q.answers,
                    "context_ids": context_ids[kept],
                    "question_ids": question_ids,
                    "answer_ids": answer_ids,
                    "context_cut": cut,
                }
            )
        if not rows:
            raise UserError(f"The {name} split is empty: no question fits max_length.")
        digest = hashlib.sha256()
        for q in questions:
            digest.update(json.dumps(asdict(q), sort_keys=True).encode())
        facts = {
            "questions": len(rows),
            "paragraphs": len({row["paragraph"] for row in rows}),
            "articles": len({row["title"] for row in rows}),
            "truncated": truncated,
            "dropped": dropped,
            "fingerprint": digest.hexdigest()[:16],
            "in_all_files": source_counts,
        }
        return Dataset.from_list(rows), facts

    def _encode(self, texts: Iterator[str]) -> list[list[int]]:
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


class StepSampler(Sampler[tuple[list[int], int]]):
    """The parts of each optimizer step: row numbers, and the label count of the whole step.

    A step is `batch_size` rows of a shuffle that (seed, epoch) fixes, dealt to `parts` in turn; a
    part left without a row in the last step gets none. It knows its `position`, so that an
    interrupted epoch can go on where it was.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, parts: int, seed: int) -> None:
        self.labels, self.batch_size, self.parts, self.seed = labels, batch_size, parts, seed
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size) * self.parts

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        # A generator of its own: the modes draw differently from torch's global one.
        order = list(range(len(self.labels)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for number in range(self.position % len(self), len(self)):
            self.position = number + 1
            step, part = divmod(number, self.parts)
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield rows[part :: self.parts], sum(self.labels[row] for row in rows)


class ResumableLoader(DataLoader):
    """A loader that Lightning saves and restores in the middle of an epoch."""

    sampler: StepSampler

    def state_dict(self) -> dict[str, int]:
        return {"position": self.sampler.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.position = state["position"]


class _TrainingParts(torch.utils.data.Dataset):
    def __init__(self, rows: Dataset, collate: Callable[[Sequence[Row], int], Any]) -> None:
        self.rows, self.collate = rows, collate

    def __getitem__(self, part: tuple[list[int], int]) -> Any:
        numbers, step_labels = part
        return self.collate([self.rows[number] for number in numbers], step_labels)


def _padded(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max((len(ids) for ids, _ in pairs), default=0)
    # Padding on the right needs no attention mask: no real token looks to its right.
    ids = [ids + [0] * (longest - len(ids)) for ids, _ in pairs]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in pairs]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.long),
    }


def _load(
    path: list[str] | None, test_path: list[str] | None, cache_dir: Path
) -> tuple[list[squad.Entry], list[squad.Entry] | None]:
    """All questions to train, validate and perhaps test on, and the test set if there is one."""
    pool, test = _load_one(path or [], cache_dir)
    if test_path is not None:
        test = _load_one(test_path, cache_dir)[0]
    return pool, test


def _load_one(path: list[str], cache_dir: Path) -> tuple[list[squad.Entry], list[squad.Entry] | None]:
    if all(Path(item).suffix in (".json", ".parquet") for item in path):
        return squad.read_files(Path(item).expanduser() for item in path), None
    if len(path) > 1:
        raise UserError(f"data.path={path}: either one folder or hub id, or .json and .parquet files.")
    splits = squad.read_folder(folder_of(path[0], "dataset", cache_dir))
    if "train" not in splits:
        raise UserError(f"{path[0]} has no split 'train' (it has {', '.join(splits)}).")
    return splits["train"], splits.get("validation")


def _hold_out_articles(
    questions: list[Question], fraction: float, rng: random.Random, name: str
) -> tuple[list[Question], list[Question]]:
    """The questions of most articles, and those of a `fraction` of the articles, at least one."""
    titles = sorted({question.title for question in questions})
    held = set(rng.sample(titles, min(len(titles), max(1, round(fraction * len(titles))))))
    rest = [question for question in questions if question.title not in held]
    if not rest:
        raise UserError(
            f"There are {len(titles)} articles, too few to hold some out for the {name} split. "
            "Give more articles, or a test set of its own by data.test_path."
        )
    return rest, [question for question in questions if question.title in held]


def _draw(questions: list[Question], size: int | None, rng: random.Random) -> list[Question]:
    """`size` questions at random, in the order they came; all if `size` is None or larger."""
    if size is None or size >= len(questions):
        return questions
    return [questions[number] for number in sorted(rng.sample(range(len(questions)), size))]


def _cached(
    folder: Path, key: dict[str, Any], build: Callable[[], tuple[Dataset, dict[str, Any]]]
) -> tuple[Dataset, dict[str, Any]]:
    """A table and its facts by `key`: loaded from `folder`, or built and put there, whole or not."""
    place = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    if not place.exists():
        table, facts = build()
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder))
        table.save_to_disk(made / "rows")
        (made / "facts.json").write_text(json.dumps(facts))
        try:
            made.rename(place)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    table = load_from_disk(str(place / "rows"))
    assert isinstance(table, Dataset)
    return table, json.loads((place / "facts.json").read_text())


def _as_list(path: str | Sequence[str] | None) -> list[str] | None:
    return [path] if isinstance(path, str) else None if path is None else list(path)
