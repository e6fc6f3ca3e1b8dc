"""Where a text stands in a context."""

import re
from collections.abc import Iterable

Span = tuple[int, int]  # its first character, and one past its last


def spans(text: str, context: str) -> list[Span]:
    """Each place of `text` in `context`, as words of their own: "10" is not meant in "1910".

    Only if there is none, upper and lower case count alike, and so does all white space.
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


def pieces(context: str, places: Iterable[Span]) -> list[tuple[str, bool]]:
    """The context in parts, and whether each is one of `places`; of two that overlap the
    earlier counts."""
    found, at = [], 0
    for start, stop in sorted(places, key=lambda place: (place[0], -place[1])):
        if start < at:
            continue
        found += [(context[at:start], False), (context[start:stop], True)]
        at = stop
    return [*found, (context[at:], False)]


def _edge(character: str, lookaround: str) -> str:
    """The pattern for the end of a word. Scripts without upper and lower case write words together
    or join small ones to them, so that a word may begin or end anywhere."""
    cased = character.upper() != character.lower()
    return rf"{lookaround}\w)" if cased or character.isdigit() else ""
