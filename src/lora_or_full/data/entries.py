"""Questions as files have them, from values of every shape that SQuAD's format has relatives in.

A value is a document, an article, a paragraph, a row a question, or a list of one of them. Format:
Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text".
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from lora_or_full.data.files import Value
from lora_or_full.errors import UserError, listed

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, but no tokenizer can read it
EXPECTED = {  # by pydantic error
    "string_type": "a str", "int_type": "a int", "list_type": "a list", "bool_type": "a bool",
}  # fmt: skip
LEVELS = ("data", "paragraphs", "qas")  # keys of lists: of articles, of paragraphs, of questions
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}


def _whole_characters(text: str) -> str:
    if half := HALF_CHARACTER.search(text):
        raise ValueError(f"holds {half[0]!r}, which is no character")
    return text


def _number_as_text(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    whole |= isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else value


def _offset(value: Any) -> Any:
    """A number, also as text or as the float that pandas makes of it; None where none is given."""
    if isinstance(value, str):
        if not value.strip():
            return None
        if re.fullmatch(r"\s*-?\d{1,18}(\.0+)?\s*", value):
            return int(value.partition(".")[0])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flag(value: Any) -> Any:
    return WORDS.get(str(value).strip().lower().removesuffix(".0"), value)


Text = Annotated[str, AfterValidator(_whole_characters)]
Name = Annotated[Text, BeforeValidator(_number_as_text)]


class _Format(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Answer(_Format):
    text: Name
    answer_start: Annotated[int | None, BeforeValidator(_offset)] = None


class _Row(_Format):
    id: Name = ""
    title: Name = ""
    context: Text
    question: Text
    answers: list[_Answer]
    is_impossible: Annotated[bool, BeforeValidator(_flag)] = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A question as a file has it, white space included, and its position there."""

    id: str
    title: str
    context: str
    question: str
    answers: list[str]
    starts: list[int | None]  # None where the file gives none
    where: str
    source: str = ""  # the file
    impossible: bool = False  # what the file says, whatever `answers` holds
    repairs: tuple[str, ...] = ()  # what was mended in reading, as it is counted
    fields: str = ""  # what the file has for a question without answers


def entries_of(values: Iterable[Value], source: str) -> list[Entry]:
    """Read the questions in the values of a file, or of a split of a data set: `source`.

    Raises:
        UserError: One is not as a question has to be.
    """
    found: list[Entry] = []
    for where, number, content in values:
        found += _entries(content, where, source, () if number is None else (number,), {})
    return found


def _entries(
    value: Any, where: str, source: str, numbers: tuple[int, ...], given: Mapping[str, Any]
) -> Iterator[Entry]:
    """Take the questions out of a value: a document, an article, a paragraph, a row, or a list.

    Args:
        value: What a file holds.
        where: Its path in the file.
        source: The file.
        numbers: Its position in the lists around it.
        given: Title and context that stand above it, each with its path.
    """
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from _entries(item, f"{where}[{n}]", source, (*numbers, n), given)
        return
    if not isinstance(value, Mapping):
        raise _fault(where, f"is a {type(value).__name__}, not an object")
    value = {name: item for name, item in value.items() if not _is_missing(item)}
    level = next((name for name in LEVELS if name in value), None)
    if level is None or "question" in value:
        yield _entry(value, where, source, numbers, given)
        return
    items, inside = value[level], _inside(where, level)
    if not isinstance(items, list):
        raise _fault(inside, f"is a {type(items).__name__}, not a list")
    own = {
        name: (value[name], _inside(where, name)) for name in ("title", "context") if name in value
    }
    if level == "paragraphs":
        first = items[0].get("context") if items and isinstance(items[0], Mapping) else ""
        own["first context"] = (first, "")
    yield from _entries(items, inside, source, numbers, {**given, **own})


def _entry(
    value: Mapping[str, Any], where: str, source: str, numbers: tuple[int, ...],
    given: Mapping[str, Any],
) -> Entry:  # fmt: skip
    above = {name: content for name, (content, _) in given.items()}
    if "question" not in value:
        raise _fault(where, f"has no {_expected(value, numbers, given)} (it has {_names(value)})")
    fields = {name: value[name] for name in _Row.model_fields if name in value}
    try:
        row = _Row.model_validate({**above, **fields, "answers": _answers(value, where)})
    except ValidationError as error:
        raise _misfit(error, where, value, given) from None
    repairs = []
    name, title = row.id, row.title
    if not name.strip():
        name = "#" + "-".join(map(str, numbers))
        repairs.append("ids_made")
    if not title.strip():
        first = str(above.get("first context") or row.context)
        title = f"untitled {hashlib.sha256(first.encode()).hexdigest()[:8]}"
        repairs.append("questions_without_title")
    answers = [answer for answer in row.answers if answer.text.strip()]
    if answers:
        repairs += ["empty_answers_left_out"] * (len(row.answers) - len(answers))
    return Entry(
        name, title, row.context, row.question,
        [answer.text for answer in answers], [answer.answer_start for answer in answers],
        where, source, row.is_impossible, tuple(repairs), "" if answers else _names(value),
    )  # fmt: skip


def _answers(value: Mapping[str, Any], where: str) -> Any:
    """The answers of a question as a list of objects, whichever shape they have."""
    key = next((name for name in ("answers", "answer", "answer_text") if name in value), None)
    found, starts = value.get(key or ""), value.get("answer_start")
    if isinstance(found, Mapping):
        if "text" not in found:
            raise _fault(_inside(where, str(key)), f"has no text (it has {_names(found)})")
        found, starts = found["text"], found.get("answer_start")
    if found is None:
        return []
    if isinstance(found, (str, int, float)) and not isinstance(found, bool):
        found, starts = [found], [starts]
    if not isinstance(found, list) or not all(isinstance(one, (str, int)) for one in found):
        return found
    if not isinstance(starts, list):
        starts = [None] * len(found)
    if len(starts) != len(found):
        raise _fault(_inside(where, str(key)), f"has {len(found)} texts but {len(starts)} offsets")
    return [
        {"text": text, "answer_start": start} for text, start in zip(found, starts, strict=True)
    ]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _expected(value: Mapping[str, Any], numbers: tuple[int, ...], given: Mapping[str, Any]) -> str:
    """What a value without a question lacks."""
    if "context" in given:
        return "question"
    if "context" in value:
        return "question or qas"
    return "context or paragraphs" if numbers else "data"


def _names(value: Mapping[str, Any]) -> str:
    return listed(value) or "nothing"


def _misfit(
    error: ValidationError, where: str, value: Mapping[str, Any], given: Mapping[str, Any]
) -> UserError:
    """Say what of a question is not as it has to be; of many faults the first."""
    fault = error.errors(include_url=False)[0]
    first, *inner = fault["loc"]
    above = first in given and first not in value
    path = given[str(first)][1] if above else _inside(where, str(first))
    path += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
    content, kind = fault["input"], fault["type"]
    if kind == "missing":
        what = f"is missing (it has {_names(content if inner else value)})"
    elif kind == "value_error":
        what = str(fault["ctx"]["error"])
    else:
        what = f"is a {type(content).__name__}, not {EXPECTED.get(kind, 'an object')}"
    return _fault(path, what)


def _fault(path: str, what: str) -> UserError:
    return UserError(f"Not SQuAD's format: {path.rstrip(' :')} {what}.")


def _inside(where: str, name: str) -> str:
    return f"{where}{name}" if where.endswith(": ") else f"{where}.{name}"
