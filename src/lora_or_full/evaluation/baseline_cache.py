"""The scores of a model before training: computed once for all runs that begin alike."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_or_full.runs import store

SCORES = "scores.json"


def place_of(settings: Mapping[str, Any], test: str, model: str) -> Path:
    """The folder of the scores, named by all that they depend on: `test` and `model` are
    fingerprints, of the test questions and of the weights."""
    package = Path(__file__).parents[1]
    source = [
        file
        for part in ("data", "modeling", "generation", "evaluation")
        for file in sorted((package / part).glob("*.py"))
    ]
    key = {
        "model": model,
        "model_config": settings["model"]["config"],
        "test": test,
        "lengths": [settings["max_length"], settings["max_new_tokens"]],
        "precision": settings["trainer"]["precision"],
        "accelerator": settings["trainer"]["accelerator"],
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in source)).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(settings["cache_dir"]) / "before" / name


def keep(scores: Mapping[str, Any], place: Path) -> None:
    """Write the scores, sealed."""
    store.write_json(place / SCORES, scores)
    store.write_checksums(place, {SCORES: place / SCORES})


def kept(place: Path) -> dict[str, Any] | None:
    """The scores in `place`; None if there are none, or (which is told) they are damaged."""
    if not store.is_intact(place):
        if store.damaged_files(place):
            print(f"Warning: {place} is damaged; it is made anew.", file=sys.stderr)
        return None
    return json.loads((place / SCORES).read_text(encoding="utf-8"))
