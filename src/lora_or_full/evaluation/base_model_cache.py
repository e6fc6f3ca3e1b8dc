"""Cache of what runs of the same base model share: scores before training, and a trial of it."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_or_full.config.schema import Config
from lora_or_full.runs import store

SCORES = "scores.json"
CODE = ("data", "modeling", "generation", "evaluation")  # sub-packages that scores depend on


def scores_folder(config: Config, test: str, model: str, device: str) -> Path:
    """Folder of the scores before training, named by a hash of all that they depend on.

    With `init_from` they depend on what the weights of an adapter mean, too.

    Args:
        config: The run's configuration, its precision resolved.
        test: Fingerprint of the test questions.
        model: Fingerprint of the weights.
        device: Name of the device that computes them.
    """
    key = {
        "test": test, "precision": config.trainer.precision, "device": device,
        "scoring": config.scoring, "metrics": config.metrics,
    }  # fmt: skip
    if config.init_from is not None and config.adapter is not None:
        key["adapter"] = json.dumps(config.adapter.arguments(), sort_keys=True)
    return _folder(config, model, "before", **key)


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


def shares_context(config: Config, model: str, trial: Callable[[], bool]) -> bool:
    """Give what a trial of the base model found (`sharing.shares_context`), now or before.

    Args:
        config: The run's configuration.
        model: Fingerprint of the weights.
        trial: Tries the model, which takes long for a large one.
    """
    packages = {name: version(name) for name in ("torch", "transformers")}
    folder = _folder(config, model, "shares_context", **packages)
    for verdict in (True, False):  # the name of an empty file, which can't be damaged
        if (folder / str(verdict)).exists():
            return verdict
    verdict = trial()
    store.write_text(folder / str(verdict), "")
    return verdict


def _folder(config: Config, model: str, kind: str, **more: Any) -> Path:
    package = Path(__file__).parents[1]
    files = [file for part in CODE for file in sorted((package / part).rglob("*.py"))]
    key = {
        "model": model,
        "model_config": config.model.config,
        "prompt": config.prompt,
        "lengths": [config.max_length, config.max_new_tokens],
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        **more,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(config.cache_dir) / kind / name
