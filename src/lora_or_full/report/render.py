"""The report as blocks that templates make, and the files written of them: Markdown, HTML, SVG."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from lora_or_full.evaluation.scoring import rules
from lora_or_full.report import formatting
from lora_or_full.report.formatting import cell
from lora_or_full.report.study import shown
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
    """Make a section by the template of this name in `sections/`.

    A template sets `title`, and adds blocks in their order by calling `text`, `points`, `table`,
    `figure` and `block`. What stands in a call is the text or caption.

    Args:
        template: File name without its suffix.
        values: What the template knows.
    """
    blocks: list[Block] = []

    def text(caller: Callable[[], str]) -> str:
        return _added(blocks, Text(_words(caller())))

    def points(caller: Callable[..., str]) -> str:
        items: list[str] = []
        caller(lambda caller: _added(items, _words(caller())))
        return _added(blocks, Points(items))

    def table(*head: str, caller: Callable[..., str]) -> str:
        rows: list[list[str]] = []
        caption = caller(lambda *cells: rows.append(list(map(cell, cells))))
        return _added(blocks, Table(head, rows, _words(caption)))

    def figure(name: str, svg: str, caller: Callable[[], str]) -> str:
        return _added(blocks, Figure(name, svg, _words(caller())))

    calls = {call.__name__: call for call in (text, points, table, figure)}
    module = TEMPLATES.get_template(f"sections/{template}.jinja").make_module(
        values | calls | {"block": blocks.append}
    )
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
    return _escaped(" ".join(text.split()))


def _marked(pieces: Sequence[tuple[str, bool]]) -> str:
    """Pieces of a context in one line of Markdown, the marked ones bold."""
    parts = [f"<b>{_escaped(text)}</b>" if mark else _escaped(text) for text, mark in pieces]
    return " ".join("".join(parts).split())


def _escaped(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)
    # GitHub makes links and mentions of these.
    return re.sub(r"(?i)(www|https?|ftp)(?=[.:])|@(?=\w)", lambda m: f"{m[0]}<!-- -->", text)


def _words(text: str) -> str:
    """Lines of a template as one."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _added(to: list[Any], one: Any) -> str:
    """What a template shows in place of a call that adds to a list: nothing."""
    to.append(one)
    return ""


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
    autoescape=select_autoescape(["html.jinja"]), undefined=StrictUndefined,
    extensions=["jinja2.ext.do"],
)  # fmt: skip
TEMPLATES.globals["MB"] = formatting.MB
TEMPLATES.filters |= {"plain": _plain, "marked": _marked, "as": formatting.written, "shown": shown}
TEMPLATES.filters["rules"] = rules
TEMPLATES.filters |= {
    write.__name__: write
    for write in (
        formatting.counted, formatting.listing, formatting.mean, formatting.p_value,
        formatting.p_with, formatting.part_of, formatting.shown_interval, formatting.signed,
        formatting.spread,
    )
}  # fmt: skip
