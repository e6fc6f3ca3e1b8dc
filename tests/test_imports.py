"""Imports run one way, and each room knows only what it needs (docs/extending.md)."""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
OWN = {file.stem for file in SRC.glob("*.py")}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


def test_question_answering_knows_no_experiment() -> None:
    for file in (SRC / "qa").glob("*.py"):
        assert packages(file) & {"lightning", "hydra", "omegaconf", "study", *OWN} <= {"errors"}


def test_the_study_knows_no_torch_and_of_question_answering_how_texts_compare() -> None:
    far = {"torch", "transformers", "peft", "datasets", "lightning", "hydra", "omegaconf"}
    for file in (SRC / "study").glob("*.py"):
        assert packages(file) & {*far, *OWN} <= {"errors"}
        own = {name for name in imported(file) if name.partition(".")[0] == "qa"}
        assert all(name.startswith(("qa.scoring", "qa.spans")) for name in own), file


def test_the_command_and_its_line_alone_know_hydra() -> None:
    knowing = {f.name for f in SRC.rglob("*.py") if packages(f) & {"hydra", "omegaconf"}}
    assert knowing == {"command_line.py", "run.py"}
