"""What may come in, generated: texts, JSON, SQuAD files good and spoilt; and how it is met."""

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from pyarrow import parquet

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


# Files as people have them: a good document in another shape


@dataclass(frozen=True)
class Variant:
    """A file, and what is in it.

    Attributes:
        name: Its name.
        content: Its bytes.
        questions: Each as (context, question, answers, their starts), stripped; of those without an
            answer, and of those that are said to have none, no answers and no starts.
        ids: The ids that it has, as texts.
        exact: Whether all offsets are there and count characters.
        chance: Number of other offsets at which the answer stands too.
        utf8: Whether its text is UTF-8.
    """

    name: str
    content: bytes
    questions: list[tuple[str, str, tuple[str, ...], tuple[int, ...]]]
    ids: list[str]
    exact: bool
    chance: int
    utf8: bool


OFFSETS: dict[str, Callable[[str, int], Any]] = {  # by the text before an answer, and its start
    "characters": lambda before, start: start,
    "text": lambda before, start: str(start),
    "float": lambda before, start: float(start),
    "gone": lambda before, start: None,
    "UTF-16": lambda before, start: len(before.encode("utf-16-le")) // 2,
    "bytes": lambda before, start: len(before.encode()),
    "returns": lambda before, start: start + before.count("\n") - before.count("\r\n"),
    "no returns": lambda before, start: start - before.count("\r\n"),
    "mark": lambda before, start: start + 1,
    "noise": lambda before, start: start + len(before) % 3,
}
EXACT = ("characters", "text", "float")


PIECES = (
    "Oslo", "Ada", "the mill", "1604", "1604", "of", "🎉", "né", "東京", "e\u0301", "a\u00a0b",
    "U.S.", '"so"', "a,b", "a;b\tc", "\ufeff", "\u2028", "x|y", "{}", "[1]",
)  # fmt: skip


def towns(rng: random.Random) -> dict[str, Any]:
    """A document of small odd texts, each answer where it says: with answers that occur twice, run
    over line ends or are missing, blank texts, and paragraphs that articles share."""
    data: list[dict[str, Any]] = []
    shared = "One of many. Ada was here.\r\nAda, too."
    for a in range(rng.choice((1, 2, 3, 4, 5, 6, 6))):
        paragraphs = []
        for p in range(rng.choice((1, 1, 2, 3))):
            pieces = [rng.choice(PIECES) for _ in range(rng.randint(2, 12))]
            context = "".join(f"{piece}{rng.choice((' ', ' ', ' ', chr(10), chr(13) + chr(10)))}"
                              for piece in (f"{a}-{p}", *pieces))  # fmt: skip
            context = rng.choice((context,) * 8 + (f" \n{context}", shared, shared, " "))
            qas = []
            for q in range(rng.randint(1, 3)):
                answers = []
                for _ in range(rng.choice((1, 1, 1, 2, 0))):
                    start = rng.randrange(len(context))
                    text = context[start : start + rng.choice((1, 3, 9, 30))]
                    answers += [{"text": text, "answer_start": start}] if text.strip() else []
                asked = rng.choice(("Who?",) * 9 + ("", " Where \n now?"))
                asked = f"{asked} {a}{p}{q}" if asked else asked
                qas.append({"id": f"{a}.{p}.{q}", "question": asked, "answers": answers})
            paragraphs.append({"context": context, "qas": qas})
        data.append({"title": f"Town {a}", "paragraphs": paragraphs})
    return {"version": "1.1", "data": data}


@st.composite
def variants(draw: DrawFn) -> Variant:
    """A document in a shape that tools and people produce: without ids or titles, with numbers for
    ids, offsets that count something else, flat rows, a table, another encoding."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    document = towns(rng)
    offset = draw(st.sampled_from([*EXACT, *OFFSETS]))
    ids = draw(st.sampled_from(("texts", "numbers", "none", "some")))
    titles = draw(st.sampled_from(("own", "own", "none", "one")))
    shape = draw(st.sampled_from(
        ("document", "articles", "paragraphs", "data", "rows", "lines", "csv", "tsv", "parquet")
    ))  # fmt: skip
    table = shape in ("csv", "tsv", "parquet")
    form = draw(st.sampled_from(("hub",) if shape == "parquet" else ("squad", "hub", "columns")))
    questions, given_ids, number, chance = [], [], 0, 0
    for article in document["data"]:
        if titles == "none":
            del article["title"]
        elif titles == "one":
            article["title"] = "All"
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            for qa in paragraph["qas"]:
                number += 1
                if ids == "numbers":
                    qa["id"] = str(number) if table else number
                elif ids == "none" or (ids == "some" and number % 2):
                    del qa["id"]
                given_ids += [str(qa["id"])] if "id" in qa else []
                answers = qa.pop("answers")[: 1 if form == "columns" else None]
                impossible = rng.random() < 0.05
                if impossible or rng.random() < 0.5:
                    qa["is_impossible"] = impossible
                taken = [] if impossible else answers
                shift = len(context) - len(context.lstrip())
                starts = [
                    a["answer_start"] + len(a["text"]) - len(a["text"].lstrip()) - shift
                    for a in taken
                ]
                golds = tuple(a["text"].strip() for a in taken)
                questions.append((context.strip(), qa["question"].strip(), golds, tuple(starts)))
                stated = [
                    (a["text"], OFFSETS[offset](context[: a["answer_start"]], a["answer_start"]))
                    for a in answers
                ]
                chance += sum(
                    isinstance(start, int) and start != a["answer_start"]
                    and context.startswith(text, start)
                    for a, (text, start) in zip(answers, stated, strict=True)
                )  # fmt: skip
                qa |= _in_form(form, stated, rng.random() < 0.5)
    rows = [
        {k: v for k, v in article.items() if k == "title"} | {"context": paragraph["context"]} | qa
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    text = _in_shape(shape, document, rows)
    name = {"lines": draw(st.sampled_from(("f.jsonl", "f.json"))), "csv": "f.csv", "tsv": "f.tsv",
            "parquet": "f.parquet"}.get(shape, "f.json")  # fmt: skip
    encoding = draw(st.sampled_from(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "cp1252")))
    content, utf8 = (text, True) if isinstance(text, bytes) else _encoded(text, encoding)
    return Variant(name, content, questions, given_ids, offset in EXACT, chance, utf8)


def _in_form(form: str, answers: list[tuple[str, Any]], empty: bool) -> dict[str, Any]:
    """The fields of a question that hold its answers; a None among the offsets is left out."""
    texts, starts = [text for text, _ in answers], [start for _, start in answers]
    none = None in starts
    if form == "columns":
        start = {} if none or not starts else {"answer_start": starts[0]}
        return {"answer_text": texts[0] if texts else ""} | start
    if form == "hub":
        return {"answers": {"text": texts} | ({} if none else {"answer_start": starts})}
    found = [
        {"text": text} | ({} if start is None else {"answer_start": start})
        for text, start in answers
    ]
    if not found and empty:  # an annotation tool's
        return {"answers": [{"text": "", "answer_start": 0}]}
    return {"answers": found[0] if len(found) == 1 and empty else found}


def _in_shape(shape: str, document: Any, rows: list[dict[str, Any]]) -> str | bytes:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if shape in ("csv", "tsv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, columns, delimiter="," if shape == "csv" else "\t")
        writer.writeheader()
        for row in rows:
            answers = row.get("answers")
            writer.writerow(row if answers is None else row | {"answers": json.dumps(answers)})
        return out.getvalue()
    if shape == "parquet":
        out = io.BytesIO()
        parquet.write_table(pyarrow.table({c: [row.get(c) for row in rows] for c in columns}), out)
        return out.getvalue()
    if shape == "lines":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    paragraphs = [paragraph for article in document["data"] for paragraph in article["paragraphs"]]
    content = {"document": document, "articles": document["data"], "paragraphs": paragraphs,
               "data": {"data": rows}, "rows": rows}[shape]  # fmt: skip
    return json.dumps(content, ensure_ascii=False)


def _encoded(text: str, encoding: str) -> tuple[bytes, bool]:
    """The bytes of a text, and whether they are UTF-8 too."""
    try:
        content = text.encode(encoding)
    except UnicodeEncodeError:
        content = text.encode()
    try:
        return content, "\0" not in content.decode()
    except UnicodeDecodeError:
        return content, False
