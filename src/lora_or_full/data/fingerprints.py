"""Fingerprints: of weights, and of all that makes two runs the same."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lora_or_full.config.schema import Config, is_neutral
from lora_or_full.data.hub import folder_of
from lora_or_full.data.splits import NAMES, Splits
from lora_or_full.errors import UserError
from lora_or_full.runs import provenance, store
from lora_or_full.runs.reader import finished_record, weights_folder


def contents(config: Config) -> dict[str, str]:
    """Hash the files that a run reads, wherever they lie: of its model, data and first weights.

    Raises:
        UserError: They are not available.
    """
    cache = Path(config.cache_dir)
    found = {
        "model": weights_fingerprint(folder_of(config.model.name, "model", cache)),
        "data": Splits(config.data, config.seed, cache).fingerprint(),
    }
    if config.init_from is not None:
        found["init_from"] = weights_fingerprint(first_weights(config, found["model"]))
    return found


def check_contents(recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse to continue a run with other files than it began with.

    Raises:
        UserError: They have other content.
    """
    keys = {"model": "model.name", "data": "data.path and data.test_path", "init_from": "init_from"}
    for part, fingerprint in found.items():
        if recorded.get(part) != fingerprint:
            raise UserError(
                f"{keys[part]}: the files have other content (fingerprint {fingerprint}) than when "
                f"the run began ({recorded.get(part)}). Give those, wherever they lie now."
            )


def check_data(config: Config, fingerprint: str) -> None:
    """Read the data set once: what is wrong with it is said before torch is imported.

    Args:
        config: The run's configuration.
        fingerprint: Of the data set; what was sound before is noted, and not read again.

    Raises:
        UserError: It is not in a format that is read, or can't be split.
    """
    splits = Splits(config.data, config.seed, Path(config.cache_dir))
    key = [fingerprint, *(splits.key(name) | {"seed": None} for name in NAMES)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    note = Path(config.cache_dir) / "checked" / digest
    if not note.is_file():
        splits.read()
        store.write_text(note, "")


def run_identity(config: Config, found: Mapping[str, str] | None = None) -> str:
    """Hash the configuration without paths, the content of data and model files, and the commit.

    Args:
        config: The run's configuration.
        found: Its `contents`, where they are known.

    Raises:
        UserError: Data or model are not available.
    """
    key = {
        "config": {k: v for k, v in config.flat().items() if not is_neutral(k)},
        **(found or contents(config)),
        "code": provenance.code(),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def first_weights(config: Config, base: str) -> Path:
    """Give the folder of the weights that init_from names: of a run, or of an adapter.

    Args:
        config: The run's configuration.
        base: Fingerprint of its base model.

    Raises:
        UserError: It holds none, or none that fit the run's mode or base model.
    """
    given = f"init_from={config.init_from}"
    folder = Path(os.path.expanduser(config.init_from or ""))
    weights, kind = folder, "adapter"
    if (folder / "config.json").is_file():
        raise UserError(f"{given} is a whole model: name it by model.name={folder}")
    if not (folder / "adapter_config.json").is_file():
        try:
            record = finished_record(folder)
            weights, kind = weights_folder(folder, record), record.exported
        except UserError as error:
            raise UserError(f"{given}: {error}") from None
        if record.model.fingerprint != base:
            raise UserError(
                f"{given} was trained on {record.model.name}, weights {record.model.fingerprint}; "
                f"model.name={config.model.name} has other weights ({base})."
            )
    if kind == "model" and config.adapter is not None:
        raise UserError(
            f"{given} trained the whole model. To put the adapter of mode={config.mode} on it: "
            f"model.name={weights}"
        )
    if kind == "adapter" and config.adapter is None:
        raise UserError(
            f"{given} is an adapter; mode={config.mode} has none. To train the whole model on: "
            f"lora-or-full export {folder} --merge --output=merged, then model.name=merged"
        )
    return weights


def weights_fingerprint(model_folder: Path) -> str:
    """Hash the weights in a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(model_folder.glob("*.safetensors")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
