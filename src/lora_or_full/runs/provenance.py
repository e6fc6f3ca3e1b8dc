"""Where numbers come from: the project's commit, package versions, and machine."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "hydra-core")
PROJECT = Path(__file__).resolve().parents[3]


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """Describe device, machine and software, with the commit at the start of the run."""
    return {
        "device": device,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit,
    }


def commit() -> str | None:
    """The commit of this checkout, with "+changes" if files differ; None if it is installed."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + "+changes" * bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None


def code() -> str | None:
    """The commit of this checkout and a hash of its changes; None if it is installed."""
    try:
        changes = _git("diff", "HEAD")
        return _git("rev-parse", "HEAD") + hashlib.sha256(changes.encode()).hexdigest()[:8]
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    # --git-dir: of an installed package, a repository further up is another project's.
    command = ["git", "-C", str(PROJECT), "--git-dir=.git", "--work-tree=.", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
