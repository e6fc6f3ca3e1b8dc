"""What was trained, loaded again: a run's folder, or an adapter or a model made elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import PreTrainedTokenizerBase

from lora_or_full.data.fingerprints import weights_fingerprint
from lora_or_full.data.hub import folder_of
from lora_or_full.errors import UserError
from lora_or_full.generation.kv_cache import Model
from lora_or_full.generation.predictor import Predictor
from lora_or_full.modeling.loading import load_adapter, load_model, load_tokenizer, max_positions
from lora_or_full.modeling.precision import WHOLE, device_of, precision_of
from lora_or_full.runs import provenance, store

CONF = provenance.PROJECT / "conf"
BASE = "--model=FOLDER (or a hub id) names its base model."


def load(place: Path, base: str | None) -> Predictor:
    """What was trained, from the folder of a finished run, of an adapter in PEFT's format, or of a
    model. `base`: hub id or folder of the base model; None if the folder names it.

    Raises:
        UserError: there is none of these, it is not whole, or the base model is another.
    """
    quiet()
    if (place / "results.json").is_file():
        try:
            return _of_run(place, base)
        except KeyError as error:
            raise UserError(
                f"{place / 'results.json'} lacks {error}: another version of this project made it."
            ) from None
    if (place / "adapter_config.json").is_file():
        return _adapter_from_elsewhere(place, base)
    if (place / "config.json").is_file():
        return _from_elsewhere(place, load_model(place, str(place), {}), place, place)
    raise _no_record(place, "results.json, adapter_config.json or config.json")


def quiet() -> None:
    """Leave out what transformers says of itself."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def results_of(place: Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        UserError: the run is not finished, or its record can't be read.
    """
    if not (place / "results.json").is_file():
        raise _no_record(place, "results.json (ask.py also takes what was made elsewhere)")
    try:
        results = json.loads((place / "results.json").read_text(encoding="utf-8"))
        assert isinstance(results["config"], dict)
        assert results["exported"] in ("adapter", "model")
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{place / 'results.json'} is no record of a run ({type(error).__name__})."
        ) from None
    return results


def weights_folder(place: Path, results: Mapping[str, Any]) -> Path:
    """The folder of what the run in `place` has trained.

    Raises:
        UserError: it is gone, or not as the run has left it.
    """
    folder = place / str(results["exported"])
    if not folder.is_dir():
        raise UserError(f"{place} holds no {folder.name}/, which its run has written: copy it too.")
    if damaged := store.damaged_files(place, among=f"{folder.name}/"):
        raise UserError(
            f"{place} holds {', '.join(damaged)} not as its run has written it: "
            f"python src/run.py resume='{place}' makes it anew."
        )
    return folder


def base_folder(place: Path, results: Mapping[str, Any], base: str | None) -> Path:
    """The folder of the model that the run in `place` began with; `base` says where it is now.

    Raises:
        UserError: it can't be had, or is another.
    """
    name = base or str(results["config"]["model"]["name"])
    folder = _folder(name, Path(results["config"]["cache_dir"]))
    if weights_fingerprint(folder) != results["model"]["fingerprint"]:
        raise UserError(
            f"{name} is another base model (weights {weights_fingerprint(folder)}) than {place} "
            f"was trained on: {results['config']['model']['name']}, weights "
            f"{results['model']['fingerprint']}. {BASE}"
        )
    return folder


def _of_run(place: Path, base: str | None) -> Predictor:
    results = results_of(place)
    settings = results["config"]
    exported = weights_folder(place, results)
    if exported.name == "adapter":
        folder = base_folder(place, results, base)
        name, config = settings["model"]["name"], settings["model"]["config"]
        model: Model = load_adapter(load_model(folder, name, config), exported)
    else:
        folder = exported
        model = load_model(folder, str(folder), {})
    positions = max_positions(folder)
    trainer = settings["trainer"]
    return _ready(place, model, load_tokenizer(exported), positions, settings, trainer, results)


def _adapter_from_elsewhere(place: Path, base: str | None) -> Predictor:
    try:
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        name = base or config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{place / 'adapter_config.json'} can't be read ({type(error).__name__}: {error})."
        ) from None
    if not isinstance(name, str) or not name:
        raise UserError(f"The adapter in {place} does not name its base model. {BASE}")
    folder = _folder(name, Path(_defaults()["cache_dir"]))
    model = load_adapter(load_model(folder, name, {}), place)
    own = (place / "tokenizer_config.json").is_file()
    return _from_elsewhere(place, model, folder, place if own else folder)


def _from_elsewhere(place: Path, model: Model, folder: Path, tokenizer: Path) -> Predictor:
    """What knows nothing of this project is asked as a run with the defaults of conf/ would be."""
    trainer = _yaml(CONF / "trainer" / "default.yaml")
    trainer["precision"] = precision_of(trainer)
    return _ready(
        place, model, load_tokenizer(tokenizer), max_positions(folder), _defaults(), trainer, None
    )


def _ready(
    place: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    settings: Mapping[str, Any],
    trainer: Mapping[str, Any],
    results: dict[str, Any] | None,
) -> Predictor:
    precision = str(trainer["precision"])
    torch.nn.Module.to(
        model, device_of(trainer["accelerator"]), WHOLE.get(precision, torch.float32)
    )
    room = min(settings["max_length"], positions - settings["max_new_tokens"])
    return Predictor(
        place.resolve().name, model.eval(), tokenizer, room, settings["max_new_tokens"],
        settings["packed_length"], settings["eval_batch_size"], precision, results,
    )  # fmt: skip


def _folder(name: str, cache: Path) -> Path:
    try:
        return folder_of(name, "model", cache)
    except UserError as error:
        raise UserError(f"The base model can't be had: {BASE} ({error})") from None


def _no_record(place: Path, wanted: str) -> UserError:
    """Why `place` holds none of the `wanted` files."""
    if not place.is_dir():
        return UserError(f"There is no folder {place}.")
    if not (place / "config.yaml").is_file() and not (place / "status.json").is_file():
        inside = [file.parent.name for file in sorted(place.glob("*/results.json"))]
        of_these = f" Name one of the runs in it: {', '.join(inside)}." if inside else ""
        return UserError(f"{place} is no run: it holds no {wanted}.{of_these}")
    status = store.status(place)
    state = status.get("state", "not finished")
    if state == "failed":
        return UserError(
            f"{place} is a run that failed ({status.get('error', 'it does not say why')}): there "
            "is nothing to ask. Run it again."
        )
    return UserError(
        f"{place} is a run that is not finished ({state}). If it is not at work any more, "
        f"python src/run.py resume='{place}' goes on with it."
    )


def _defaults() -> dict[str, Any]:
    return _yaml(CONF / "config.yaml")


def _yaml(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content
