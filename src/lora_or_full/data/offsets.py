"""What the offsets of a file count, where they do not count the characters of its contexts.

Annotation tools in a browser count UTF-16 units, others bytes; a text that came from Windows may
have lost its carriage returns, or its byte order mark, after it was annotated.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import product

UNITS: dict[str, Callable[[str], int]] = {
    "": len,
    "UTF-16 units": lambda text: len(text.encode("utf-16-le", "surrogatepass")) // 2,
    "UTF-8 bytes": lambda text: len(text.encode("utf-8", "surrogatepass")),
}
RETURNS: dict[str, Callable[[str], int]] = {  # what they add
    "": lambda text: 0,
    "with lost carriage returns": lambda text: text.count("\n") - text.count("\r\n"),
    "without carriage returns": lambda text: -text.count("\r\n"),
}
ORIGINS = {"": 0, "from 1 or after a byte order mark": 1}


def positions(context: str, text: str, start: int) -> dict[str, int]:
    """Positions of a text, in characters, by each unit in which it is at `start`."""
    fitting: dict[str, int] = {}
    # A character counts as zero (a carriage return left out) to five (four bytes and a lost one).
    last = start + context.count("\r\n")
    position = context.find(text, max(0, start // 8))
    while 0 <= position <= last:
        before = context[:position]
        lengths = [(name, measure(before)) for name, measure in UNITS.items()]
        returns = [(name, more(before)) for name, more in RETURNS.items()]
        for (unit, length), (around, more), (origin, first) in product(
            lengths, returns, ORIGINS.items()
        ):
            if length + more + first == start:
                fitting.setdefault(" ".join(filter(None, (unit, around, origin))), position)
        position = context.find(text, position + 1)
    return fitting


def unit(answers: Iterable[Mapping[str, int]]) -> str:
    """The unit that most answers of a file fit, the simplest of several; empty for characters.

    One answer is no evidence: it fits some unit by chance.

    Args:
        answers: The `positions` of each.
    """
    votes = Counter(name for fitting in answers for name in fitting)
    best = max(votes, key=lambda name: (votes[name], -len(name)), default="")
    return best if votes[best] > 1 else ""


def nearest(context: str, text: str, start: int) -> int:
    """The position of a text nearest to `start`; -1 if there is none."""
    before = context.rfind(text, 0, max(0, start) + len(text))
    after = context.find(text, max(0, start))
    places = [position for position in (before, after) if position >= 0]
    return min(places, key=lambda position: abs(position - start)) if places else -1


def is_at(context: str, text: str, start: int) -> bool:
    """Whether a text is at a position."""
    return 0 <= start <= len(context) and context.startswith(text, start)
