"""Two runs are the same if configuration, data, weights and code are, wherever they lie."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from configs import FULL

from lora_or_full.config.schema import validate
from lora_or_full.data.fingerprints import (
    check_contents,
    check_data,
    contents,
    first_weights,
    run_identity,
)
from lora_or_full.data.splits import Splits
from lora_or_full.errors import UserError
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


def test_a_run_continues_with_equal_files_alone(settings: dict[str, Any]) -> None:
    found = contents(validate(settings))
    check_contents(found, found)
    with pytest.raises(UserError, match=r"data.path and data.test_path: the files have other"):
        check_contents(found | {"data": "0"}, found)


def test_weights_to_start_from_have_to_fit_the_mode_and_the_model(
    settings: dict[str, Any], finished_runs: dict[str, Path], tmp_path: Path
) -> None:
    base = contents(validate(settings))["model"]

    def refused(start: Path, more: dict[str, Any], model: str = base) -> str:
        with pytest.raises(UserError) as problem:
            first_weights(validate(settings | more | {"init_from": str(start)}), model)
        return str(problem.value)

    lora, full = finished_runs["lora"], finished_runs["full"]
    assert f"model.name={full / 'model'}" in refused(full, {})
    assert f"model.name={full / 'model'}" in refused(full / "model", {})
    assert f"lora-or-full export {lora} --merge" in refused(lora, FULL)
    assert "has other weights (0)" in refused(lora, {}, "0")
    assert "There is no folder" in refused(tmp_path / "nowhere", {})
    assert first_weights(validate(settings | {"init_from": str(lora)}), base) == lora / "adapter"


def test_other_first_weights_make_another_run(
    settings: dict[str, Any], finished_runs: dict[str, Path], tmp_path: Path
) -> None:
    before = run_identity(validate(settings))
    copied = shutil.copytree(finished_runs["lora"], tmp_path / "moved")
    one, other = (
        run_identity(validate(settings | {"init_from": str(folder)}))
        for folder in (finished_runs["lora"], copied)
    )
    assert one == other != before


def test_wrong_data_is_refused_before_anything_is_loaded_and_sound_data_is_read_once(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validate(settings)
    check_data(config, "a")
    with monkeypatch.context() as patch:
        patch.setattr(Splits, "read", None)
        check_data(validate(settings | {"seed": 9}), "a")  # which draws from what is sound
    Path(settings["data"]["path"]).write_text("[]")
    with pytest.raises(UserError, match="there is no question with an answer"):
        check_data(config, "b")
