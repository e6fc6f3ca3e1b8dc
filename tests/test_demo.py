"""The README's first command reaches what the README says (minutes: CI runs it)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def demo(folder: Path, *words: str) -> dict[str, Any]:
    place = folder / "run"
    subprocess.run(
        [
            sys.executable, PROJECT / "src" / "run.py", "experiment=demo",
            f"hydra.run.dir={place}", f"cache_dir={folder / 'cache'}", f"output_dir={folder}",
            "trainer.enable_progress_bar=false", *words,
        ],
        check=True,
    )  # fmt: skip
    return json.loads((place / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "words",
    [["mode=lora"], ["mode=full", "trainer.max_epochs=2"]],  # two of its three epochs are enough
    ids=["lora", "full"],
)
def test_fine_tuning_teaches_the_built_in_model_to_answer(words: list[str], tmp_path: Path) -> None:
    results = demo(tmp_path, *words)
    assert results["before"]["exact_match"] <= 10
    assert results["test"]["exact_match"] >= 70


def test_without_the_question_it_can_not_be_answered(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable, PROJECT / "scripts" / "make_data.py", "--without-questions",
            "--output", tmp_path / "data",
        ],
        check=True,
    )  # fmt: skip
    results = demo(
        tmp_path,
        f"data.path={tmp_path / 'data' / 'train.json'}",
        f"data.test_path={tmp_path / 'data' / 'dev.json'}",
    )
    assert results["test"]["exact_match"] <= 25
