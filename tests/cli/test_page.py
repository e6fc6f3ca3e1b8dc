"""`lora-or-full page`: what it shows, escaping, accessibility, and who can open it."""

import socket
import sys
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_or_full.cli import main, page
from lora_or_full.errors import UserError
from lora_or_full.evaluation.spans import spans
from lora_or_full.generation.predictor import Reply
from lora_or_full.runs.reader import read_answers

EVIL = "<script>alert(1)</script> & \"quotes\" 'too' {{ 7 * 7 }}"


class Parrot:
    """A run that answers with the first word of the question, and has two more answers."""

    def __init__(self, label: str) -> None:
        self.label, self.contexts = label, []  # type: ignore[var-annotated]

    def read(self, context: str) -> Any:
        if not context.strip():
            raise UserError("The context is empty.")
        self.contexts.append(context)
        return SimpleNamespace(context=context, read=90, tokens=100 if "long" in context else 90)

    def ask(self, session: Any, question: str, alternatives: int) -> list[Reply]:
        if not question.strip():
            raise UserError("The question is empty.")
        texts = [question.split("?")[0], "elsewhere", ""]
        return [
            Reply(text, probability, bool(text), spans(text, session.context))
            for text, probability in zip(texts, (0.625, 0.25, 0.0625), strict=True)
        ]


@pytest.fixture
def runs() -> list[Parrot]:
    return [Parrot("lora"), Parrot("full")]


@pytest.fixture
def client(runs: list[Any]) -> Any:
    known = [
        page.Example("Ada lived here.", "Who?", ["Ada", "Ada Lovelace", "Ada"]),
        page.Example("Ada lived here.", "Where?", ["here"]),
        page.Example("Bruno left.", "What?", ["left"]),
    ]
    return page.build(runs, known).test_client()


def asked(client: Any, context: str, question: str) -> str:
    return client.post("/", data={"context": context, "question": question}).get_data(as_text=True)


def test_it_begins_with_an_example_and_offers_the_next(client: Any) -> None:
    first = client.get("/").get_data(as_text=True)
    assert "Ada lived here." in first
    assert 'href="/?example=1"' in first
    assert "Bruno left." in client.get("/?example=1").get_data(as_text=True)
    assert "Ada lived here." in client.get("/?example=x").get_data(as_text=True)


def test_each_run_shows_its_answer_in_the_context(client: Any) -> None:
    text = asked(client, "Ada, said Ada.", "Ada?")
    assert text.count("<mark>Ada</mark>, said <mark>Ada</mark>.") == 2
    assert text.count("62.5 %") == text.count("25.0 %") == 2
    assert text.count("is in the context 2 times") == 2
    assert text.count("(no answer)") == 2
    assert text.index(">lora</h2>") < text.index(">full</h2>")
    assert "<title>Ada / Ada –" in text
    assert "Doubtful" not in text
    elsewhere = asked(client, "Nobody.", "Ada?")
    assert "<mark>" not in elsewhere
    assert elsewhere.count("Doubtful: not in the context.") == 2


def test_it_says_what_it_is_and_shows_the_gold_answers_of_test_questions(client: Any) -> None:
    first = client.get("/").get_data(as_text=True)
    assert "<h1>LoRA or full fine-tuning? Ask what was trained</h1>" in first
    assert "lora and full answer, on this machine" in first
    assert "own answer" not in first  # before it is asked
    assert '<strong dir="auto">Ada / Ada Lovelace</strong>' in asked(
        client, "Ada lived here.\r\n", "Who?"
    )
    assert '<strong dir="auto">here</strong>' in asked(client, "Ada lived here.", "Where?")
    assert "own answer" not in asked(client, "Ada lived here.", "What?")


def test_a_context_is_read_once_for_all_questions(client: Any, runs: list[Parrot]) -> None:
    for context in ("one", "one", "two", "two"):
        asked(client, context, "Who?")
    assert runs[0].contexts == runs[1].contexts == ["one", "two"]


def test_line_ends_of_the_form_become_newlines(client: Any, runs: list[Parrot]) -> None:
    asked(client, "one\r\ntwo\r\n", "Who?")
    assert runs[0].contexts == ["one\ntwo\n"]


def test_no_text_becomes_markup(client: Any) -> None:
    text = asked(client, EVIL, EVIL)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert "49" not in text.split("<main>")[1]


def test_errors_are_shown_on_the_page(client: Any) -> None:
    assert 'role="alert">The context is empty.' in asked(client, " ", "Who?")
    answer = asked(client, "kept", " ")
    assert 'role="alert">The question is empty.' in answer
    assert "kept</textarea>" in answer
    assert "first 90 were read" in asked(client, "long", "Who?")


def test_each_field_has_a_label_and_each_text_its_direction(client: Any) -> None:
    text = asked(client, "عاش أحمد في القاهرة", "أحمد?")
    for name in ("context", "question"):
        assert f'<label for="{name}">' in text
        assert f'id="{name}" name="{name}" dir="auto"' in text
    assert '<div class="context" dir="auto">' in text
    assert "<mark>أحمد</mark>" in text


class Parts(HTMLParser):
    """The tags of a page with their attributes, in order, and the text of those with an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.inside: list[str] = []  # the ids of the elements that are open, "" without one
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("input", "meta"):
            self.inside.append(dict(attrs).get("id") or "")

    def handle_endtag(self, tag: str) -> None:
        self.inside.pop()

    def handle_data(self, data: str) -> None:
        for name in filter(None, self.inside):
            self.texts[name] = " ".join(f"{self.texts.get(name, '')} {data}".split())


def test_a_screen_reader_gets_labels_and_answers(client: Any) -> None:
    for question in ("Ada?", " "):
        parts = Parts(asked(client, "Ada, said Ada.", question))
        ids = [attrs["id"] for _, attrs in parts.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        named = {attrs["for"] for tag, attrs in parts.tags if tag == "label"}
        fields = [a for tag, a in parts.tags if tag in ("textarea", "input")]
        shown = [attrs["id"] for attrs in fields if attrs.get("type") != "hidden"]
        assert shown == ["context", "question"]
        assert named == set(shown)
        for _, attrs in parts.tags:
            for key in ("aria-labelledby", "aria-describedby"):
                assert set((attrs.get(key) or "").split()) <= set(ids)
        headings = [tag for tag, _ in parts.tags if tag in ("h1", "h2", "h3")]
        assert headings == ["h1"] + 2 * ["h2"] * (question == "Ada?")
        assert ("html", {"lang": "en"}) in parts.tags
        focused = [attrs for _, attrs in parts.tags if "autofocus" in attrs]
        assert len(focused) == 1
        labels = focused[0].get("aria-labelledby") or focused[0]["aria-describedby"]
        assert labels is not None
        text = " ".join(parts.texts[name] for name in labels.split())
        assert text == ("lora Ada full Ada" if question == "Ada?" else "The question is empty.")


def test_only_this_machine_can_open_it_and_nothing_is_loaded(client: Any) -> None:
    response = client.get("/")
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    text = response.get_data(as_text=True)
    assert "src=" not in text
    assert "http" not in text
    assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 400
    assert client.post("/", data={"context": "x" * 3_000_000}).status_code == 413


def test_the_examples_are_test_questions_of_the_run(
    finished_runs: dict[str, Path], tmp_path: Path
) -> None:
    assert page.examples(tmp_path) == []
    predictions, contexts = read_answers(finished_runs["full"])
    found = page.examples(finished_runs["full"])
    assert found == [
        (contexts[str(p["paragraph"])], p["question"], p["answers"]) for p in predictions
    ]
    assert len(found) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [(["runs/none"], "no folder"), ([".", "--port=0"], "--port=0")],
)
def test_wrong_arguments_are_refused_in_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main.main(["page", *words])
    err = capsys.readouterr().err
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flask", None)
    with pytest.raises(UserError, match=r"\[page\]"):
        page.run(Namespace(runs=[Path("x")], model=None, port=8000))


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}: Address already in use. Choose"):
            page.run(Namespace(runs=[Path("x")], model=None, port=port))
