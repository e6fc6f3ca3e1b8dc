"""Spans of a text in a context."""

import re
from collections.abc import Iterable

Span = tuple[int, int]  # its first character, and one past its last


def spans(text: str, context: str) -> list[Span]:
    """Find a text in a context as whole words: "10" is not in "1910".

    If there is no exact match, case and kinds of white space are ignored.
    """
    words = text.split()
    if not words:
        return []
    exact, loose = re.escape(text.strip()), r"\s+".join(map(re.escape, words))
    before, after = _edge(words[0][0], "(?<!"), _edge(words[-1][-1], "(?!")
    for pattern, flags in ((exact, 0), (loose, re.IGNORECASE)):
        if found := [m.span() for m in re.finditer(f"{before}{pattern}{after}", context, flags)]:
            return found
    return []


def pieces(context: str, marked: Iterable[Span]) -> list[tuple[str, bool]]:
    """Split a context into pieces, each with whether it is one of the spans.

    Of two overlapping spans the earlier counts.
    """
    found, at = [], 0
    for start, stop in sorted(marked, key=lambda span: (span[0], -span[1])):
        if start >= at:
            found += [(context[at:start], False), (context[start:stop], True)]
            at = stop
    return [*found, (context[at:], False)]


def _edge(character: str, lookaround: str) -> str:
    """The pattern for the edge of a word.

    Scripts without case write words together, so that a word may begin or end anywhere.
    """
    cased = character.upper() != character.lower()
    return rf"{lookaround}\w)" if cased or character.isdigit() else ""
