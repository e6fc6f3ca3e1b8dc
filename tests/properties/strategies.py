"""What may come in, generated: texts, JSON, SQuAD files good and spoilt; and how it is met."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lora_or_full.errors import UserError

T = TypeVar("T")
END = "<|endoftext|>"
LONGEST_MESSAGE = 5000  # characters; the list of all keys takes half of it

WORDS = ("the", "a", "Ada", "Oslo", "1999", "3.14", "in", "of", "bridge", "mill,", "(old)", "U.S.")
ODD = (
    " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u2028", "\x85", "\x1c", "\x00", "\x1b[3m",
    "\ufeff", "\u200b", "\u200d", "\u0301", "e\u0301", "n\u0303", "\u202eabc\u202c", "שלום",
    "مرحبا",
    "١٢٣", "東京", "👩‍👩‍👧", "🇨🇭", "ß", "İ", "ı", "ﬁ", "Ω", "\U00010348",
    END, "Question:", "Answer:",
    "|", "\\", "'", '"', "`", "<b>", "</script>", "&amp;", "${x}", "%s",
    "$x$", "$\\frac{$", "{}", "../", "-", "=",
)  # fmt: skip
HALVES = ("\ud800", "\udfff", "a\udc80b")


def examples(share: float) -> settings:
    """So many of the examples of the profile: one where each takes longer than others."""
    return settings(max_examples=max(1, round(settings().max_examples * share)))


def met(action: Callable[[], T]) -> tuple[T | None, str]:
    """What it gives, and in which words it is refused, which a terminal has to be able to show.

    Anything else that it raises is a failure."""
    try:
        return action(), ""
    except UserError as error:
        message = str(error)
        assert message.strip()
        assert all(c.isprintable() or c == "\n" for c in message)
        assert len(message) < LONGEST_MESSAGE
        return None, message


def texts(most: int = 8) -> SearchStrategy[str]:
    """Texts of up to so many pieces, each a word, something odd, or any characters."""
    piece = st.sampled_from(WORDS) | st.sampled_from(ODD) | st.text(max_size=5)
    return st.lists(piece, max_size=most).map("".join)


def any_json() -> SearchStrategy[Any]:
    """What JSON can spell, half characters, huge numbers and NaN among it."""
    leaf = (
        st.none() | st.booleans() | st.integers() | st.floats() | texts(3)
        | st.sampled_from((*HALVES, 10**400, -1, 0, 1, 1e300, "", [], {}))
    )  # fmt: skip
    keys = texts(2) | st.sampled_from(HALVES)
    return st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=10,
    )  # fmt: skip


@st.composite
def documents(draw: DrawFn) -> dict[str, Any]:
    """A file in SQuAD's format, each answer where it says: at the very start and end of a context
    too, the same more than once, or none; contexts may be empty or long, and occur twice."""
    contexts = draw(st.lists(texts(12), min_size=1, max_size=4))
    if draw(st.booleans()):
        contexts.append(draw(texts(6)) * draw(st.sampled_from((20, 60))))
    data: list[dict[str, Any]] = []
    for a in range(draw(st.integers(1, 5))):
        paragraphs = []
        for p in range(draw(st.integers(1, 2))):
            context = draw(st.sampled_from(contexts))
            qas = [
                {
                    "id": f"{a}.{p}.{q}{draw(texts(1))}",
                    "question": draw(texts(4)),
                    "answers": draw(_answers(context)),
                }
                for q in range(draw(st.integers(1, 3)))
            ]
            paragraphs.append({"context": context, "qas": qas})
        title = draw(texts(2))  # mostly one of its own: with fewer than three nothing is split
        unique = draw(st.integers(0, 9)) > 0
        data.append({"title": f"{a} {title}" if unique else title, "paragraphs": paragraphs})
    return {"version": "1.1", "data": data}


@st.composite
def _answers(draw: DrawFn, context: str) -> list[dict[str, Any]]:
    if not context.strip():
        return []
    size = len(context)
    place = st.integers(0, size) | st.sampled_from((0, size))
    answers = []
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3, 0)))):
        start, stop = sorted((draw(place), draw(place)))
        if context[start:stop].strip():
            answers.append({"text": context[start:stop], "answer_start": start})
    if not answers and draw(st.booleans()):
        answers = [{"text": context, "answer_start": 0}]
    return answers + answers[:1] * draw(st.booleans())


@st.composite
def spoilt(draw: DrawFn, content: Any, faults: int = 3) -> Any:
    """A copy of some JSON, changed at random places: another value, one less, or one twice."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, faults))):
        slots = list(_slots(content))
        if not slots:
            return draw(any_json())
        holder, key = draw(st.sampled_from(slots))
        match draw(st.sampled_from(("other", "other", "gone", "again"))):
            case "other":
                holder[key] = draw(any_json())
            case "gone":
                del holder[key]
            case "again" if isinstance(holder, list):
                holder.append(holder[key])
            case "again":
                holder[draw(texts(2))] = holder[key]
    return content


def _slots(content: Any) -> Any:
    inside = (
        content.items() if isinstance(content, dict)
        else enumerate(content) if isinstance(content, list) else ()
    )  # fmt: skip
    for key, value in inside:
        yield content, key
        yield from _slots(value)


@st.composite
def json_files(draw: DrawFn) -> bytes:
    """What may stand in a .json file: SQuAD's format, that spoilt, any JSON, or any bytes."""
    content = draw(st.one_of(
        documents(), documents().flatmap(spoilt), any_json().map(lambda value: {"data": value}),
        any_json(), st.binary(),
    ))  # fmt: skip
    if isinstance(content, bytes):
        return content
    text = json.dumps(content, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text
