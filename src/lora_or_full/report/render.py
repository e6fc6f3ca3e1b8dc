"""The report as blocks that templates make, and the files written of them: Markdown, HTML, SVG."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from lora_or_full.report import formatting
from lora_or_full.runs.store import write_text


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Points:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Code:
    """Commands as they are typed."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Cells; all but the first of a row are right-aligned."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], caption: str = "") -> "Table":
        """Make a table of at least one row, each with its values by the heads of the columns."""
        cells = [[formatting.cell(value) for value in row.values()] for row in rows]
        return cls(list(rows[0]), cells, caption)


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture as SVG, stored as `name`.svg; `caption` says what it shows."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Example:
    """A wrongly answered question, and the pieces of its context, each with whether to mark it."""

    question: str
    lines: Sequence[str]
    pieces: Sequence[tuple[str, bool]]


Block = Text | Points | Code | Table | Figure | Example


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its blocks."""

    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        """Identifier of the heading in HTML."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def section(template: str, **values: Any) -> Section:
    """Make a section from `sections/<template>.jinja`.

    A template sets the section's `title` and calls BLOCKS by name, in the order of the report.
    The words between `{% call table(head, rows) %}` and `{% endcall %}` are the last argument.

    Args:
        template: The file's name, without its suffix.
        values: What the template names.
    """
    blocks: list[Block] = []

    def adding(kind: Callable[..., Block]) -> Callable[..., str]:
        def add(*arguments: Any, caller: Callable[[], str] | None = None) -> str:
            words = [re.sub(r"\s*\n\s*", " ", caller().strip())] if caller else []
            blocks.append(kind(*arguments, *words))
            return ""

        return add

    calls = {name: adding(kind) for name, kind in BLOCKS.items()}
    module = TEMPLATES.get_template(f"sections/{template}.jinja").make_module(values | calls)
    return Section(vars(module)["title"], blocks)


def write(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write report.md, report.html and figures/ into a folder, each file atomically."""
    figures = {b.name: b.svg for part in sections for b in part.blocks if isinstance(b, Figure)}
    before = folder / "report.md"
    if before.is_file():  # only its own figures are removed
        named = re.findall(r"\(figures/(\w+)\.svg\)", before.read_text("utf-8", errors="replace"))
        for name in set(named) - figures.keys():
            (folder / "figures" / f"{name}.svg").unlink(missing_ok=True)
    for name, svg in figures.items():
        write_text(folder / "figures" / f"{name}.svg", svg)
    for name in ("report.md", "report.html"):
        template = TEMPLATES.get_template(f"{name}.jinja")
        write_text(folder / name, template.render(title=title, sections=sections))


def _plain(text: str) -> str:
    """Text in one line of Markdown, with everything escaped that is taken as markup."""
    return " ".join(_escaped(text).split())


def _marked(pieces: Sequence[tuple[str, bool]]) -> str:
    """Pieces of a context in one line of Markdown, the marked ones bold."""
    parts = [f"<b>{_escaped(text)}</b>" if mark else _escaped(text) for text, mark in pieces]
    return " ".join("".join(parts).split())


def _escaped(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)
    # GitHub makes links and mentions of these.
    return re.sub(r"(?i)(www|https?|ftp)(?=[.:])|@(?=\w)", lambda m: f"{m[0]}<!-- -->", text)


BLOCKS: dict[str, Callable[..., Block]] = {
    "text": Text, "points": Points, "code": Code, "table": Table, "records": Table.of,
    "figure": Figure, "block": lambda made: made,
}  # fmt: skip
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
    autoescape=select_autoescape(["html.jinja"]), undefined=StrictUndefined,
)  # fmt: skip
TEMPLATES.filters |= {"plain": _plain, "marked": _marked} | formatting.FILTERS
