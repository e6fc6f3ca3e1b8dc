"""Cache of the scores before training, which runs of the same base model and test set share."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_or_full.config.schema import Config
from lora_or_full.runs import store

SCORES = "scores.json"
CODE = ("data", "modeling", "generation", "evaluation")  # sub-packages that scores depend on


def path(config: Config, test: str, model: str, device: str) -> Path:
    """Folder of the scores, named by a hash of all that they depend on.

    Args:
        config: The run's configuration, its precision resolved.
        test: Fingerprint of the test questions.
        model: Fingerprint of the weights.
        device: Name of the device that computes them.
    """
    package = Path(__file__).parents[1]
    files = [file for part in CODE for file in sorted((package / part).glob("*.py"))]
    key = {
        "model": model,
        "model_config": config.model.config,
        "test": test,
        "lengths": [config.max_length, config.max_new_tokens],
        "precision": config.trainer.precision,
        "device": device,
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(config.cache_dir) / "before" / name


def save(scores: Mapping[str, Any], folder: Path) -> None:
    """Write scores with their checksum."""
    store.write_json(folder / SCORES, scores)
    store.write_checksums(folder, {SCORES: folder / SCORES})


def load(folder: Path) -> dict[str, Any] | None:
    """Read scores; None if there are none, or, with a warning, if they are damaged."""
    if not store.is_intact(folder):
        if store.damaged_files(folder):
            print(f"Warning: {folder} is damaged; it is recomputed.", file=sys.stderr)
        return None
    return json.loads((folder / SCORES).read_text(encoding="utf-8"))
