"""Two runs are the same if configuration, data, weights and code are, wherever they lie."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_or_full.config.schema import validate
from lora_or_full.data.fingerprints import run_identity
from lora_or_full.runs import provenance


def test_places_and_what_is_only_told_do_not_matter(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    before = run_identity(validate(settings))
    other = copy.deepcopy(settings)
    copied = shutil.copytree(settings["model"]["name"], tmp_path / "moved")
    other["model"]["name"] = str(copied)
    other |= {"output_dir": "elsewhere", "study": "x", "checkpoint_minutes": 9}
    other["trainer"]["log_every_n_steps"] = 99
    assert run_identity(validate(other)) == before


def test_everything_else_does(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [run_identity(validate(settings))]
    for change in ({"seed": 9}, {"lr": 0.5}, {"max_new_tokens": 3}):
        found.append(run_identity(validate(settings | change)))
    other = copy.deepcopy(settings)
    other["adapter"]["lora_alpha"] = 99
    found.append(run_identity(validate(other)))

    data = copy.deepcopy(settings)
    file = tmp_path / "data.json"
    text = Path(settings["data"]["path"]).read_text()
    file.write_text(text)
    data["data"]["path"] = str(file)
    same = run_identity(validate(data))
    file.write_text(text + " ")
    found.append(run_identity(validate(data)))

    model = copy.deepcopy(settings)
    folder = shutil.copytree(settings["model"]["name"], tmp_path / "model")
    model["model"]["name"] = str(folder)
    [weights] = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes() + b" ")
    found.append(run_identity(validate(model)))

    monkeypatch.setattr(provenance, "code", lambda: "another commit")
    found.append(run_identity(validate(settings)))
    assert len(set(found)) == len(found)
    assert same not in found[1:]
