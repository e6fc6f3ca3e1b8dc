"""A prompt's template, taken apart at its fields."""

from collections.abc import Sequence
from string import Formatter
from typing import NamedTuple

DEFAULT = "Context: {context}\nQuestion: {question}\nAnswer: {answer}"


class Template(NamedTuple):
    """The texts around the fields of a prompt.

    Attributes:
        opening: Before the first field.
        between: Between context and question.
        closing: After both, up to the answer.
        lead: Spaces that the answer begins with: most tokenizers join them to a word.
        context_first: Whether the context comes before the question, so that questions share it.
    """

    opening: str
    between: str
    closing: str
    lead: str
    context_first: bool

    def text(self, context: str, question: str) -> str:
        """Fill in context and question, up to where the answer begins."""
        first, second = (context, question) if self.context_first else (question, context)
        return self.opening + first + self.between + second + self.closing

    def before_context(self, question: str) -> str:
        """Give the text before the context."""
        return self.opening if self.context_first else self.opening + question + self.between


def parse(text: str) -> Template:
    """Take apart a text with {context}, {question} and, at its end, {answer}.

    Raises:
        ValueError: A field is missing, unknown, formatted or there twice, or text follows {answer}.
    """
    pieces = list(Formatter().parse(text))
    fields = [name for _, name, *_ in pieces]
    if any(name is not None and (form or change) for _, name, form, change in pieces):
        raise ValueError
    return from_parts([literal for literal, *_ in pieces], fields)


def from_parts(texts: Sequence[str], fields: Sequence[str | None]) -> Template:
    """Put a template together of the texts before the fields `context`, `question`, `answer`.

    Raises:
        ValueError: The fields are others.
    """
    if sorted(map(str, fields)) != ["answer", "context", "question"] or fields[-1] != "answer":
        raise ValueError
    opening, between, end = texts
    closing = end.rstrip(" ")
    return Template(opening, between, closing, end[len(closing) :], fields[0] == "context")
