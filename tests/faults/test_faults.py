"""A dozen of the harness's faults (a minute: CI runs it)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = 12


@pytest.mark.slow
def test_after_a_dozen_random_faults_nothing_is_lost() -> None:
    harness = Path(__file__).with_name("harness.py")
    done = subprocess.run(
        [sys.executable, harness, f"--count={FAULTS}", "--seed=1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{FAULTS} faults of {FAULTS} kinds .* after 0 something was", done.stdout)
