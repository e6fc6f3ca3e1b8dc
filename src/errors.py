"""The one error that a person can mend, and how others' words are put into it."""

from collections.abc import Iterable

MOST, LONGEST = 20, 100  # names that are listed, and characters of each


class UserError(Exception):
    """A mistake in what was asked for.

    Its message is all that the person sees: what was given, what is accepted, which key to change.
    What it quotes from data can't steer a terminal: characters that are not printed are spelt out.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() or c == "\n" else _spelt(c) for c in message))


def first_line(error: BaseException) -> str:
    """The first line of what a library says was wrong that says anything."""
    lines = str(error).splitlines()
    return next((line for line in lines if line.strip()), type(error).__name__)


def listed(names: Iterable[object]) -> str:
    """Names that data brings, a few of them: there may be any number, of any length."""
    texts = [text if (text := str(name)).isprintable() else repr(text) for name in names]
    shown = [text if len(text) <= LONGEST else f"{text[:LONGEST]}..." for text in texts[:MOST]]
    more = f" and {len(texts) - MOST} more" if len(texts) > MOST else ""
    return ", ".join(shown) + more


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode()
