"""A prompt's template, taken apart at its fields."""

from collections.abc import Sequence
from string import Formatter
from typing import NamedTuple

DEFAULT = "Context: {context}\nQuestion: {question}\nAnswer: {answer}"
CHAT = "chat"  # in the place of a template: CHAT_TURN, in the chat template of the tokenizer
CHAT_TURN = (
    "Answer the question with as few words of the context as possible.\n"
    "Context: {context}\nQuestion: {question}"
)


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

    def shown(self) -> str:
        """Give the template as one text, which `parse` takes apart to the same."""
        return self.filled("{context}", "{question}") + self.lead + "{answer}"

    def filled(self, context: str, question: str) -> str:
        """Fill in context and question, with the braces of the other texts doubled."""
        opening, between, closing = (
            text.replace("{", "{{").replace("}", "}}")
            for text in (self.opening, self.between, self.closing)
        )
        escaped = self._replace(opening=opening, between=between, closing=closing)
        return escaped.text(context, question)

    def before_context(self, question: str) -> str:
        """Give the text before the context."""
        return self.opening if self.context_first else self.opening + question + self.between


def parse(text: str) -> Template:
    """Take apart a text with {context}, {question} and, at its end, {answer}.

    Raises:
        ValueError: A field is missing, unknown, formatted or there twice, or text follows {answer}.
    """
    texts, fields = [""], []
    for literal, field, form, change in Formatter().parse(text):
        texts[-1] += literal  # a doubled brace ends one
        if field is not None:
            fields.append(field)
            texts.append("")
            if form or change:
                raise ValueError(f"{field} has a format")
    if texts.pop():
        raise ValueError("text follows the last field")
    return from_parts(texts, fields)


def from_parts(texts: Sequence[str], fields: Sequence[str]) -> Template:
    """Put a template together of the texts before the fields `context`, `question`, `answer`.

    Raises:
        ValueError: The fields are others.
    """
    if sorted(fields) != ["answer", "context", "question"] or fields[-1] != "answer":
        raise ValueError(f"the fields are {fields}")
    opening, between, end = texts
    closing = end.rstrip(" ")
    return Template(opening, between, closing, end[len(closing) :], fields[0] == "context")
