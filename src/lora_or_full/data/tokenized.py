"""The questions of a split as token ids: made in one pass, and cached."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk

from lora_or_full.data.prompt import Prompt, PromptTokens, window
from lora_or_full.data.squad import Question
from lora_or_full.runs import store

FORMAT = 5  # part of the cache's key: raise it when the content of a row changes
TokenizedQuestion = dict[str, Any]


class TokenizedQuestions(torch.utils.data.Dataset[TokenizedQuestion]):
    """Tokenized questions, and each of their contexts once; both stay on disk until they are read.

    A row has id, title, paragraph (the number of its context), context, question, answers, the
    token ids prefix_ids, context_ids (as many as fit), question_ids and answer_ids (with the end),
    the counts prompt_tokens, answer_tokens and gold_tokens (of the shortest gold answer, without
    the end), and context_cut.
    """

    def __init__(self, questions: Dataset, contexts: Dataset) -> None:
        self.questions, self.contexts = questions, contexts

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> TokenizedQuestion:
        row = self.questions[number]
        context = self.contexts[row["paragraph"]]
        start, stop = row.pop("start"), row.pop("stop")
        ids = context["context_ids"][start:stop]
        return row | {"context": context["context"], "context_ids": ids}

    def column(self, name: str) -> list[Any]:
        """Give one value of every row, such as prompt_tokens."""
        return self.questions.data.column(name).to_pylist()


def prompt_of(row: TokenizedQuestion) -> PromptTokens:
    """Give the prompt of a tokenized question."""
    return PromptTokens(row["prefix_ids"], row["context_ids"], row["question_ids"])


def make(
    questions: Sequence[Question], prompt: Prompt, length: int, training: bool
) -> TokenizedQuestions:
    """Tokenize questions, and shorten contexts that do not fit.

    In training a question without room for any context is dropped, and a long context is cut around
    the answers of as many of its questions as one window holds, so that they can share it.

    Args:
        questions: Questions of a split.
        prompt: Makes the model's prompts.
        length: Largest number of tokens of a prompt, in training with its answer.
        training: Whether the gold answers may be looked at; otherwise a question may have none.
    """
    contexts = list(dict.fromkeys(q.context for q in questions))
    numbers = {context: number for number, context in enumerate(contexts)}
    context_ids, parts = _tokens(questions, [numbers[q.context] for q in questions], prompt)
    said = prompt.answers([q.answers[0] if q.answers else "" for q in questions])
    all_golds = iter(prompt.answers([text for q in questions for text in q.answers]))
    shortest = [min(map(len, islice(all_golds, len(q.answers))), default=1) - 1 for q in questions]
    rows: list[TokenizedQuestion] = []
    # Of each context that is cut around answers: its rows, with the characters of their answers.
    cut: dict[int, list[tuple[TokenizedQuestion, int, int]]] = {}
    for q, own, answer_ids, gold_tokens in zip(questions, parts, said, shortest, strict=True):
        paragraph, around = numbers[q.context], len(own.prefix) + len(own.question)
        room = length - around - len(answer_ids) * training
        if training and room < 1:
            continue
        size = len(context_ids[paragraph])
        kept = window(size, max(room, 0))
        row = {
            "id": q.id,
            "title": q.title,
            "paragraph": paragraph,
            "question": q.question,
            "answers": q.answers,
            "prefix_ids": own.prefix,
            "question_ids": own.question,
            "answer_ids": answer_ids,
            "start": kept.start,
            "stop": kept.stop,
            "context_cut": kept.stop < size,
            "prompt_tokens": around + kept.stop,
            "answer_tokens": len(answer_ids),
            "gold_tokens": gold_tokens,
        }
        rows.append(row)
        if training and row["context_cut"] and (start := q.starts[0]) >= 0:
            cut.setdefault(paragraph, []).append((row, start, start + len(q.answers[0])))
    for paragraph, cut_rows in cut.items():
        question = cut_rows[0][0]["question"]
        spans = prompt.context_offsets(contexts[paragraph], question)[: len(context_ids[paragraph])]
        golds = [_tokens_of(start, stop, spans) for _, start, stop in cut_rows]
        windows = _windows(len(spans), [row["stop"] for row, *_ in cut_rows], golds)
        for (row, *_), kept in zip(cut_rows, windows, strict=True):
            row["prompt_tokens"] -= row["stop"] - (kept.stop - kept.start)
            row.update(start=kept.start, stop=kept.stop)
    return TokenizedQuestions(
        Dataset.from_list(rows),
        Dataset.from_dict({"context": contexts, "context_ids": context_ids}),
    )


def _tokens(
    questions: Sequence[Question], paragraphs: Sequence[int], prompt: Prompt
) -> tuple[list[list[int]], list[PromptTokens]]:
    """Give the tokens of each context that are the same for all its questions; and of each question
    its prompt without them."""
    order = sorted(range(len(questions)), key=paragraphs.__getitem__)
    made = prompt.tokens([(questions[n].context, questions[n].question) for n in order])
    context_ids: list[list[int]] = []
    parts: dict[int, PromptTokens] = {}
    for _, group in groupby(zip(order, made, strict=True), key=lambda one: paragraphs[one[0]]):
        own = dict(group)
        columns = zip(*(one.context for one in own.values()), strict=False)
        shared = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]
        context_ids.append(shared)
        for number, one in own.items():
            rest = one.context[len(shared) :] + one.question
            parts[number] = PromptTokens(one.prefix, [], rest)
    return context_ids, [parts[number] for number in range(len(questions))]


def cached(
    folder: Path, build: Callable[[], tuple[TokenizedQuestions, dict[str, Any]]]
) -> tuple[TokenizedQuestions, dict[str, Any]]:
    """Rows and facts of them: loaded from an intact cache folder, or built and cached."""
    disable_progress_bars()
    if folder.exists() and not store.is_intact(folder):
        print(f"Warning: {folder} is damaged; it is rebuilt.", file=sys.stderr)
        shutil.rmtree(folder)
    if not folder.exists():
        rows, facts = build()
        made = store.temporary_path(folder)
        made.mkdir(parents=True)
        try:
            rows.questions.save_to_disk(made / "questions")
            rows.contexts.save_to_disk(made / "contexts")
            (made / "facts.json").write_text(json.dumps(facts))
            files = [file for file in made.rglob("*") if file.is_file()]
            store.write_checksums(made, {file.relative_to(made).as_posix(): file for file in files})
            made.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    questions, contexts = (load_from_disk(str(folder / name)) for name in ("questions", "contexts"))
    assert isinstance(questions, Dataset)
    assert isinstance(contexts, Dataset)
    return TokenizedQuestions(questions, contexts), json.loads((folder / "facts.json").read_text())


def _windows(length: int, rooms: list[int], golds: list[tuple[int, int]]) -> list[slice]:
    """Choose the window of a context of `length` tokens that each question keeps.

    One window serves as many questions as it holds the `golds` of (first and one past the last
    token of a gold answer); it is as wide as the smallest of their `rooms`.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(golds)), key=lambda n: golds[n]):
        group = [*groups[-1], number] if groups else [number]
        end = max(golds[n][1] for n in group)
        if groups and end - golds[group[0]][0] <= min(rooms[n] for n in group):
            groups[-1] = group
        else:
            groups.append([number])
    windows = [slice(0, 0)] * len(golds)
    for group in groups:
        gold = (golds[group[0]][0], max(golds[n][1] for n in group))
        kept = window(length, min(rooms[n] for n in group), gold)
        for number in group:
            windows[number] = kept
    return windows


def _tokens_of(start: int, stop: int, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """First and one past the last token of some characters; equal if the tokenizer drops them."""
    touched = [n for n, (first, end) in enumerate(offsets) if first < stop and end > start]
    before = sum(end <= start for _, end in offsets)
    return (touched[0], touched[-1] + 1) if touched else (before, before)
