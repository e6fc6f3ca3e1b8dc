"""Which questions are for training, validation and test."""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_or_full.config.schema import DataConfig
from lora_or_full.data import squad
from lora_or_full.data.hub import folder_of, local
from lora_or_full.data.squad import Entry, Question
from lora_or_full.errors import UserError

FILES = (".json", ".parquet")
NAMES = ("train", "validation", "test")
MOST_FILES, MOST_BYTES = 1000, 20 * 10**9  # of a data set's folder; a home folder has more


@dataclass(frozen=True)
class Splits:
    """A data set in SQuAD's format, and how it is split.

    Train and validation share no article (`split_by` 'article'), or are drawn question by question
    from one pool ('question'). The test set is `test_path`, or that of `path`, or else a share of
    the articles; a data set in the hub's layout tests on its 'validation' split. `split_seed` draws
    everything but the training subset, all questions of a paragraph together except for validation
    from the pool of 'question'. With 'nothing' the training subset is all three of them.
    """

    data: DataConfig
    seed: int  # draws the training subset, by question or by paragraph (`draw_by`)
    cache_dir: Path  # for notes of what was downloaded

    def fingerprint(self) -> str:
        """Hash the content of all files, and in a folder their names, which say the splits.

        Raises:
            UserError: A file or the hub's data set is not available.
        """
        digest = hashlib.sha256()
        for path in (self.data.path, self.data.test_path):
            digest.update(b"|")  # the same files in other roles are other data
            for name, file in self._files(path):
                digest.update(os.fsencode(name))
                try:
                    with file.open("rb") as content:
                        digest.update(hashlib.file_digest(content, "sha256").digest())
                except OSError as error:
                    raise UserError(
                        f"There is no file {file} that can be read ({error.strerror}). "
                        "Check data.path and data.test_path."
                    ) from None
        return digest.hexdigest()[:16]

    def key(self, name: str) -> dict[str, object]:
        """Give everything but the files' content that decides what is in a split."""
        data = self.data
        split, name = name, "train" if data.split_by == "nothing" else name
        return {
            "split": split,
            "drawn": [
                data.split_by, data.split_seed, data.validation_articles, data.test_articles,
                data.unanswerable, data.misaligned,
            ],
            "validation_size": data.validation_size,
            "size": getattr(data, f"{name}_size"),
            "seed": self.seed if name == "train" else None,
            "draw_by": data.draw_by if name == "train" else "paragraph",
        }  # fmt: skip

    def read(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        """Read the questions of 'train', 'validation' and 'test', and counts over all files.

        Raises:
            UserError: The data is not available, is not in SQuAD's format, or leaves a split empty.
        """
        data = self.data
        entries, test_entries = self._load(data.path)
        if data.test_path is not None:
            first, validation_entries = self._load(data.test_path)
            test_entries = first if validation_entries is None else validation_entries
        pool, counts = squad.check(entries, data.unanswerable, data.misaligned)
        draw = _draw_paragraphs if data.draw_by == "paragraph" else _draw
        if data.split_by == "nothing":
            drawn = draw(pool, data.train_size, self.seed)
            shared = len({question.title for question in drawn})
            return dict.fromkeys(NAMES, drawn), counts | {"articles_shared_with_test": shared}
        rng = random.Random(data.split_seed)
        if test_entries is None:
            pool, test = _hold_out(pool, data.test_articles, rng, "test")
        else:
            test, more = squad.check(test_entries, data.unanswerable, data.misaligned)
            counts = {key: counts[key] + more[key] for key in counts}
        if data.split_by == "article":
            train, validation = _hold_out(pool, data.validation_articles, rng, "validation")
        else:
            pool = rng.sample(pool, len(pool))
            wanted = data.validation_size or max(1, round(data.validation_articles * len(pool)))
            train, validation = pool[wanted:], pool[:wanted]
        if both := {question.id for question in pool} & {question.id for question in test}:
            raise UserError(
                f"{len(both)} questions of the test set are in data.path too, the first: "
                f"{min(both)!r}. What is tested on must not be trained on."
            )
        tested = {question.title for question in test}
        counts["articles_shared_with_test"] = len(tested & {q.title for q in [*train, *validation]})
        # One more question about a paragraph that is read anyway takes a fraction of the time.
        splits = {
            "train": draw(train, data.train_size, self.seed),
            "validation": _draw_paragraphs(validation, data.validation_size, data.split_seed),
            "test": _draw_paragraphs(test, data.test_size, data.split_seed),
        }
        for name, questions in splits.items():
            if not questions:
                raise UserError(
                    f"The {name} split is empty: there are {len(pool)} questions to train and "
                    f"validate on and {len(test)} to test on. Check data.path, data.test_path and "
                    "data.validation_size."
                )
        return splits, counts

    def _files(self, path: str | Sequence[str] | None) -> Iterator[tuple[str, Path]]:
        for item in _items(path):
            if Path(item).suffix in FILES:
                yield "", _local(item)
            else:
                yield from _in_folder(folder_of(item, "dataset", self.cache_dir))

    def _load(self, path: str | Sequence[str]) -> tuple[list[Entry], list[Entry] | None]:
        items = _items(path)
        if all(Path(item).suffix in FILES for item in items):
            return squad.read_files(map(_local, items)), None
        if len(items) > 1:
            raise UserError(
                f"data: {', '.join(items)}: give one hub id or folder, or .json and .parquet files."
            )
        splits = squad.read_folder(folder_of(items[0], "dataset", self.cache_dir))
        if "train" not in splits:
            raise UserError(f"{items[0]} has no split 'train' (it has {', '.join(splits)}).")
        return splits["train"], splits.get("validation")


def _items(path: str | Sequence[str] | None) -> list[str]:
    return [path] if isinstance(path, str) else list(path or [])


def _local(item: str) -> Path:
    return Path(local(item))


def _in_folder(folder: Path) -> list[tuple[str, Path]]:
    """A folder's files of all formats by name (README.md names the splits), without hidden ones."""
    found: list[tuple[str, Path]] = []
    size = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(parent, name) for name in names if not name.startswith(".")):
            if file.is_file():
                found.append((file.relative_to(folder).as_posix(), file))
                size += file.stat().st_size
            if len(found) > MOST_FILES or size > MOST_BYTES:
                raise UserError(
                    f"{folder} holds more than {MOST_FILES:,} files or {MOST_BYTES // 10**9} GB: "
                    "is it a data set? data.path names its folder, or its files."
                )
    return sorted(found)


def _hold_out(
    questions: list[Question], fraction: float, rng: random.Random, name: str
) -> tuple[list[Question], list[Question]]:
    """Split off the questions of a fraction of the articles, at least one."""
    titles = sorted({question.title for question in questions})
    held = set(rng.sample(titles, min(len(titles), max(1, round(fraction * len(titles))))))
    rest = [question for question in questions if question.title not in held]
    if not rest:
        raise UserError(
            f"There are {len(titles)} articles, too few to hold some out for the {name} split. "
            "Give more articles, or a test set of its own by data.test_path."
        )
    return rest, [question for question in questions if question.title in held]


def _draw(questions: list[Question], size: int | None, seed: int) -> list[Question]:
    """Draw questions at random, and keep their order; all if there are not more."""
    if size is None or size >= len(questions):
        return questions
    drawn = random.Random(seed).sample(range(len(questions)), size)
    return [questions[number] for number in sorted(drawn)]


def _draw_paragraphs(questions: list[Question], size: int | None, seed: int) -> list[Question]:
    """Draw questions of random paragraphs, all of each but the last, and keep their order."""
    contexts = list(dict.fromkeys(question.context for question in questions))
    shuffled = random.Random(seed).sample(contexts, len(contexts))
    rank = {context: number for number, context in enumerate(shuffled)}
    drawn = sorted(range(len(questions)), key=lambda n: rank[questions[n].context])[:size]
    return [questions[number] for number in sorted(drawn)]
