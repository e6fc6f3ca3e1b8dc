"""The report as blocks, and the files that are written: Markdown, HTML in one file, figures."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from lora_or_full.evaluation.spans import pieces
from lora_or_full.runs.store import write_text

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
    lstrip_blocks=True,
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
    write_text(folder / "report.md", markdown(title, sections))
    template = TEMPLATES.get_template("report.html.jinja")
    write_text(folder / "report.html", template.render(title=title, sections=sections))


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Write the report as GitHub's Markdown; text from data can't become markup."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return _plain(text)
        case Points(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())
        case Table(head, rows, caption):
            lines = [_row(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(_row, rows)]
            return "\n".join(lines) + (f"\n\n{_plain(caption)}" if caption else "")
        case Figure(name, _, caption):
            return f"![{_plain(caption)}](figures/{name}.svg)\n\n{_plain(caption)}"
        case Example():
            pieces = "".join(
                f"<b>{_escaped(text)}</b>" if marked else _escaped(text)
                for text, marked in block.pieces()
            )
            lines = [f"**{_plain(block.question)}**", *map(_plain, block.lines)]
            return "  \n".join(lines) + "\n\n> Context: " + " ".join(pieces.split())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text in one line, with everything escaped that Markdown or HTML would take as markup."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)
    # GitHub makes links and mentions of these.
    return re.sub(r"(?i)(www|https?|ftp)(?=[.:])|@(?=\w)", lambda m: f"{m[0]}<!-- -->", text)
