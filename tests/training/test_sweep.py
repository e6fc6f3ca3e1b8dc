"""Which jobs of a sweep run, in which folder, and how failures are reported. No job runs here."""

import json
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest

from lora_or_full.config import compose
from lora_or_full.config.schema import Config
from lora_or_full.data import fingerprints
from lora_or_full.errors import UserError
from lora_or_full.runs import store
from lora_or_full.training import sweep
from lora_or_full.training.sweep import Sweep

RESULTS = {
    "config": {"metrics": ["exact_match", "f1"]},
    "epochs": [{"f1": 55.0}],
    "best_epoch": 1,
    "test": {
        "exact_match": 50.0, "exact_match_interval": [0, 100], "f1": 60.0, "f1_interval": [0, 100],
    },
    "cost": {"peak_memory_bytes": {"train": 10**9}, "train_seconds": 61.0},
}  # fmt: skip

BASE = compose.defaults()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of each job that was begun; one with lr=9 is killed, any other finishes."""
    words_of: list[list[str]] = []

    def run_child(words: list[str]) -> int:
        words_of.append(words)
        folder = Path(words[-1].partition("=")[2].strip("'"))
        lr = next(word for word in words if word.startswith("lr="))
        store.set_status(folder, "running", f"id of {lr}")
        (folder / "config.yaml").write_text(lr)
        if lr == "lr=9":
            return -signal.SIGKILL
        store.write_results(folder, RESULTS, [folder / "config.yaml"])
        store.set_status(folder, "finished", f"id of {lr}")
        return 0

    def run_identity(config: Config) -> str:
        if config.lr == 0:
            raise UserError("data.path=x: no such file")
        return f"id of lr={config.lr}"

    monkeypatch.setattr(sweep, "_run_child", run_child)
    monkeypatch.setattr(fingerprints, "run_identity", run_identity)
    return words_of


def swept(place: Path, *rates: int) -> None:
    """A sweep over learning rates; all runs have the same name."""
    jobs = [BASE.model_copy(update={"run_name": "lora", "lr": lr}) for lr in rates]
    own = Sweep(jobs, place)
    with own.reported():
        for number, lr in enumerate(rates):
            own.run(number, [f"lr={lr}"])


def test_different_jobs_of_one_name_get_their_own_folders_and_equal_ones_run_once(
    begun: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(tmp_path, 1, 2, 1)
    assert [words[0] for words in begun] == ["lr=1", "lr=2"]
    assert (tmp_path / "lora" / "config.yaml").read_text() == "lr=1"
    assert (tmp_path / "lora-2" / "config.yaml").read_text() == "lr=2"
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "runs": ["lora", "lora"], "varies": ["lr"],
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "Job 3 of 3 is job 1 again: run once." in out
    assert f"to compare them: lora-or-full report {tmp_path}" in out
    assert "50.0" in out
    swept(tmp_path, 2, 3)
    assert [words[0] for words in begun[2:]] == ["lr=3"]
    assert (tmp_path / "lora-3" / "config.yaml").read_text() == "lr=3"


def test_failures_are_reported_at_once_and_at_the_end(
    begun: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="2 of 3 jobs failed") as error:
        swept(tmp_path, 9, 0, 1)
    out, told = capsys.readouterr()
    assert "Job 1 of 3 failed: killed by SIGKILL. The sweep continues." in told
    assert "Job 2 of 3 failed: data.path=x: no such file. The sweep continues." in told
    assert "lora: killed by SIGKILL" in str(error.value)
    assert "lora-2: data.path=x: no such file" in str(error.value)
    assert out.count("no results") == 1  # the folder of the other ran later
    assert store.status(tmp_path / "lora")["state"] == "running"


def test_an_interrupted_job_is_resumed(begun: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="killed"):
        swept(tmp_path, 9)
    with pytest.raises(UserError, match="killed"):
        swept(tmp_path, 9)
    # With its own words, among them paths that may be others on this machine.
    assert begun[-1][0] == "lr=9"
    assert begun[-1][-1] == f"resume='{tmp_path / 'lora'}'"


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "SHA256SUMS"])
def test_a_finished_job_with_a_damaged_file_runs_again(
    name: str, begun: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(tmp_path, 1, 2)
    (tmp_path / "lora" / name).write_text("{")
    swept(tmp_path, 2, 1)
    assert "Job 1 of 2 finished before" in capsys.readouterr().out
    assert begun[-1][-1] == f"resume='{tmp_path / 'lora'}'"


def test_the_reason_of_an_earlier_failure_is_not_reported_after_a_kill(
    begun: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set_status(tmp_path / "lora", "failed", "id of lr=1", error="the disk was full")
    monkeypatch.setattr(sweep, "_run_child", lambda words: -signal.SIGKILL)
    with pytest.raises(UserError, match="lora: killed by SIGKILL"):
        swept(tmp_path, 1)


def test_a_job_does_not_repeat_the_sweep_of_its_preset(
    begun: list[list[str]], tmp_path: Path
) -> None:
    swept(tmp_path, 1)
    assert "hydra.sweeper.params=null" in begun[0]


def test_concurrent_sweeps_of_one_study_do_not_clash(
    begun: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a job starts, another command comes with a job of the same name, and with that job."""
    start = sweep._run_child
    others = [threading.Thread(target=swept, args=(tmp_path, lr)) for lr in (2, 1)]

    def slowly(words: list[str]) -> int:
        if words[0] == "lr=1":
            for other in others:
                other.start()
            others[0].join()
            time.sleep(0.2)
        return start(words)

    monkeypatch.setattr(sweep, "_run_child", slowly)
    swept(tmp_path, 1)
    others[1].join()
    assert [words[0] for words in begun] == ["lr=2", "lr=1"]
    assert (tmp_path / "lora" / "config.yaml").read_text() == "lr=1"
    assert (tmp_path / "lora-2" / "config.yaml").read_text() == "lr=2"
    assert not list(tmp_path.glob(".jobs-*"))


def test_the_results_of_workers_are_reported_where_the_sweep_started(
    begun: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [BASE.model_copy(update={"run_name": f"lora_{lr}", "lr": lr}) for lr in (1, 9, 3)]
    own = Sweep(jobs, tmp_path)

    def launch(*numbers: int) -> None:
        with own.reported():
            for number in numbers:
                pickle.loads(pickle.dumps(own)).run(number, [f"lr={jobs[number].lr}"])

    with pytest.raises(UserError, match="2 of 3 jobs failed") as error:
        launch(1, 0)  # in any order; one worker is lost
    assert "lora_9: killed by SIGKILL" in str(error.value)
    assert "lora_3: its worker was lost" in str(error.value)
    out = capsys.readouterr().out
    assert "Job 2 of 3: lr=9" in out
    assert out.count("no results") == 2
    assert out.count("50.0") == 1
