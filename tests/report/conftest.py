"""Run folders as a run leaves them, made up."""

import copy
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lora_or_full.cli import report
from lora_or_full.config import compose
from lora_or_full.evaluation.metrics.exact_match import exact_match
from lora_or_full.evaluation.metrics.f1 import f1

QUESTIONS = 40
CONTEXTS = {
    str(n): f"In {1900 + n} the town of Place{n} was founded by Person{n} of Elsewhere."
    for n in range(10)
}
MakeRun = Callable[..., Path]


def answers(seed: int, share: float) -> list[dict[str, Any]]:
    """Predictions to made-up questions, about `share` of them right."""
    rng = random.Random(seed)
    made = []
    for number in range(QUESTIONS):
        paragraph = number % 10
        gold = f"Person{paragraph}"
        text = gold if rng.random() < share else rng.choice(["", f"{gold} of Elsewhere", "Mars"])
        made.append({
            "id": f"q{number:03}", "title": f"T{paragraph // 2}", "paragraph": paragraph,
            "question": f"Who founded <b>Place{paragraph}</b> | *{number}*?", "answers": [gold],
            "prediction": text, "log_probability": -rng.random(), "ended": True,
            "context_cut": False, "exact_match": exact_match(text, [gold], "squad"),
            "f1": f1(text, [gold], "squad"),
        })  # fmt: skip
    return made


@cache
def base(mode: str) -> dict[str, Any]:
    """The configuration of a mode without overrides."""
    return compose.compose([f"mode={mode}"])


def config_of(mode: str, seed: int) -> dict[str, Any]:
    config = copy.deepcopy(base(mode))
    config |= {"seed": seed, "run_name": f"{mode}{seed}", "output_dir": f"/home/{seed}"}
    config["data"] |= {"path": "x.json", "train_size": 40}
    config["model"] |= {"config": {}, "target_modules": ["c_attn"]}  # what auto stands for
    if "target_modules" in (config["adapter"] or {}):
        config["adapter"]["target_modules"] = ["c_attn"]
    config["trainer"] |= {"precision": "32-true", "max_epochs": 2}
    return config


def record_of(mode: str, seed: int, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    lora = mode != "full"
    rng = random.Random(seed)
    layer = "h.0.attn.c_attn"
    pair = {f"{layer}.lora_A.default.weight": [8, 64], f"{layer}.lora_B.default.weight": [192, 8]}
    shapes = pair if lora else {f"{layer}.weight": [64, 192]}
    test = {
        metric: sum(p[metric] for p in predictions) / len(predictions)
        for metric in ("exact_match", "f1")
    }
    intervals = {"exact_match_interval": [0.0, 100.0], "f1_interval": [0.0, 100.0]}
    fingerprints = {
        name: {"questions": 40, "paragraphs": 10, "articles": 5, "fingerprint": name}
        for name in ("train", "validation", "test")
    }
    return {
        "config": config_of(mode, seed),
        "data": {"source": "s" * 64, **fingerprints},
        "model": {
            "name": "gpt2", "type": "gpt2", "fingerprint": "weights", "shares_context": True,
        },
        "parameters": {"trainable": 2048 if lora else 12288, "total": 14336, "percent": 14.29},
        "shapes": shapes,
        "epochs": [
            {"epoch": n, "train_loss": 2.0 / n, "validation_loss": 1.5 / n + rng.random() / 10,
             "exact_match": 40.0, "f1": 50.0 + rng.random()} for n in (1, 2)
        ],
        "best_epoch": 2,
        "before": {"questions": 40, "exact_match": 0.0, "f1": 3.0} | intervals,
        "test": {"questions": 40} | test | intervals,
        "cost": {
            "samples": 80, "tokens": 8000, "tokens_per_second": 800.0,
            "session_seconds": 20.0, "train_seconds": 10.0 + seed, "validation_seconds": 2.0,
            "seconds_per_batch": 0.5 + seed / 100, "samples_per_second": 8.0,
            "peak_memory_bytes": {"train": 900_000_000, "evaluation": 700_000_000},
            "peak_memory_is": "resident set", "imports_bytes": 400_000_000,
            "exported_bytes": 8192,
            "step": {
                "weights_bytes": 57344, "gradients_bytes": 8192, "optimizer_bytes": 16384,
                "activations_bytes": 10_000_000, "forward_operations": 10**9,
                "backward_operations": 10**9 if lora else 2 * 10**9, "questions": 4, "tokens": 400,
            },
        },
        "exported": "adapter" if lora else "model",
        "environment": {
            "device": "cpu", "machine": "Linux", "cores": 2, "python": "3.11", "commit": "c" * 40,
            "packages": {"torch": "2.13.0"},
        },
    }  # fmt: skip


def maker(place: Path) -> MakeRun:
    """Writes a finished run of (mode, seed) into a folder; `change` may alter its record."""

    def make(
        mode: str,
        seed: int,
        share: float = 0.7,
        change: Callable[[dict[str, Any]], None] = lambda record: None,
        name: str | None = None,
    ) -> Path:
        folder = place / (name or f"{mode}_{seed}")
        folder.mkdir(parents=True)
        predictions = answers(seed + (0 if mode == "full" else 1000), share)
        record = record_of(mode, seed, predictions)
        change(record)
        (folder / "config.yaml").write_text("mode: x\n")
        (folder / "status.json").write_text(json.dumps({"state": "finished", "identity": "x"}))
        (folder / "results.json").write_text(json.dumps(record))
        (folder / "contexts.json").write_text(json.dumps(CONTEXTS))
        (folder / "predictions.jsonl").write_text(
            "".join(json.dumps(p) + "\n" for p in predictions)
        )
        return folder

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes finished runs into `study/`."""
    return maker(tmp_path / "study")


@pytest.fixture(scope="session")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three seeds of both modes in `study/`, and their report in `out/`."""
    place = tmp_path_factory.mktemp("whole")
    make = maker(place / "study")
    for seed in (1, 2, 3):
        make("lora", seed, share=0.6)
        make("full", seed, share=0.8)
    report.write([place / "study"], place / "out", 1.0)
    return place
