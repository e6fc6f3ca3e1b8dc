"""What makes two runs the same: configuration, data, starting weights and code."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_or_full.config import schema
from lora_or_full.data.hub import folder_of
from lora_or_full.data.splits import Splits
from lora_or_full.runs import provenance


def identity_of(settings: Mapping[str, Any]) -> str:
    """A hash of `settings` (conf/) without paths, of the files of data and model, and the commit.

    Raises:
        UserError: data or model can't be had.
    """
    cache = Path(settings["cache_dir"])
    key = {
        "config": {k: v for k, v in schema.flat(settings).items() if k not in schema.PLACES},
        "model": weights_fingerprint(folder_of(settings["model"]["name"], "model", cache)),
        "data": Splits(**settings["data"], seed=settings["seed"], cache_dir=cache).fingerprint(),
        "code": provenance.code(),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def weights_fingerprint(model_folder: Path) -> str:
    """A hash of the weights in a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(model_folder.glob("*.safetensors")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
