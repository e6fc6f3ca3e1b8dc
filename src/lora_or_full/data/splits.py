"""Which questions are for training, validation and test."""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lora_or_full.config.schema import DataConfig
from lora_or_full.data import squad
from lora_or_full.data.entries import Entry
from lora_or_full.data.files import SUFFIXES
from lora_or_full.data.hub import folder_of, local
from lora_or_full.data.squad import Question, text_key
from lora_or_full.errors import UserError, listed

NAMES = ("train", "validation", "test")
MOST_FILES, MOST_BYTES = 1000, 20 * 10**9  # of a data set's folder; a home folder has more


class Read(NamedTuple):
    """The questions of a data set, split.

    Attributes:
        splits: Questions by the name of their split.
        counts: What was mended, dropped or shared in all files, by its name.
        split_by: What train and validation do not share: 'article', 'paragraph' or 'question', or
            'own' for splits of the data set's own.
        notes: What a reader of the splits has to know, in words.
    """

    splits: dict[str, list[Question]]
    counts: dict[str, int]
    split_by: str
    notes: list[str]


@dataclass(frozen=True)
class Splits:
    """A data set in SQuAD's format, and how it is split.

    Train and validation share no article (`split_by` 'article'), no paragraph ('paragraph', and
    where articles are too few), or are drawn question by question from one pool ('question'). The
    test set is `test_path`, or that of `path`, or else a share of the articles. A data set in the
    hub's layout tests on its split 'test' and validates on its 'validation'; with one of them that
    has answers, it tests on that. `split_seed` draws everything but the training subset, all
    questions of a paragraph together except for validation from the pool of 'question'. With
    'nothing' the training subset is all three of them.
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
                data.unanswerable, data.misaligned, data.overlap, data.config,
            ],
            "validation_size": data.validation_size,
            "size": getattr(data, f"{name}_size"),
            "seed": self.seed if name == "train" else None,
            "draw_by": data.draw_by if name == "train" else "paragraph",
        }  # fmt: skip

    def read(self) -> Read:
        """Read the questions of 'train', 'validation' and 'test'.

        Raises:
            UserError: The data is not available, is not in SQuAD's format, leaves a split empty, or
                trains on what it tests.
        """
        data = self.data
        draw = _draw_paragraphs if data.draw_by == "paragraph" else _draw
        given, notes = self._given()
        parts, counts = self._checked(given)
        pool, test, validation = parts["train"], parts.get("test"), parts.get("validation")
        if data.split_by == "nothing":
            counts["articles_shared_with_test"] = len({question.title for question in pool})
            drawn = draw(pool, data.train_size, self.seed)
            return Read(dict.fromkeys(NAMES, drawn), self._shown(counts), "nothing", notes)
        if test is not None:
            pool = self._unseen(pool, test, counts)
            validation = validation and self._unseen(validation, test, counts)
        split_by = data.split_by if validation is None else "own"
        groups = _groups(pool, data.split_by)
        held_out = (test is None) + (split_by in ("article", "paragraph"))
        if data.split_by != "paragraph" and (found := len({*groups.values()})) <= held_out:
            notes.append(f"by paragraph, since articles are too few to hold some out: {found}")
            groups = _groups(pool, "paragraph")
            split_by = "paragraph" if split_by == "article" else split_by
        elif data.split_by != "paragraph" and held_out:
            counts["articles_joined"] = len({q.title for q in pool}) - found
        rng = random.Random(data.split_seed)
        if test is None:
            pool, test = _hold_out(pool, groups, data.test_articles, rng, "test")
        if validation is not None:
            train = pool
        elif split_by == "question":
            pool = rng.sample(pool, len(pool))
            wanted = data.validation_size or max(1, round(data.validation_articles * len(pool)))
            train, validation = pool[wanted:], pool[:wanted]
        else:
            train, validation = _hold_out(pool, groups, data.validation_articles, rng, "validation")
        known, tested = [*train, *validation], {question.title for question in test}
        counts["articles_shared_with_test"] = len(tested & {q.title for q in known})
        counts["contexts_shared_with_test"] = len(_paragraphs(test) & _paragraphs(known))
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
        return Read(splits, self._shown(counts), split_by, notes)

    def _shown(self, counts: Counter[str]) -> dict[str, int]:
        """The counts that are recorded: those above zero, and some always."""
        always = ("articles_shared_with_test", *squad.ALWAYS)
        return {key: n for key, n in counts.items() if n or key in always}

    def _given(self) -> tuple[dict[str, list[Entry]], list[str]]:
        """The splits that the data comes in, 'train' last, and notes on them.

        Of files that share ids the first keeps its own: the test set.
        """
        own = self._load(self.data.path)
        given = {"train": own.pop("train")}
        notes = []
        if self.data.test_path is not None:
            other = self._load(self.data.test_path)
            names = [name for name in ("test", "validation", "train") if name in other]
            name = next((name for name in names if _answered(other[name])), names[0])
            given = {"test": other[name]} | given
        else:
            for name in ("test", "validation"):
                if _answered(own.get(name, [])):
                    role = "validation" if "test" in given else "test"
                    given = {role: own.pop(name)} | given
                    if name == "test":
                        notes.append("the test set is the data's own split test")
            given = {name: given[name] for name in reversed(NAMES) if name in given}
        if own:
            notes.append(f"not used, of the data's own splits: {listed(own)}")
        return given, notes

    def _checked(
        self, given: Mapping[str, list[Entry]]
    ) -> tuple[dict[str, list[Question]], Counter[str]]:
        """The sound questions of each split that the data comes in, and what was mended."""
        entries = iter(squad.with_own_ids([entry for part in given.values() for entry in part]))
        counts: Counter[str] = Counter()
        parts: dict[str, list[Question]] = {}
        for name, part in given.items():
            own = list(islice(entries, len(part)))
            parts[name], more = squad.check(own, self.data.unanswerable, self.data.misaligned)
            counts.update(more)
        if not parts["train"]:
            raise UserError(
                f"data.path={self.data.path}: there is no question with an answer in it."
            )
        return parts, counts

    def _unseen(
        self, questions: list[Question], test: list[Question], counts: Counter[str]
    ) -> list[Question]:
        """Leave out the questions that the test set has too, or refuse them (`overlap`)."""
        ids, pairs = {q.id for q in test}, {_pair(q) for q in test}
        both = {q.id for q in questions if q.id in ids or _pair(q) in pairs}
        if both and self.data.overlap == "refuse":
            raise UserError(
                f"{len(both)} questions of the test set are in data.path too, the first: "
                f"{min(both)!r}. What is tested on must not be trained on: data.overlap=drop "
                "leaves them out of training."
            )
        counts["overlap_dropped"] += len(both)
        return [question for question in questions if question.id not in both]

    def _files(self, path: str | Sequence[str] | None) -> Iterator[tuple[str, Path]]:
        for item in _items(path):
            if _is_file(item):
                yield "", _local(item)
            else:
                yield from _in_folder(folder_of(item, "dataset", self.cache_dir))

    def _load(self, path: str | Sequence[str]) -> dict[str, list[Entry]]:
        items = _items(path)
        if all(map(_is_file, items)):
            return {"train": squad.read_files(map(_local, items))}
        if len(items) > 1:
            raise UserError(f"data: {', '.join(items)}: give one hub id or folder, or files.")
        folder = folder_of(items[0], "dataset", self.cache_dir)
        splits = squad.read_folder(folder, self.data.config)
        if "train" not in splits:
            raise UserError(f"{items[0]} has no split 'train' (it has {', '.join(splits)}).")
        return splits


def _items(path: str | Sequence[str] | None) -> list[str]:
    return [path] if isinstance(path, str) else list(path or [])


def _is_file(item: str) -> bool:
    return Path(item).suffix.lower() in SUFFIXES or os.path.isfile(local(item))


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


def _groups(questions: list[Question], split_by: str) -> dict[str, str]:
    """The group of each context, which is held out as a whole: its paragraph or its article.

    Articles that share a paragraph are one group, named by the first of their titles.
    """
    keys = {context: text_key(context) for context in {q.context for q in questions}}
    if split_by == "paragraph":
        return keys
    above = {question.title: question.title for question in questions}

    def first(title: str) -> str:
        while above[title] != title:
            above[title] = title = above[above[title]]
        return title

    titles: dict[str, str] = {}
    for question in questions:
        other = titles.setdefault(keys[question.context], question.title)
        low, high = sorted((first(question.title), first(other)))
        above[high] = low
    return {question.context: first(question.title) for question in questions}


def _hold_out(
    questions: list[Question], groups: Mapping[str, str], fraction: float, rng: random.Random,
    name: str,
) -> tuple[list[Question], list[Question]]:  # fmt: skip
    """Split off the questions of a fraction of the groups, at least one."""
    names = sorted({groups[question.context] for question in questions})
    held = set(rng.sample(names, min(len(names), max(1, round(fraction * len(names))))))
    rest = [question for question in questions if groups[question.context] not in held]
    if not rest:
        way = (
            "a test set of its own by data.test_path"
            if name == "test"
            else "data.split_by=question"
        )
        raise UserError(
            f"There are {len(names)} paragraphs, too few to hold some out for the {name} split. "
            f"Give more, or {way}."
        )
    return rest, [question for question in questions if groups[question.context] in held]


def _answered(entries: Iterable[Entry]) -> bool:
    return any(entry.answers for entry in entries)


def _paragraphs(questions: Iterable[Question]) -> set[str]:
    return {text_key(question.context) for question in questions}


def _pair(question: Question) -> tuple[str, str]:
    return text_key(question.context), text_key(question.question)


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
