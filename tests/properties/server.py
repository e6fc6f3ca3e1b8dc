"""Runs the command repeatedly, each time in a fork of this process, which has imported everything.

Reads one line of JSON per run (words, folder, seconds) and writes one: the exit code (null after a
time-out), output and errors.
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

import experiment  # noqa: F401  # slow; `run` imports it late
import run


def run_forked(words: list[str], folder: str, seconds: float) -> dict[str, Any]:
    """Run the command with these words in a folder, for at most some seconds."""
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
        print(json.dumps(run_forked(**json.loads(line))), flush=True)
