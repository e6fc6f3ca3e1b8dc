"""A local page to ask what was trained: lora-or-full page RUN [RUN ...]

Paste a context, ask, and see the answer in it, its probability, and alternatives; several runs side
by side. Needs the extra: pip install -e '.[page]'. The page is served to this machine only, loads
nothing from elsewhere and sends nothing anywhere.
"""

import argparse
import logging
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_or_full.errors import UserError
from lora_or_full.runs.reader import read_answers

if TYPE_CHECKING:  # seconds, which a mistake on the command line need not wait for
    from flask import Flask

    from lora_or_full.generation.context_session import ContextSession
    from lora_or_full.generation.predictor import Predictor

ALTERNATIVES = 4
LONGEST = 2_000_000  # bytes of a form
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Example = tuple[str, str]  # a context, and a question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="folders of finished runs, of adapters in PEFT's format, or of models",
    )  # fmt: skip
    parser.add_argument(
        "--model", help="folder or hub id of the base model, where it is not the one that RUN names"
    )
    parser.add_argument("--port", type=int, default=8000, help="(8000)")


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: The extra is not installed, the port is taken, or a run can't be asked.
    """
    if not 0 < args.port < 65536:
        raise UserError(f"--port={args.port}: must be a number from 1 to 65535.")
    serve(args.runs, args.model, args.port)


def serve(runs: list[Path], base: str | None, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        runs: Folders of what to ask.
        base: Their base model, where they do not name it.
        port: Port on the loopback address.

    Raises:
        UserError: The extra is not installed, the port is taken, or a run can't be asked.
    """
    try:
        import flask  # noqa: F401
        from werkzeug.serving import make_server
    except ImportError:
        raise UserError(
            "The page needs more: pip install -c constraints.txt -e '.[page]'"
        ) from None
    from lora_or_full.generation.predictor import load

    with socket.socket() as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"--port={port}: {reason}. Choose another.") from None
        app = build([load(run, base) for run in runs], examples(runs[0]))
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
        listener.listen()
        server = make_server("127.0.0.1", port, app, threaded=True, fd=listener.fileno())
        print(f"http://127.0.0.1:{port} (Ctrl-C ends)", flush=True)
        server.serve_forever()


def build(runs: "list[Predictor]", shown: Sequence[Example]) -> "Flask":
    """Build the page of some runs, with examples to begin with."""
    from flask import Flask, Response, render_template, request

    app = Flask(__name__, template_folder=str(Path(__file__).parent), static_folder=None)
    # A foreign page whose host name resolves to this machine is refused.
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]
    app.config["MAX_CONTENT_LENGTH"] = app.config["MAX_FORM_MEMORY_SIZE"] = LONGEST
    asking = threading.Lock()
    last: tuple[str, list[ContextSession]] = ("", [])  # a context, and each run's session

    def answers(context: str, question: str) -> list[dict[str, Any]]:
        nonlocal last
        with asking:
            if last[0] != context:
                last = (context, [run.read(context) for run in runs])
            return [
                answered(run, session, question) for run, session in zip(runs, last[1], strict=True)
            ]

    @app.get("/")
    def start() -> str:
        number = request.args.get("example", 0, type=int)
        context, question = shown[number % len(shown)] if shown else ("", "")
        return page(context, question, number)

    @app.post("/")
    def ask() -> str:
        # A form sends line ends as two characters.
        context = request.form.get("context", "").replace("\r\n", "\n")
        question = request.form.get("question", "")
        number = request.form.get("example", 0, type=int)
        try:
            return page(context, question, number, answers(context, question))
        except UserError as error:
            return page(context, question, number, problem=str(error))

    def page(context: str, question: str, number: int, *found: Any, problem: str = "") -> str:
        return render_template(
            "page.html",
            labels=[run.label for run in runs],
            context=context,
            question=question,
            example=number,
            examples=len(shown),
            answers=found[0] if found else [],
            problem=problem,
        )

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    return app


def answered(run: "Predictor", session: "ContextSession", question: str) -> dict[str, Any]:
    """Values that the page shows of a run's answer."""
    from lora_or_full.evaluation.spans import pieces

    answer, *others = run.ask(session, question, ALTERNATIVES)
    return {
        "label": run.label,
        "answer": answer,
        "others": others,
        "pieces": pieces(session.context, answer.spans),
        "read": session.read,
        "tokens": session.tokens,
    }


def examples(folder: Path) -> list[Example]:
    """Test questions of a run, the first of each paragraph; none of what is no run."""
    try:
        predictions, contexts = read_answers(folder)
    except UserError:
        return []
    found: dict[str, Example] = {}
    for one in predictions:
        key = str(one["paragraph"])
        found.setdefault(key, (contexts[key], one["question"]))
    return list(found.values())
