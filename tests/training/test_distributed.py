"""Two devices, a process each, by the user's own command: the same numbers as on one."""

import copy
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

import experiment
from lora_or_full.config.schema import validate
from lora_or_full.errors import UserError
from lora_or_full.processes import check_rendezvous, is_first_process
from lora_or_full.training.distributed import gathered, leave

PROJECT = Path(__file__).parents[2]
RUN = [sys.executable, str(PROJECT / "src" / "run.py")]
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def settings(
    make_settings: Callable[[Path], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Values of a LoRA run of eight epochs on the tiny model."""
    values = make_settings(tmp_path_factory.mktemp("data"))
    values["lr"] = 1e-3
    values["adapter"]["lora_dropout"] = 0.0  # each device draws its own
    values["optimizer"]["eps"] = 1e-4  # what is zero but for rounding must move nothing
    values["trainer"]["max_epochs"] = 8
    values["data"] |= {"test_size": None, "validation_size": None}
    return values


@pytest.fixture(scope="module")
def words(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line that gives the run of `settings`, but for its cache."""
    return [
        "mode=lora", "lr=1e-3", "adapter.lora_dropout=0", "optimizer.eps=1e-4",
        f"model.name={settings['model']['name']}", f"data.path={settings['data']['path']}",
        f"data.test_path={settings['data']['test_path']}", "data.train_size=10",
        "eval_batch_size=2", "max_length=200", "max_new_tokens=4", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "trainer.log_every_n_steps=1", "trainer.max_epochs=8",
        f"cache_dir={tmp_path_factory.mktemp('cache')}",
    ]  # fmt: skip


class Run(NamedTuple):
    """A finished run, and what its command printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def two_devices(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on two devices; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "two_devices"
    done = subprocess.run(
        [*RUN, *words, *TWO, f"hydra.run.dir={folder}", "trainer.enable_progress_bar=false"],
        capture_output=True, text=True, timeout=300, env=os.environ | QUIET,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return Run(folder, done.stdout)


def answers(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.slow
def test_two_devices_train_and_score_like_one_interrupted_or_not(
    words: list[str], settings: dict[str, Any], two_devices: Run, tmp_path: Path
) -> None:
    (whole, printed), parts = two_devices, tmp_path / "parts"
    environment = os.environ | QUIET
    assert printed.count("Will run") == printed.count("peak memory") == 1
    assert "2, which share the 4 questions of a step: the effective batch stays 4" in printed
    results = json.loads((whole / "results.json").read_text())
    assert results["environment"]["device"] == "2 x cpu"
    assert results["cost"]["samples"] == 80
    assert results["cost"]["peak_memory_is"].endswith("the largest of 2 processes")
    with (whole / "metrics.csv").open(newline="") as file:
        assert len([row for row in csv.DictReader(file) if row["train/loss"]]) == 24

    # The same weights, on one device: the same answers to the same questions, to the last bit.
    one = copy.deepcopy(settings) | {"cache_dir": str(tmp_path / "one")}
    data, module, _ = experiment.build(validate(one))
    module.load_trained(whole / "checkpoints" / "best.safetensors", results["best_epoch"])
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
    alone = experiment.run(validate(one), single)
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
    assert errors.count("To resume: python src/run.py resume=") == 1
    done = subprocess.run(
        [*RUN, f"resume={parts}"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    resumed = json.loads((parts / "results.json").read_text())
    assert resumed["epochs"] == results["epochs"]
    assert resumed["cost"]["samples"] == results["cost"]["samples"]
    for name in ("predictions.jsonl", "adapter/adapter_model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_leave_ends_a_process_without_pythons_shutdown(capfd: pytest.CaptureFixture[str]) -> None:
    pid = os.fork()
    if pid == 0:
        print("done")
        try:
            leave()
        finally:  # it has returned or raised
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert capfd.readouterr() == ("done\n", "")


# As SLURM's: one task on each of two machines, on this one; it notes their processes.
SRUN = """#!/usr/bin/env bash
test "$1" = --kill-on-bad-exit=1 && shift
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=2 SLURM_NODELIST=127.0.0.1
export SLURM_LOCALID=0
for n in 0 1; do
    SLURM_PROCID=$n SLURM_NODEID=$n "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > tasks
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_two_machines_compute_the_same_as_two_devices_by_any_launcher(
    words: list[str], two_devices: Run, tmp_path: Path
) -> None:
    environment = os.environ | QUIET
    words = [*words, "trainer.enable_progress_bar=false"]

    def outcome(folder: Path) -> list[bytes]:
        names = ("adapter/adapter_model.safetensors", "predictions.jsonl")
        return [(folder / name).read_bytes() for name in names]

    def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, errors = process.communicate(timeout=300)
        return process.returncode, out, errors

    def start(command: list[str], **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment | more, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    one = two_devices.folder

    # By hand. The second is silent and leaves no file of its own.
    nodes = ["trainer.num_nodes=2", f"hydra.run.dir={tmp_path / 'hand'}"]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start([*RUN, *words, *nodes], **rendezvous, NODE_RANK=n) for n in "01"]
    (code, told, errors), second = map(ended, processes)
    assert (code, errors) == (0, "")
    assert told.count("Will run") == told.count("peak memory") == 1
    assert second == (0, "", "")
    assert outcome(tmp_path / "hand") == outcome(one)
    names = [sorted(f.name for f in folder.iterdir()) for folder in (tmp_path / "hand", one)]
    assert names[0] == names[1]
    events = (tmp_path / "hand" / "tb").glob("events.*")  # each names the process that wrote it
    assert {f.name.rsplit(".", 2)[1] for f in events} == {str(processes[0].pid)}

    # By torchrun.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*launcher, f"--master-port={free_port()}", RUN[1], *words, *TWO]
    code, _, errors = ended(start([*command, f"hydra.run.dir={tmp_path / 'torchrun'}"]))
    assert code == 0, errors
    assert outcome(tmp_path / "torchrun") == outcome(one)

    # By SLURM, whose time is up, and which starts the same job again.
    (tmp_path / "src").symlink_to(PROJECT / "src")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    path = f"PATH='{Path(sys.executable).parent}':$PWD/.venv/bin:$PATH\n"
    (tmp_path / ".venv" / "bin" / "activate").write_text(path)
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" > asked\n')):
        (tmp_path / ".venv" / "bin" / name).write_text(text)
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    job = ["bash", str(PROJECT / "docs" / "slurm.sh"), *words, "batch_size=4", "trainer.devices=1"]
    slurm = {"SLURM_JOB_ID": "7000", "SLURM_JOB_NAME": "slurm.sh", "MASTER_PORT": free_port()}
    run = tmp_path / "runs" / "slurm_7000"
    batch = start(job, **slurm)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert batch.poll() is None, batch.communicate()
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    code, _, errors = ended(batch)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert (tmp_path / "asked").read_text() == "requeue 7000\n"
    code, told, errors = ended(start(job, **slurm))
    assert code == 0, errors
    assert "Resumes" in told
    assert outcome(run) == outcome(one)


@pytest.mark.slow
def test_a_sweep_of_runs_on_two_devices_works_in_a_worker_of_slurm_too(
    words: list[str], tmp_path: Path
) -> None:
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "worker", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODELIST": "127.0.0.1",
    }  # fmt: skip
    words = [word for word in words if not word.startswith(("mode=", "adapter.", "trainer.max"))]
    few = ["data.test_size=4", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    asked = [
        "-m", "mode=lora,full", "study=both", f"output_dir={tmp_path / 'runs'}", *words, *few, *TWO,
    ]  # fmt: skip
    done = subprocess.run(
        [*RUN, *asked], capture_output=True, text=True, timeout=300,
        env=os.environ | QUIET | slurm,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Will run") == 2
    results = [json.loads(f.read_text()) for f in tmp_path.glob("runs/both/*/results.json")]
    assert {r["config"]["mode"] for r in results} == {"lora", "full"}
    assert {r["environment"]["device"] for r in results} == {"2 x cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("struck", [0, 1])
def test_a_killed_process_is_reported_by_the_other(
    struck: int, words: list[str], tmp_path: Path
) -> None:
    folder, rendezvous = tmp_path / "run", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    words = [*words, "trainer.max_epochs=200", "trainer.num_nodes=2", f"hydra.run.dir={folder}"]
    processes = [
        subprocess.Popen(
            [*RUN, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | QUIET | rendezvous | {"NODE_RANK": str(n)},
        )
        for n in range(2)
    ]  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[struck].kill()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    told = errors[1 - struck].splitlines()
    assert len(told) == 1, told
    assert "Error: The processes of the devices have lost each other" in told[0]
    assert told[0].endswith(f"To resume: python src/run.py resume='{folder}'")
    assert processes[1 - struck].returncode == 1


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
    assert is_first_process() is first


def test_machines_without_a_rendezvous_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    check_rendezvous(1)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="num_nodes=2: MASTER_ADDR, NODE_RANK must be set"):
        check_rendezvous(2)
    monkeypatch.setenv("RANK", "0")  # of torchrun, which sets the others
    check_rendezvous(2)


def test_one_device_gathers_what_it_has() -> None:
    assert gathered({"loss": 1.0}) == [{"loss": 1.0}]
