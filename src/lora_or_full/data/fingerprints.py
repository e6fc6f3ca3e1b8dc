"""Fingerprints: of a model's weights, and of all that makes two runs the same."""

import hashlib
import json
from pathlib import Path

from lora_or_full.config.schema import RESULT_NEUTRAL, Config
from lora_or_full.data.hub import folder_of
from lora_or_full.data.splits import Splits
from lora_or_full.runs import provenance


def run_identity(config: Config) -> str:
    """Hash the configuration without paths, the content of data and model files, and the commit.

    Raises:
        UserError: Data or model are not available.
    """
    cache = Path(config.cache_dir)
    key = {
        "config": {k: v for k, v in config.flat().items() if k not in RESULT_NEUTRAL},
        "model": weights_fingerprint(folder_of(config.model.name, "model", cache)),
        "data": Splits(config.data, config.seed, cache).fingerprint(),
        "code": provenance.code(),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def weights_fingerprint(model_folder: Path) -> str:
    """Hash the weights in a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(model_folder.glob("*.safetensors")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
