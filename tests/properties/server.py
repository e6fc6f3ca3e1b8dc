"""Runs the command again and again, each time in a fork of this process, which has imported all.

Reads a line of JSON a run (words, folder, seconds); writes a line of JSON: the exit code (null
where the time was up) and what was printed.
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import experiment  # noqa: F401  # what takes seconds: `run` imports it when a run begins
import run


def served(words: list[str], folder: str, seconds: float) -> dict[str, Any]:
    """How the command with these words ended."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            os.chdir(folder)
            sys.argv = ["run.py", *words]
            os._exit(_run())
        code = _wait(child, seconds)
        return {"code": code, "out": _text(out), "errors": _text(errors)}


def _run() -> int:
    code: Any = 0
    try:
        run.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


def _wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(served(**json.loads(line))), flush=True)
