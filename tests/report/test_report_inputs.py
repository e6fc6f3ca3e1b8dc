"""Whatever stands in the files of a run, it is left out by name or shown as it is: never a trace,
never markup, never a number that was not there."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from strategies import any_json, examples, met, spoilt, texts

from lora_or_full.cli import report
from lora_or_full.evaluation.predictions import values
from lora_or_full.report.collect import collect
from lora_or_full.report.stats import paired, seeds_by_paragraphs

RUNS = ("lora_1", "lora_2", "full_1", "full_2", "lora_3")
FILES = (
    "results.json", "results.json", "results.json", "predictions.jsonl", "contexts.json",
    "status.json", "../sweep.json",
)  # fmt: skip
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "nav", "ul", "li", "a", "section",
    "p", "pre", "div", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption",
    "strong", "br", "span", "blockquote", "mark",
    "svg", "defs", "g", "path", "use", "rect", "text", "tspan", "clippath", "metadata", "rdf:rdf",
    "cc:work", "dc:type", "dc:format", "dc:creator", "dc:date", "dc:title", "cc:agent",
}  # fmt: skip


@pytest.fixture
def place(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds of both modes, a run that failed, and the plan of these; fewer draws than else."""
    monkeypatch.setattr(paired, "RESAMPLES", 50)
    monkeypatch.setattr(seeds_by_paragraphs, "STUDIES", 50)
    for name in RUNS:
        mode, seed = name.split("_")
        folder = make_run(mode, int(seed))
    failed = folder.parent / RUNS[-1]
    (failed / "results.json").unlink()
    (failed / "status.json").write_text(json.dumps({"state": "failed", "error": "no memory"}))
    (folder.parent / "sweep.json").write_text(json.dumps({"runs": RUNS}))
    shutil.copytree(folder.parent, folder.parent.with_name("good"))
    return folder.parent


def spoil(place: Path, data: st.DataObject, faults: int) -> None:
    """Change a file of a study: JSON at some places, or all of it, or its bytes; all else is as it
    was before."""
    shutil.rmtree(place)
    shutil.copytree(place.with_name("good"), place)
    file = place / data.draw(st.sampled_from(RUNS)) / data.draw(st.sampled_from(FILES))
    if data.draw(st.integers(0, 9)) == 0 or not file.exists():
        file.write_bytes(data.draw(st.binary(max_size=20) | st.sampled_from((b"[" * 5000, b"{"))))
        return
    lines = file.suffix == ".jsonl"
    content = [json.loads(line) for line in file.read_text().split("\n") if line]
    changed = data.draw(spoilt(content if lines else content[0], faults))
    rows = changed if lines and isinstance(changed, list) else [changed]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@given(st.data())
def test_a_run_of_any_content_is_read_or_left_out_by_name(place: Path, data: st.DataObject) -> None:
    spoil(place, data, faults=2)
    study = collect([place])
    shown = {run.folder.name for arm in study.arms for run in arm.runs.values()}
    event(f"{len(shown)} runs shown")
    for name in RUNS:
        assert name in shown or any(f"/{name}: " in line for line in study.left_out)
    for run in (run for arm in study.arms for run in arm.runs.values()):
        good = json.loads((place.with_name("good") / run.folder.name / "results.json").read_text())
        for metric in ("exact_match", "f1"):
            assert fmean(values(run.predictions, metric)) == pytest.approx(
                getattr(run.record.test, metric)
            )
            if run.record.test.model_dump(mode="json") == good["test"]:
                assert fmean(values(run.predictions, metric)) == pytest.approx(good["test"][metric])


class Elements(HTMLParser):
    """Which elements and attributes there are."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= set(attrs)


def check_report(folder: Path) -> None:
    """Nothing in it is markup but its own, its pictures are XML, and its numbers are numbers."""
    page = Elements()
    page.feed((folder / "report.html").read_text())
    assert page.names <= ELEMENTS
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "src", "xlink:href", "action") or (value or "").startswith("#")
        assert name != "style" or "url(" not in (value or "").replace("url(#", "")
    tokens = MarkdownIt("commonmark").enable("table").parse((folder / "report.md").read_text())
    for token in (t for top in tokens for t in (top, *(top.children or ()))):
        assert token.type not in ("link_open", "html_block", "code_inline", "heading_3_open")
        assert token.type != "html_inline" or token.content in ("<b>", "</b>", "<!-- -->")
        assert token.type != "image" or str(token.attrs["src"]).startswith("figures/")
        assert token.type != "heading_open" or token.tag in ("h1", "h2")
    for picture in (folder / "figures").iterdir():
        ElementTree.parse(picture)

    def refuse(text: str) -> None:
        raise AssertionError(text)

    json.loads((folder / "report.json").read_text(), parse_constant=refuse)


def reported(place: Path) -> bool:
    """Whether there is a report of these runs, which then is as it should be."""
    folder, problem = met(lambda: report.write([place], place.with_name("out"), 1.0))
    if folder is None:
        assert problem.startswith("No finished run in")
        return False
    check_report(folder)
    return True


@examples(0.025)
@given(st.data())
def test_a_report_of_any_content_is_well_formed(place: Path, data: st.DataObject) -> None:
    spoil(place, data, faults=3)
    assert reported(place)


@examples(0.025)
@given(st.dictionaries(texts(2), any_json() | texts(), max_size=3), st.lists(texts(), min_size=4))
def test_any_texts_and_settings_are_shown_as_they_are(
    place: Path, config: dict[str, Any], said: list[str]
) -> None:
    """Such as a title, question, answer or prediction may hold; arms are named by settings."""
    shutil.rmtree(place)
    shutil.copytree(place.with_name("good"), place)
    for name in RUNS[:-1]:
        file = place / name / "results.json"
        results = json.loads(file.read_text())
        if name == "lora_2":
            results["config"]["model"]["config"] |= config
        results["environment"]["machine"] = results["environment"]["device"] = said[0]
        results["model"]["name"] = said[1]
        file.write_text(json.dumps(results))
        (place / name / "contexts.json").write_text(
            json.dumps({str(n): said[n % len(said)] for n in range(10)})
        )
        file = place / name / "predictions.jsonl"
        rows = [json.loads(line) for line in file.read_text().split("\n") if line]
        for n, row in enumerate(rows):
            row |= {"title": said[0], "question": said[1], "answers": [said[2], said[n % 4]]}
            row |= {"prediction": said[3] if row["prediction"] else ""}
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (place / "lora_3" / "status.json").write_text(json.dumps({"state": "failed", "error": said[0]}))
    (place / "sweep.json").write_text(json.dumps({"runs": said}))
    assert reported(place)
