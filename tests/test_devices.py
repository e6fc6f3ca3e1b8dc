"""Two devices, a process each, by the user's own command: the same numbers as on one."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

import experiment
from devices import gathered, is_first

PROJECT = Path(__file__).parents[1]
RUN = [sys.executable, str(PROJECT / "src" / "run.py")]
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


@pytest.fixture
def words(settings: dict[str, Any], tmp_path: Path) -> list[str]:
    """The command line that gives the run of the fixture `settings`, changed here for both."""
    settings["lr"] = 1e-3
    settings["lora"]["lora_dropout"] = 0.0  # drawn on each device for itself
    settings["optimizer"]["eps"] = 1e-4  # what is zero but for rounding shall move nothing
    settings["trainer"]["max_epochs"] = 8
    settings["data"] |= {"test_size": None, "validation_size": None}
    return [
        "mode=lora", "lr=1e-3", "lora.lora_dropout=0", "optimizer.eps=1e-4",
        f"model.name={settings['model']['name']}", f"data.path={settings['data']['path']}",
        f"data.test_path={settings['data']['test_path']}", "data.train_size=10",
        "eval_batch_size=2", "max_length=200", "max_new_tokens=4", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "trainer.log_every_n_steps=1", "trainer.max_epochs=8",
        f"output_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'two'}",
    ]  # fmt: skip


def answers(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.slow
def test_two_devices_train_and_score_as_one_and_alike_whether_interrupted_or_not(
    words: list[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    environment = os.environ | QUIET
    done = subprocess.run(
        [*RUN, *words, *TWO, f"hydra.run.dir={whole}", "trainer.enable_progress_bar=false"],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Will run") == done.stdout.count("peak memory") == 1
    assert "2, which share the 4 questions of a step: the effective batch stays 4" in done.stdout
    results = json.loads((whole / "results.json").read_text())
    assert results["environment"]["device"] == "2 x cpu"
    assert results["cost"]["samples"] == 80
    assert results["cost"]["peak_memory_is"].endswith("the largest of 2 processes")
    with (whole / "metrics.csv").open(newline="") as file:
        assert len([row for row in csv.DictReader(file) if row["train/loss"]]) == 24

    # The same weights, on one device: the same answers to the same questions, to the last bit.
    one = copy.deepcopy(settings) | {"cache_dir": str(tmp_path / "one")}
    data, module, _ = experiment.build(one)
    module.load_trained(whole / "checkpoints" / "best.safetensors")
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    given: list[dict[str, Any]] = []
    module.on_prediction = given.extend
    trainer.test(module, data.test_dataloader(), verbose=False)
    assert sorted(given, key=lambda p: p["id"]) == answers(whole)
    assert len(given) == len(data.test) == 24
    trainer.validate(module, data, verbose=False)
    best = results["epochs"][results["best_epoch"] - 1]
    for name in ("validation_loss", "exact_match", "f1"):
        assert module.epochs[0][name] == best[name]

    # Trained on one device: the same but for the order in which gradients are added.
    single = tmp_path / "single"
    alone = experiment.run(one, single)
    assert alone["before"] == results["before"]
    for own, other in zip(alone["epochs"], results["epochs"], strict=True):
        assert own["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert own["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (single, whole)]
    trained, other = (load_file(file) for file in files)
    assert all(torch.allclose(trained[name], other[name], atol=1e-4) for name in trained)
    assert len(list((whole / "tb").iterdir())) == len(list((single / "tb").iterdir()))
    assert {f.name for f in whole.iterdir()} == {
        *(f.name for f in single.iterdir()),
        ".lock",
        "status.json",
    }

    # Again, and stopped by a signal to the first process alone.
    command = [*RUN, *words, *TWO, f"hydra.run.dir={parts}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while not list(parts.glob("checkpoints/last.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.count("To go on: python src/run.py resume=") == 1
    done = subprocess.run(
        [*RUN, f"resume={parts}"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    resumed = json.loads((parts / "results.json").read_text())
    assert resumed["epochs"] == results["epochs"]
    assert resumed["cost"]["samples"] == results["cost"]["samples"]
    for name in ("predictions.jsonl", "adapter/adapter_model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_one_process_of_a_run_is_the_first(
    environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


def test_one_device_gathers_what_it_has() -> None:
    assert gathered({"loss": 1.0}) == [{"loss": 1.0}]
