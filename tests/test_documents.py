"""What README.md and docs/ say can be done: every command runs, every name they name exists."""

import ast
import doctest
import glob
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from forks import Commands
from markdown_it import MarkdownIt
from markdown_it.token import Token
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_or_full.config import compose
from lora_or_full.config.schema import FIELDS, GROUPS
from lora_or_full.data import squad
from lora_or_full.training.plugins import logged

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [
    PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md")),
]  # fmt: skip
PLACES = ("src", "conf", "docs", "tests", "scripts", "bench", "assets", ".ci")
# A fence of another kind would be text that no test looks at.
KINDS = {"", "bash", "text", "python", "yaml", "json"}


@dataclass
class Command:
    """A command as a document shows it, as words; `shows` are the lines that it says it prints."""

    document: str
    line: int
    words: list[str]
    shows: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def tokens(document: Path) -> Iterator[Token]:
    """The parts of a document, those within a line too."""
    for token in MarkdownIt("commonmark").enable("table").parse(document.read_text("utf-8")):
        yield token
        yield from token.children or ()


def fences(*kinds: str) -> Iterator[tuple[Path, Token]]:
    """The fenced blocks of some kinds, of all documents."""
    for document in DOCUMENTS:
        for token in tokens(document):
            if token.type == "fence" and token.info in kinds:
                yield document, token


def commands() -> list[Command]:
    """Every command of the documents once, in their order."""
    found: dict[tuple[str, ...], Command] = {}
    last: Command | None = None
    for document, token in fences("", "bash", "text"):
        if token.info == "text":
            assert last is not None, f"{document.name}: what prints this?\n{token.content}"
            last.shows += token.content.splitlines()
            continue
        assert token.map is not None
        for number, line in enumerate(token.content.splitlines(), token.map[0] + 2):
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                word = word.removeprefix(".venv/bin/")
                if word != "&&":
                    words.append(word)
                elif words:
                    last = found.setdefault(tuple(words), Command(document.name, number, words))
                    words = []
    return list(found.values())


COMMANDS = commands()


# What the documents name.


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    others = [
        f"{document.name}: {token.info}"
        for document in DOCUMENTS
        for token in tokens(document)
        if token.type == "fence" and token.info not in KINDS
    ]
    assert others == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_what_a_document_links_to_is_there(document: Path) -> None:
    missing = []
    for token in tokens(document):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if target and "://" not in target:
            name, _, part = target.partition("#")
            file = document.parent / name if name else document
            if not file.exists() or (part and part not in headings(file)):
                missing.append(target)
    assert missing == []


def headings(document: Path) -> set[str]:
    """The names by which the parts of a document are linked to, as GitHub makes them."""
    parts = list(tokens(document))
    pairs = itertools.pairwise(parts)
    titles = [after.content for token, after in pairs if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def named(document: Path) -> Iterator[str]:
    """What a document writes as code within its text."""
    return (token.content for token in tokens(document) if token.type == "code_inline")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_file_and_function_that_is_named_exists(document: Path) -> None:
    missing = []
    for code in named(document):
        place, _, name = code.partition(":")
        if re.fullmatch(rf"({'|'.join(map(re.escape, PLACES))})/[\w./-]*", place):
            file = PROJECT / place
            if not file.exists() or (name and name not in defined(file)):
                missing.append(code)
    assert missing == []


def defined(file: Path) -> set[str]:
    """The functions, classes, methods and constants of a module."""
    tree = ast.parse(file.read_text("utf-8"))
    names = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


KEY = re.compile(r"(?<![\w./<-])(\+?[a-z_]+(?:\.[a-z_]+)*)=")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_key_that_is_named_is_one(document: Path) -> None:
    own = [shlex.join(c.words) for c in COMMANDS if c.document == document.name]
    keys = {key for text in [*named(document), *own] for key in KEY.findall(text)}
    assert {key for key in keys if not is_key(key.removeprefix("+"))} == set()


def is_key(key: str) -> bool:
    group, _, name = key.partition(".")
    libraries = {"trainer": L.Trainer, "adapter": LoraConfig, "optimizer": torch.optim.AdamW}
    return (
        key in FIELDS
        or key in GROUPS
        or group == "hydra"
        or key.startswith(("model.config.", "callbacks.", "logger."))
        or (group in libraries and name in inspect.signature(libraries[group]).parameters)
    )


def test_every_logged_number_is_explained() -> None:
    explained = " ".join(named(PROJECT / "docs" / "numbers.md"))
    names = ["epoch", "step", "lr-AdamW", *logged(compose.defaults())]
    assert [name for name in names if name not in explained] == []


def test_every_column_of_the_report_is_explained() -> None:
    report = json.loads((PROJECT / "docs" / "builtin" / "report.json").read_text("utf-8"))
    heads = {
        re.sub(r"±.*|of one .*", "", head).removesuffix(", %").strip()
        for title, tables in report["tables"].items()
        if title not in ("The recipe", "Provenance")  # these hold no computed number
        for table in tables
        for head in table["head"]
    }
    text = (PROJECT / "docs" / "numbers.md").read_text("utf-8")
    assert sorted(head for head in heads if head not in text) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_what_is_reckoned_comes_out(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    lines = [
        t.content for where, t in fences("python") if where == document and ">>> " in t.content
    ]
    example = doctest.DocTestParser().get_doctest("\n".join(lines), {}, document.name, None, 0)
    told: list[str] = []
    doctest.DocTestRunner().run(example, out=told.append)
    assert told == []


def test_the_text_to_ask_about_is_the_one_that_is_shown() -> None:
    shown = (PROJECT / "docs" / "tutorial.md").read_text("utf-8").replace("\n> ", " ")
    assert (PROJECT / "docs" / "town.txt").read_text("utf-8").strip() in shown


def test_the_data_format_shown_is_read(tmp_path: Path) -> None:
    shown = [token.content for _, token in fences("json")]
    assert shown
    for text in shown:
        (tmp_path / "shown.json").write_text(text, "utf-8")
        questions, counts = squad.check(
            squad.read_files([tmp_path / "shown.json"]), "refuse", "refuse"
        )
        assert questions
        assert not any(counts.values())


# What the documents do. Programs and scripts that a command may begin with, and what makes them
# small; what is not among them has to be added here.

SMALL = [
    "data.train_size=8", "data.validation_size=4", "data.test_size=8", "trainer.max_epochs=1",
    "max_new_tokens=24", "eval_batch_size=8", "trainer.enable_progress_bar=false",
]  # fmt: skip
SCRIPTS: dict[str, list[str]] = {
    "src/run.py": SMALL,
    "lora-or-full": [],
    "scripts/make_data.py": ["--train-articles=4", "--dev-articles=2", "--output=made/data"],
    "scripts/make_model.py": ["--steps=2", "--output=made/model"],
    "scripts/draw_mask.py": [],
    "bench/compare.py": [],
    "bench/decoding.py": [],
    "bench/gpu.py": ["--device=cpu", "--only=gradients"],
    "bench/same.py": [],
}
# What is here in the place of what is on the hub.
HERE = {"HuggingFaceTB/SmolLM2-135M": "llama", "gpt2": "my-gpt2"}
CLI = [sys.executable, "-m", "lora_or_full.cli.main"]
SETS_UP = ("pip", "python3", "source", "pytest")
ELSEWHERE = ("sbatch", "tests/faults/harness.py")  # a cluster's, and a test of its own


def program(command: Command) -> str:
    """What a command runs: a script of the project, or a program."""
    first, *rest = command.words
    return rest[0] if first == "python" else first


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_one_that_is_run_below(command: Command) -> None:
    assert program(command) in [*SCRIPTS, *SETS_UP, *ELSEWHERE, "tensorboard"]
    assert not {"|", ">", "<", ";", "&"} & set(command.words), "write it as a single command"


def test_what_is_installed_exists() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    installs = [c.words for c in COMMANDS if program(c) == "pip"]
    assert installs
    for words in installs:
        assert words[1:4] == ["install", "-c", "constraints.txt"]
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
        assert extras, words
        for extra in (extras[1] or "").split(","):
            assert not extra or extra in project["optional-dependencies"]
    assert (PROJECT / "constraints.txt").is_file()


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, squad_file: Callable[..., Path]
) -> Path:
    """A copy of the project, beside it the files that the documents take for the reader's own."""
    folder = tmp_path_factory.mktemp("documents") / "project"
    for name in ("src", "conf", "docs", "scripts", "bench", "assets"):
        shutil.copytree(
            PROJECT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    shutil.copytree(PROJECT / "assets" / "model", folder / "my-gpt2")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "my-gpt2"), lora)
    adapted.save_pretrained(str(folder / "my-adapter"), save_embedding_layers=False)
    shutil.copytree(llama_folder, folder / "llama")
    for seed, name in enumerate(("my", "a", "b", "dev", "questions", "other", "zh", "train")):
        squad_file(folder / f"{name}.json", seed=seed)
    for _, token in fences("yaml"):
        name = re.search(r"^# (conf/[\w/-]+\.yaml)$", token.content, re.MULTILINE)
        assert name, "a line of a yaml block says which file it is"
        (folder / name[1]).write_text(token.content, "utf-8")
    return folder


@pytest.fixture(scope="module")
def forks(place: Path) -> Iterator[Commands]:
    """Runs commands in forks of a process that has imported the project of `place`."""
    with Commands(place / "src") as python:
        yield python


def run_in(place: Path, *words: str | Path, python: Commands | None = None) -> str:
    """What a command prints that ends well, in a process of its own or by `python`."""
    given = "How many people live in Port Trenia?\n"  # where a command asks for more
    if python:
        done = python(list(map(str, words)), place, given=given)
        code, out, errors = done["code"], done["out"], done["errors"]
    else:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONPATH": str(place / "src"),
        }  # fmt: skip
        process = subprocess.run(
            [sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True,
            timeout=900, input=given,
        )  # fmt: skip
        code, out, errors = process.returncode, process.stdout, process.stderr
    assert code == 0, out + errors
    assert "Traceback" not in out + errors
    return out


def filled(text: str, place: Path) -> str:
    """With the newest run of LoRA in `place` for <run>."""
    adapters = sorted((place / "runs").glob("*/adapter"), key=lambda file: file.stat().st_mtime)
    return text.replace("<run>", adapters[-1].parent.name if adapters else "none")


def expanded(word: str, place: Path) -> list[str]:
    """What a shell makes of a word."""
    return sorted(glob.glob(word, root_dir=place)) if "*" in word else [word]


def ready(words: list[str], place: Path) -> list[str]:
    """The words with a run of `place` for <run>, and with what makes them small."""
    words = [filled(word, place) for word in words]
    words = [name for word in words for name in expanded(word, place)]
    if "--help" in words or any(word.startswith("resume=") for word in words):
        return words
    if words[0] == "lora-or-full":
        return [HERE.get(word, word) for word in words]
    if words[1] == "src/run.py":
        words = [fewer(word, words) for word in words] + of_files(words)
    return words + SCRIPTS[words[1]]


def fewer(word: str, words: list[str]) -> str:
    """A word with as many of its swept values as are needed: two of modes and seeds in the studies
    that others read on, else one."""
    key, _, values = word.partition("=")
    if "," not in values or "[" in values:
        return word
    kept = 2 if (key == "mode" and "study=first" in words) or "study=builtin" in words else 1
    return f"{key}={','.join(values.split(',')[:kept])}"


def of_files(words: list[str]) -> list[str]:
    """What lets a run read files that are here, where it would ask the hub."""
    if "experiment=demo" in words:
        return []
    own = " ".join(words)
    added = ["lr=1e-4", "rank=8"] if "experiment=grid" in words else []  # one job of each mode
    added += ["mode=lora", "seed=1"] if "experiment=[subset,ablation]" in words else []
    if "trainer.devices" in own:  # each process measures what auto is, which a busy machine upsets
        added.append("trainer.precision=32-true")
    if {"model=llama", "model=smollm2"} & set(words):
        added += ["model.name=llama", "max_length=200"]
    elif "model.name=" not in own:
        added.append("model.name=assets/model")
    if "data.path=" not in own and "data=" not in own:
        added += ["data.path=assets/data/train.json", "data.test_path=assets/data/dev.json"]
    return added


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if program(c) not in (*SETS_UP, *ELSEWHERE)], ids=str
)  # fmt: skip
def test_a_command_does_what_it_says(command: Command, place: Path, forks: Commands) -> None:
    script = program(command)
    if script == "tensorboard":
        serves([sys.executable, "-m", "tensorboard.main", *command.words[1:]], place)
        return
    if command.words[:2] == ["lora-or-full", "page"]:
        serves(CLI + ready(command.words, place)[1:], place)
        return
    if script == "bench/compare.py":
        # Only that it would start: what it compares with is no dependency of the project.
        done = subprocess.run(
            [sys.executable, *command.words[1:]], cwd=place, capture_output=True, text=True
        )
        assert "MODEL_FOLDER must hold a config.json" in done.stderr
        return
    words = ready(command.words, place)
    for word in words:
        key, _, value = word.partition("=")
        if key == "logger":
            pytest.importorskip(value, reason=f"no extra [{value}]")
        if key == "resume":
            interrupt(place / value)
        if key == "hydra/launcher":
            name = value.partition("_")[0]
            pytest.importorskip(f"hydra_plugins.hydra_{name}_launcher", reason=f"no extra [{name}]")
            if value.endswith("_slurm") and not shutil.which("sbatch"):
                pytest.skip("no SLURM")
    start = CLI[1:] if script == "lora-or-full" else []
    printed = run_in(place, *start, *words[1:], python=None if is_alone(command) else forks)
    if script == "src/run.py" and "--help" not in command.words:
        results = re.findall(r"^results: +(.+)$", printed, re.MULTILINE)
        assert results
        assert all((place / file).is_file() for file in results)
    if words[:2] == ["lora-or-full", "report"]:
        assert all((place / file).is_file() for file in printed.split())
    lines = {letters(line) for line in printed.splitlines()}
    assert [line for line in command.shows if letters(line) not in lines] == []


def kind(command: Command) -> tuple[str, ...]:
    """What a command runs: a program, with its own command or whether it is a sweep."""
    script = program(command)
    if script == "lora-or-full":
        return script, command.words[1]
    return script, *(word for word in command.words if word in ("-m", "--help"))


def is_alone(command: Command) -> bool:
    """Whether a command runs in a process of its own, as the first of its kind does, and what
    starts processes itself."""
    first = next(other for other in COMMANDS if kind(other) == kind(command))
    starts = ("trainer.devices=", "hydra/launcher=")
    return command is first or any(word.startswith(starts) for word in command.words)


def letters(line: str) -> tuple[str, ...]:
    """The words of a line, without its numbers."""
    return tuple(re.findall(r"[^\W\d_]+", line))


def serves(words: list[str], place: Path) -> None:
    """Start a server and see that it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*words, f"--port={port}"]
    server = subprocess.Popen(words, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(120):
            time.sleep(0.5)
            assert server.poll() is None, server.stderr.read()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    return
        pytest.fail("it does not listen")
    finally:
        server.terminate()
        server.communicate()


def interrupt(run: Path) -> None:
    """Make a finished run one that was stopped in its test."""
    (run / "results.json").unlink()
    (run / "predictions.jsonl").unlink()


@pytest.mark.slow
def test_the_python_shown_runs(place: Path) -> None:
    shown = [token.content for _, token in fences("python") if ">>> " not in token.content]
    assert shown
    for text in shown:
        run_in(place, "-c", filled(text, place))


@pytest.mark.slow
def test_every_number_of_a_record_is_explained(place: Path) -> None:
    explained = set(named(PROJECT / "docs" / "numbers.md"))
    files = [*place.glob("runs/*/results.json"), *place.glob("runs/**/evaluations/*/results.json")]
    assert len({file.parent.parent.name for file in files}) > 1
    for file in files:
        results = json.loads(file.read_text("utf-8"))
        for whole in ("config", "shapes"):  # what was asked for, and no numbers
            results.pop(whole, None)
        keys = [key for key in leaves(results) if not {key, key.rpartition(".")[0]} & explained]
        assert keys == [], file


def leaves(content: Any, place: str = "") -> Iterator[str]:
    """The dotted names of all that a record holds."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, f"{place}.{key}".lstrip("."))
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        yield from leaves(content[0], place)
    else:
        yield place
