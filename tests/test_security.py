"""Loaded files run no code: disguised pickles, scripts in the folder of a model or data set.

Names in the data reach no path outside the run's folder.
"""

import io
import ipaddress
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from configs import make_splits
from pyarrow import parquet

from lora_or_full.data.splits import Splits
from lora_or_full.errors import UserError
from lora_or_full.modeling.architecture import settings_of
from lora_or_full.modeling.loading import load_model, load_tokenizer
from lora_or_full.runs import store

PROJECT = Path(__file__).parents[1]


class Bomb:
    """Makes a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def harm(tmp_path: Path) -> Path:
    """The folder that exists once a pickle or a script was run."""
    return tmp_path / "harm"


@pytest.fixture
def bomb(harm: Path) -> bytes:
    """A pickle that makes `harm`; it is tried here first."""
    made = pickle.dumps(Bomb(harm))
    pickle.loads(made)
    assert harm.is_dir()
    harm.rmdir()
    return made


def refused(action: Callable[[], Any], harm: Path) -> None:
    """Check that the action is refused in one line and runs nothing."""
    with pytest.raises(UserError) as refusal:
        action()
    assert len(str(refusal.value).splitlines()) == 1
    assert not harm.exists()


# Models


def loaded(folder: Path) -> Any:
    """All that a run reads of a model's folder."""
    settings_of(folder)
    return load_tokenizer(folder), load_model(folder, "name", {})


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"]
)
def test_a_pickle_in_place_of_a_models_file_is_refused(
    name: str, bomb: bytes, harm: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    (folder / name).write_bytes(bomb)
    refused(lambda: loaded(folder), harm)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_as_a_pickle_are_refused(
    zipped: bool, bomb: bytes, harm: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if zipped:
        torch.save({"transformer.wte.weight": Bomb(harm)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(bomb)
    refused(lambda: loaded(folder), harm)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"model_type": "own", "auto_map": {
            "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}),
        ("config.json", {"auto_map": {
            "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {
            "AutoTokenizer": ["evil.Own", "evil.Own"]}}),
    ],
)  # fmt: skip
def test_code_in_a_models_folder_is_never_run(
    file: str, change: dict[str, Any], harm: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(harm)!r})\n")
    settings = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(settings))
    if "model_type" in change:
        refused(lambda: loaded(folder), harm)
    else:  # transformers has its own classes for it
        loaded(folder)
        assert not harm.exists()


# Data


def splits(path: Path, tmp_path: Path) -> Splits:
    return make_splits(path, tmp_path / "cache", validation_articles=0.2)


@pytest.mark.parametrize("name", ["data.json", "data.parquet"])
def test_a_pickle_in_place_of_a_data_file_is_refused(
    name: str, bomb: bytes, harm: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(bomb)
    refused(splits(tmp_path / name, tmp_path).read, harm)


def test_a_pickled_column_type_in_a_parquet_file_is_not_unpickled(
    bomb: bytes, harm: Path, tmp_path: Path
) -> None:
    names = {b"ARROW:extension:name": b"arrow.py_extension_type",
             b"ARROW:extension:metadata": bomb}  # fmt: skip
    fields = [
        pyarrow.field(name, pyarrow.string(), metadata=names)
        for name in ("id", "title", "context", "question", "answers")
    ]
    table = pyarrow.table([["x"]] * 5, schema=pyarrow.schema(fields))
    parquet.write_table(table, tmp_path / "data.parquet")
    refused(splits(tmp_path / "data.parquet", tmp_path).read, harm)


@pytest.mark.parametrize("kind", ["script", "script and data", "pickle", "tar"])
def test_code_in_a_data_sets_folder_is_never_run(
    kind: str, bomb: bytes, harm: Path, tmp_path: Path, squad_file: Callable[..., Path]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    if kind.startswith("script"):
        (folder / "set.py").write_text(f"import os\nos.mkdir({str(harm)!r})\n")
    if kind == "script and data":
        (folder / "train.jsonl").write_text('{"id": "1"}\n')
    if kind == "pickle":
        (folder / "train.pkl").write_bytes(bomb)
    if kind == "tar":
        with tarfile.open(folder / "train.tar", "w") as made:
            for name in ("0.pyd", "0.pickle", "0.pth", "0.npy"):
                entry = tarfile.TarInfo(name)
                entry.size = len(bomb)
                made.addfile(entry, io.BytesIO(bomb))
    refused(splits(folder, tmp_path).read, harm)


# A run's folder


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_as_checkpoint_is_not_run(
    zipped: bool,
    bomb: bytes,
    harm: Path,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from experiment import run
    from lora_or_full.config.schema import validate

    settings["trainer"]["max_epochs"] = 1
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    if zipped:
        torch.save({"epochs": Bomb(harm), "global_step": 1}, folder / "checkpoints" / "last.ckpt")
    else:
        (folder / "checkpoints" / "last.ckpt").write_bytes(bomb)
    (folder / "checkpoints" / "best.safetensors").write_bytes(bomb)
    run(validate(settings), folder)  # trains again
    assert "damaged" in capsys.readouterr().err
    assert not harm.exists()


def test_code_in_a_saved_configuration_is_not_run(harm: Path, tmp_path: Path) -> None:
    code = f"!!python/object/apply:os.mkdir ['{harm}']\n"
    (tmp_path / "config.yaml").write_text(f"mode: {code}")
    done = subprocess.run(
        [sys.executable, str(PROJECT / "src" / "run.py"), f"resume={tmp_path}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert not harm.exists()


@pytest.mark.parametrize("reader", ["ask", "report", "export", "evaluate", "resume"])
def test_what_a_runs_configuration_names_is_not_built_by_reading_it(
    reader: str, harm: Path, finished_runs: dict[str, Path], tmp_path: Path
) -> None:
    """Not by a resume either, if it is no callback."""
    from experiment import run
    from lora_or_full.cli import main
    from lora_or_full.config.compose import saved

    folder = shutil.copytree(finished_runs["lora"], tmp_path / "run")
    names = {"evil": {"_target_": "os.mkdir", "path": str(harm)}}
    results = json.loads((folder / "results.json").read_text())
    results["config"]["callbacks"] = names
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(json.dumps(results["config"]))
    sums = {name: folder / name for name in ("results.json", "predictions.jsonl", "contexts.json")}
    store.write_checksums(folder, sums)
    data, output = results["config"]["data"]["test_path"], f"--output={tmp_path / 'made'}"
    words = {
        "ask": [folder, f"--data={data}", output], "evaluate": [folder, data],
        "report": [folder, output], "export": [folder, output],
    }  # fmt: skip
    if reader == "resume":
        refused(lambda: run(saved(folder), folder), harm)
    else:
        main.main([reader, *map(str, words[reader])])
        assert not harm.exists()


EVIL = '../../evil<script>|\x1b[3m" [a](b)\n# c'


def test_names_in_the_data_reach_no_path_outside_the_run(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Ids, titles, contexts, questions and answers that are paths and markup."""
    from experiment import run
    from lora_or_full.config.schema import validate

    for name in ("path", "test_path"):
        file = Path(settings["data"][name])
        content = json.loads(file.read_text())
        for article in content["data"]:
            article["title"] += EVIL
            for paragraph in article["paragraphs"]:
                paragraph["context"] += f" {EVIL}"
                for qa in paragraph["qas"]:
                    qa["id"] += f"/{EVIL}"
                    qa["question"] += EVIL
                    qa["answers"] = [{
                        "text": EVIL, "answer_start": len(paragraph["context"]) - len(EVIL)
                    }]  # fmt: skip
        file.write_text(json.dumps(content))
    settings["trainer"]["max_epochs"] = 1
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    run(validate(settings), folder)
    made = set(tmp_path.rglob("*")) - before
    inside = (folder, tmp_path / "cache")
    assert all(any(parent in (path, *path.parents) for parent in inside) for path in made)
    assert not [path for path in made if "evil" in path.name]
    assert len((folder / "predictions.jsonl").read_text().split("\n")) == 7


# Servers


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")  # TensorBoard's own
def test_tensorboard_by_the_documented_command_listens_to_this_machine_alone() -> None:
    documented = re.search("^tensorboard .*$", (PROJECT / "README.md").read_text("utf-8"), re.M)
    assert documented is not None
    words = shlex.split(documented[0], comments=True)[1:]
    from tensorboard import program  # here, where what it warns of is left out

    heard = []

    class Server(program.WerkzeugServer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            heard.append(self.socket.getsockname()[0])
            self.server_close()

    server = program.TensorBoard(server_class=Server)
    server.configure([None, *words, "--port", "0", "--load_fast", "false"])
    server._make_server()
    [address] = heard
    assert ipaddress.ip_address(address).is_loopback
