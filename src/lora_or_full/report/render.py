"""The report as blocks, and the files that are written: Markdown, HTML in one file, figures."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

from lora_or_full.evaluation.spans import pieces
from lora_or_full.runs.store import write_text

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
    autoescape=select_autoescape(["html.jinja"]),
)  # fmt: skip


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
    """A wrongly answered question, with its context and the spans to mark in it."""

    question: str
    lines: Sequence[str]
    context: str
    marks: Sequence[tuple[int, int]]

    def pieces(self) -> list[tuple[str, bool]]:
        """Split the context into pieces, each with whether it is marked."""
        return pieces(self.context, self.marks)


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


def write(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write report.md, report.html and figures/ into a folder, each file atomically."""
    shown = {b.name for section in sections for b in section.blocks if isinstance(b, Figure)}
    before = folder / "report.md"
    if before.is_file():  # only its own figures are removed
        named = re.findall(r"\(figures/(\w+)\.svg\)", before.read_text("utf-8", errors="replace"))
        for name in set(named) - shown:
            (folder / "figures" / f"{name}.svg").unlink(missing_ok=True)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                write_text(folder / "figures" / f"{block.name}.svg", block.svg)
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


TEMPLATES.filters |= {"plain": _plain, "marked": _marked}
