"""Questions of data files, checked as a whole."""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from lora_or_full.data import files, offsets
from lora_or_full.data.entries import Entry, entries_of
from lora_or_full.errors import UserError

COUNTER = re.compile(r"#?[\d-]+")  # an id that may stand for other questions in other files
# What makes a question unanswerable: in a message, and where such questions are counted.
NO_ANSWER = "have no answer (SQuAD v2.0?)"
IMPOSSIBLE = "have an answer and is_impossible"
BLANK = "are blank or have a blank context"
DROPPED = {
    NO_ANSWER: "unanswerable_dropped", IMPOSSIBLE: "impossible_dropped", BLANK: "blank_dropped",
}  # fmt: skip
LOOKED_UP, NOT_IN_CONTEXT = "answers_looked_up", "answers_not_in_context"
ALWAYS = ("unanswerable_dropped", "answers_repaired", NOT_IN_CONTEXT)  # counted where zero too


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a paragraph. No text has white space at its ends."""

    id: str  # unique in its data set
    title: str  # of the article
    context: str  # the paragraph
    question: str
    answers: list[str]  # gold answers; the first is trained on
    starts: list[int]  # their offsets in `context`, in characters; -1 for one that is not there


def read_files(paths: Iterable[Path]) -> list[Entry]:
    """Read all questions of some files, each of a format that files.py reads.

    Raises:
        UserError: A file is missing, or not in these formats.
    """
    entries: list[Entry] = []
    for path in paths:
        if not os.path.isfile(path):  # a Path raises on names that are too long
            raise UserError(f"There is no file {path}. Check the data's name (data.path).")
        if path.suffix.lower() not in files.SUFFIXES:
            raise UserError(f"{path}: a data file ends in {', '.join(files.SUFFIXES)}.")
        entries += entries_of(files.read_file(path), str(path))
    return entries


def read_folder(folder: Path, config: str | None = None) -> dict[str, list[Entry]]:
    """Read the splits of a data set in the hub's layout, or of one of its configurations.

    Raises:
        UserError: The folder holds none, or one without questions.
    """
    splits = files.read_folder(folder, config)
    return {name: entries_of(values, str(folder / name)) for name, values in splits.items()}


def with_own_ids(entries: Sequence[Entry]) -> list[Entry]:
    """Rename ids that an earlier file has for another question: several files may count from 1."""
    owners: dict[str, Entry] = {}
    names: dict[tuple[str, str], str] = {}  # by file and id
    for entry in entries:
        owner = owners.setdefault(entry.id, entry)
        if owner.source != entry.source and not _is_same(owner, entry):
            names[entry.source, entry.id] = ""
    for source, name in names:
        new = next(new for n in itertools.count(2) if (new := f"{name} ({n})") not in owners)
        names[source, name] = new
        owners[new] = owners[name]
    return [
        replace(entry, id=new, repairs=(*entry.repairs, "ids_renamed"))
        if (new := names.get((entry.source, entry.id), ""))
        else entry
        for entry in entries
    ]


@lru_cache
def text_key(text: str) -> str:
    """The text without case and white space, which do not make it another text."""
    return one_line(text).casefold()


def check(
    entries: list[Entry], unanswerable: str, misaligned: str
) -> tuple[list[Question], dict[str, int]]:
    """Check questions as a whole, and strip white space.

    Args:
        entries: Questions as files have them.
        unanswerable: 'refuse' or 'drop' questions without an answer (SQuAD v2.0), with nothing to
            read or to answer, or with an answer that is said not to be there; or 'keep' them.
        misaligned: 'refuse' answers that are not at their offset, or 'repair' the offset: by the
            unit that the file's offsets count, else by search; an answer that is not in the context
            keeps its text and gets the offset -1.

    Returns:
        The questions, and how many were dropped or repaired.

    Raises:
        UserError: An id occurs twice, or what is refused.
    """
    seen = Counter(entry.id for entry in entries)
    if twice := [name for name, count in seen.items() if count > 1]:
        raise UserError(f"{len(twice)} question ids occur more than once, the first: {twice[0]!r}.")
    counts = Counter(repair for entry in entries for repair in entry.repairs)
    problems = [_problem(entry) for entry in entries]
    if unanswerable == "refuse" and any(problems):
        raise _unanswerable(entries, problems)
    if unanswerable == "drop":
        counts.update(DROPPED[problem] for problem in problems if problem)
        entries = [e for e, problem in zip(entries, problems, strict=True) if not problem]
    units = _units(entries)
    wrong: list[str] = []
    questions: list[Question] = []
    for entry in entries:
        context, starts = entry.context, []
        shift = len(context) - len(context.lstrip())
        for text, stated in zip(entry.answers, entry.starts, strict=True):
            start, repair = _position(context, text, stated, units.get(entry.source, ""))
            if repair:
                counts[repair] += 1
                if repair != LOOKED_UP:
                    at = "in its context" if stated is None else f"at {stated}"
                    wrong.append(f"{entry.where}: {text!r} is not {at}")
            starts.append(start + len(text) - len(text.lstrip()) - shift if start >= 0 else -1)
        answers = [text.strip() for text in entry.answers]
        counts["answers_with_white_space_joined"] += any(one_line(t) != t for t in answers[:1])
        texts = (entry.id, entry.title, context.strip(), entry.question.strip())
        questions.append(Question(*texts, answers, starts))
    if wrong and misaligned == "refuse":
        counted = [f"{unit} in {Path(source).name}" for source, unit in units.items() if unit]
        hint = f" Offsets count {counted[0]}: repair takes them so." if counted else ""
        raise UserError(
            f"{len(wrong)} answers are not where answer_start says, the first: {wrong[0]}. "
            f"data.misaligned=repair looks for them in the context.{hint}"
        )
    return questions, dict.fromkeys(ALWAYS, 0) | {key: n for key, n in counts.items() if n}


def fingerprint(questions: Iterable[Question]) -> str:
    """Hash all that questions hold, in their order."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(json.dumps([getattr(q, field) for field in q.__slots__]).encode())
    return digest.hexdigest()[:16]


def one_line(text: str) -> str:
    """The text with each run of white space as one space, since a line break ends an answer."""
    return " ".join(text.split())


def _problem(entry: Entry) -> str:
    """What makes a question unanswerable; empty if nothing does."""
    if not entry.answers:
        return NO_ANSWER
    if entry.impossible:
        return IMPOSSIBLE
    return "" if entry.context.strip() and entry.question.strip() else BLANK


def _unanswerable(entries: Sequence[Entry], problems: Sequence[str]) -> UserError:
    if all(problem == NO_ANSWER for problem in problems):
        return UserError(
            f"{Path(entries[0].source).name} has questions without answers: each has "
            f"{entries[0].fields}, and an answer stands in answers, answer or answer_text. There "
            "is nothing to train on or to score. lora-or-full ask RUN --data=FILE answers them."
        )
    sentences = []
    for problem in DROPPED:
        where = [e.where for e, found in zip(entries, problems, strict=True) if found == problem]
        if where:
            sentences.append(
                f"{len(where)} of {len(entries)} questions {problem}, the first: {where[0]}. "
            )
    return UserError(f"{''.join(sentences)}data.unanswerable=drop leaves them out.")


def _units(entries: Sequence[Entry]) -> dict[str, str]:
    """What the offsets count in each file whose offsets do not count characters alone."""
    answers: dict[str, list[tuple[str, str, int]]] = {}
    for entry in entries:
        for text, start in zip(entry.answers, entry.starts, strict=True):
            if start is not None:
                answers.setdefault(entry.source, []).append((entry.context, text, start))
    return {
        source: offsets.unit(offsets.positions(*one) for one in stated)
        for source, stated in answers.items()
        if not all(offsets.is_at(*one) for one in stated)
    }


def _position(context: str, text: str, stated: int | None, unit: str) -> tuple[int, str]:
    """The offset of an answer in its context, -1 if it is not there, and how it was repaired."""
    if stated is None:
        start = context.find(text)
        return start, LOOKED_UP if start >= 0 else NOT_IN_CONTEXT
    if unit and (start := offsets.positions(context, text, stated).get(unit, stated)) != stated:
        return start, f"offsets_in_{unit}".replace(" ", "_")
    if offsets.is_at(context, text, stated):
        return stated, ""
    start = offsets.nearest(context, text, stated)
    return start, "answers_repaired" if start >= 0 else NOT_IN_CONTEXT


def _is_same(one: Entry, other: Entry) -> bool:
    """Whether two questions with the same id are the same."""
    if text_key(one.question) != text_key(other.question):
        return False
    return not COUNTER.fullmatch(one.id) or text_key(one.context) == text_key(other.context)
