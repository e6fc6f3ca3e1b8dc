"""Imports run one way (docs/architecture.md), and each package knows only what it needs."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
PACKAGE = "lora_or_full"
# What each sub-package may import of the others: the arrows of docs/architecture.md.
FOUNDATION = {"errors", "processes", "runs", "config"}
ARROWS = {
    "errors": set(),
    "processes": {"errors"},
    "runs": {"errors", "config"},
    "config": {"errors", "processes"},
    "data": FOUNDATION,
    "modeling": FOUNDATION | {"data"},
    "evaluation": FOUNDATION,
    "generation": FOUNDATION | {"data", "modeling", "evaluation"},
    "training": FOUNDATION | {"data", "modeling", "evaluation", "generation"},
    "report": FOUNDATION | {"evaluation"},
    "cli": FOUNDATION | {"data", "modeling", "evaluation", "generation", "report"},
}
NO_TORCH = {"torch", "transformers", "peft", "datasets", "lightning"}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def files(part: str) -> list[Path]:
    path = SRC / PACKAGE / part
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def outside(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


def test_every_part_of_the_package_has_its_arrows() -> None:
    parts = {path.stem for path in (SRC / PACKAGE).iterdir() if not path.name.startswith("__")}
    assert parts == ARROWS.keys()


@pytest.mark.parametrize("part", ARROWS)
def test_imports_run_one_way(part: str) -> None:
    top = {file.stem for file in SRC.glob("*.py")}
    for file in files(part):
        own = {name.split(".")[1] for name in imported(file) if name.startswith(f"{PACKAGE}.")}
        assert own <= ARROWS[part] | {part}, file
        assert not outside(file) & top, file


@pytest.mark.parametrize("part", ["errors", "processes", "config", "runs", "report", "evaluation"])
def test_what_reads_records_needs_no_torch(part: str) -> None:
    for file in files(part):
        assert not outside(file) & NO_TORCH, file


def test_question_answering_knows_no_experiment() -> None:
    for part in ("data", "modeling", "generation"):
        for file in files(part):
            own = {"lightning"} if part != "data" else set()
            assert not outside(file) & ({"hydra", "omegaconf"} | own), file


def test_the_command_and_its_line_alone_know_hydra() -> None:
    knowing = {f.name for f in SRC.rglob("*.py") if outside(f) & {"hydra", "omegaconf"}}
    assert knowing == {"command_line.py", "compose.py", "run.py", "targets.py"}


def test_the_top_level_of_src_holds_what_users_expect_there() -> None:
    top = {path.stem for path in SRC.glob("*.py")}
    assert top == {"run", "experiment", "datamodule", "lit_module"}


def test_no_file_needs_a_module_that_windows_lacks() -> None:
    """Such a module is imported where it is used, on systems that have it."""
    posix = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "posix"}
    for file in SRC.rglob("*.py"):
        tops = [n for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.Import)]
        assert not {alias.name for node in tops for alias in node.names} & posix, file
