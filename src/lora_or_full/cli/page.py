"""Ask trained models on a local page: lora-or-full page RUN [RUN ...]

Paste a context, ask, and see the answer in it, its probability, and alternatives; several runs side
by side. Needs the extra: pip install -e '.[page]'. Only this machine can open the page; it loads
nothing from elsewhere and sends nothing anywhere.
"""

import argparse
import logging
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_or_full.cli.arguments import add_base_model, existing_folder, finished_of
from lora_or_full.cli.ask import doubts
from lora_or_full.errors import UserError
from lora_or_full.evaluation.spans import pieces
from lora_or_full.runs.reader import read_answers

if TYPE_CHECKING:  # torch and Flask take seconds, which a wrong command line need not wait for
    from flask import Flask

    from lora_or_full.generation.context_session import ContextSession
    from lora_or_full.generation.predictor import Predictor

ALTERNATIVES = 4
MOST_BYTES = 2_000_000  # of a form
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "runs", type=existing_folder, nargs="+", metavar="RUN",
        help="folders of finished runs, of adapters in PEFT's format, or of models",
    )  # fmt: skip
    add_base_model(parser)
    parser.add_argument("--port", type=int, default=8000, help="(8000)")


def run(args: argparse.Namespace) -> None:
    """Serve the page on the loopback address until Ctrl-C."""
    if not 0 < args.port < 65536:
        raise UserError(f"--port={args.port}: must be a number from 1 to 65535.")
    try:
        import flask  # noqa: F401
        from werkzeug.serving import make_server
    except ImportError:
        raise UserError(
            "The page needs more: pip install -c constraints.txt -e '.[page]'"
        ) from None
    with socket.socket() as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", args.port))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"--port={args.port}: {reason}. Choose another.") from None
        folders = finished_of(args.runs)
        from lora_or_full.generation.predictor import load

        app = build([load(folder, args.model) for folder in folders], examples(folders[0]))
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
        listener.listen()
        server = make_server("127.0.0.1", args.port, app, threaded=True, fd=listener.fileno())
        print(f"http://127.0.0.1:{args.port} (Ctrl-C ends)", flush=True)
        server.serve_forever()


class Example(NamedTuple):
    """A question with its context, and what is known to be right."""

    context: str
    question: str
    answers: list[str]


def build(runs: "list[Predictor]", known: Sequence[Example]) -> "Flask":
    """Build the page on which `runs` answer.

    Args:
        runs: What answers, side by side.
        known: Questions whose gold answers are shown; the first of each context to begin with.
    """
    from flask import Flask, Response, render_template, request

    shown = list({one.context: one for one in reversed(known)}.values())[::-1]
    gold = {(one.context.strip(), one.question.strip()): one.answers for one in known}

    app = Flask(__name__, template_folder=str(Path(__file__).parent), static_folder=None)
    # Refuses a foreign page whose host name resolves to this machine.
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]
    app.config["MAX_CONTENT_LENGTH"] = app.config["MAX_FORM_MEMORY_SIZE"] = MOST_BYTES
    app.add_template_filter(pieces)
    app.add_template_filter(doubts)
    lock = threading.Lock()  # the server answers each request in a thread of its own
    last: tuple[str, list[ContextSession]] = ("", [])  # a context, and each run's session

    @app.route("/", methods=["GET", "POST"])
    def index() -> str:
        nonlocal last
        example = request.values.get("example", 0, type=int)
        found: dict[str, Any] = {}
        if request.method == "POST":
            # A form sends line ends as two characters.
            context = request.form.get("context", "").replace("\r\n", "\n")
            question = request.form.get("question", "")
            try:
                with lock:
                    if last[0] != context:
                        last = (context, [run.read(context) for run in runs])
                    found["answers"] = [
                        (run, session, run.ask(session, question, ALTERNATIVES))
                        for run, session in zip(runs, last[1], strict=True)
                    ]
            except UserError as error:
                found["problem"] = str(error)
        else:
            context, question, _ = shown[example % len(shown)] if shown else ("", "", [])
        answers = gold.get((context.strip(), question.strip()), [])
        return render_template(
            "page.html", labels=[run.label for run in runs], context=context, question=question,
            gold=list(dict.fromkeys(answers)), example=example, examples=len(shown), **found,
        )  # fmt: skip

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    return app


def examples(folder: Path) -> list[Example]:
    """Give the questions of a run's test set; none if it is no run."""
    try:
        predictions, contexts = read_answers(folder)
    except UserError:
        return []
    return [
        Example(contexts[str(one["paragraph"])], one["question"], one["answers"])
        for one in predictions
    ]
