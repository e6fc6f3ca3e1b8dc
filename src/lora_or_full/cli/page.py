"""A local page to ask what was trained: python src/page.py RUN [RUN ...]

Paste a context, ask, and see the answer in it, how probable the model finds it, and what else it
might have said; several runs side by side. Needs the extra: pip install -e '.[page]'. The page is
served to this machine alone, loads nothing from elsewhere and sends nothing anywhere.
"""

import argparse
import json
import logging
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_or_full.errors import UserError, command

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


@command()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="folders of finished runs, of adapters in PEFT's format, or of models",
    )  # fmt: skip
    parser.add_argument(
        "--model", help="folder or hub id of the base model, where it is not the one that RUN names"
    )
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        raise UserError(f"--port={args.port}: must be a number from 1 to 65535.")
    serve(args.runs, args.model, args.port)


def serve(runs: list[Path], base: str | None, port: int) -> None:
    """Serve the page of the `runs` in these folders until Ctrl-C.

    Raises:
        UserError: the extra is not installed, the port is taken, or a run can't be asked.
    """
    try:
        import flask  # noqa: F401
        from werkzeug.serving import make_server
    except ImportError:
        raise UserError(
            "The page needs more: pip install -c constraints.txt -e '.[page]'"
        ) from None
    from lora_or_full.generation.finished_run import load

    with socket.socket() as place:
        try:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(("127.0.0.1", port))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"--port={port}: {reason}. Choose another.") from None
        app = build([load(run, base) for run in runs], examples(runs[0]))
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
        place.listen()
        server = make_server("127.0.0.1", port, app, threaded=True, fd=place.fileno())
        print(f"http://127.0.0.1:{port} (Ctrl-C ends)", flush=True)
        server.serve_forever()


def build(runs: "list[Predictor]", shown: Sequence[Example]) -> "Flask":
    """The page of `runs`, which offers the examples `shown` to begin with."""
    from flask import Flask, Response, render_template, request

    app = Flask(__name__, template_folder=str(Path(__file__).parent), static_folder=None)
    # A page of elsewhere whose name is made to lead here is refused.
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]
    app.config["MAX_CONTENT_LENGTH"] = app.config["MAX_FORM_MEMORY_SIZE"] = LONGEST
    asking = threading.Lock()
    last: tuple[str, list[ContextSession]] = ("", [])  # a context, as each run has read it

    def answers(context: str, question: str) -> list[dict[str, Any]]:
        nonlocal last
        with asking:
            if last[0] != context:
                last = (context, [run.read(context) for run in runs])
            return [
                answered(run, reading, question) for run, reading in zip(runs, last[1], strict=True)
            ]

    @app.get("/")
    def start() -> str:
        number = request.args.get("example", 0, type=int)
        context, question = shown[number % len(shown)] if shown else ("", "")
        return page(context, question, number)

    @app.post("/")
    def ask() -> str:
        # A form sends each line's end as two characters.
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


def answered(run: "Predictor", reading: "ContextSession", question: str) -> dict[str, Any]:
    """What the page shows of a run's answer."""
    from lora_or_full.evaluation.spans import pieces

    answer, *others = run.ask(reading, question, ALTERNATIVES)
    return {
        "label": run.label,
        "answer": answer,
        "others": others,
        "pieces": pieces(reading.context, answer.places),
        "read": reading.read,
        "tokens": reading.tokens,
    }


def examples(place: Path) -> list[Example]:
    """Test questions of a run, the first of each paragraph; none of what is no run."""
    try:
        contexts = json.loads((place / "contexts.json").read_text(encoding="utf-8"))
        lines = (place / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        found: dict[str, Example] = {}
        for row in (json.loads(line) for line in lines if line):
            key = str(row["paragraph"])
            found.setdefault(key, (contexts[key], row["question"]))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(found.values())


if __name__ == "__main__":
    main()
