"""The command's own help and refusals: quick, since they import nothing slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_or_full.cli import main

SRC = Path(__file__).parents[2] / "src"
SLOW = {"torch", "transformers", "peft", "datasets", "lightning", "scipy", "matplotlib", "flask"}
CODE = f"""
import sys
from lora_or_full.cli import main

for command in main.COMMANDS:
    for words, code in ((["--help"], 0), (["--nothing"], 2), (["nowhere", "file"], 1)):
        try:
            main.main([command, *words])
        except SystemExit as end:
            assert (end.code or 0) == code, (command, words)
assert not {SLOW} & set(sys.modules), {SLOW} & set(sys.modules)
"""


def test_help_a_wrong_option_and_a_missing_folder_import_nothing_slow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no folder nowhere") == len(main.COMMANDS)


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"lora-or-full {command} " in text for command in main.COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        main.main(["nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
