"""Which jobs of a sweep are run, where, and what is told of those that fail. No job is run here."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import identity
import sweep
from errors import UserError
from study import record
from sweep import Sweep

RESULTS = {
    "epochs": [{"validation_loss": 1.0}],
    "test": {"exact_match": 50.0, "f1": 60.0},
    "cost": {"peak_memory_bytes": {"train": 10**9}, "train_seconds": 61.0},
}


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of each job that was begun; one with lr=9 is killed, any other finishes."""
    words_of: list[list[str]] = []

    def run_child(words: list[str]) -> int:
        words_of.append(words)
        folder = Path(words[-1].partition("=")[2].strip("'"))
        lr = next(word for word in words if word.startswith("lr="))
        record.set_status(folder, "running", f"id of {lr}")
        (folder / "config.yaml").write_text(lr)
        if lr == "lr=9":
            return -signal.SIGKILL
        record.finish(folder, RESULTS, [folder / "config.yaml"])
        record.set_status(folder, "finished", f"id of {lr}")
        return 0

    def identity_of(settings: dict[str, Any]) -> str:
        if settings["lr"] == 0:
            raise UserError("data.path=x: no such file")
        return f"id of lr={settings['lr']}"

    monkeypatch.setattr(sweep, "_run_child", run_child)
    monkeypatch.setattr(identity, "identity_of", identity_of)
    return words_of


def swept(place: Path, *rates: int) -> Sweep:
    """A sweep over learning rates; all runs have one name, as those may that differ elsewhere."""
    jobs = [{"run_name": "lora", "lr": lr} for lr in rates]
    own = Sweep()
    own.plan(jobs)
    for job in jobs:
        own.run(job, [f"lr={job['lr']}"], place)
    return own


def test_what_differs_gets_a_folder_of_its_own_and_the_same_runs_once(
    begun: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(tmp_path, 1, 2, 1).close()
    assert [words[0] for words in begun] == ["lr=1", "lr=2"]
    assert (tmp_path / "lora" / "config.yaml").read_text() == "lr=1"
    assert (tmp_path / "lora-2" / "config.yaml").read_text() == "lr=2"
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"runs": ["lora", "lora"]}
    out = capsys.readouterr().out
    assert "Job 3 of 3 is the one in lora again: run once." in out
    assert "50.0" in out
    swept(tmp_path, 2, 3).close()
    assert [words[0] for words in begun[2:]] == ["lr=3"]
    assert (tmp_path / "lora-3" / "config.yaml").read_text() == "lr=3"


def test_what_fails_is_told_at_once_and_at_the_end_and_is_done_again(
    begun: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = swept(tmp_path, 9, 0, 1)
    told = capsys.readouterr().err
    assert "Job 1 of 3 failed: killed by SIGKILL. The sweep goes on." in told
    assert "Job 2 of 3 failed: data.path=x: no such file. The sweep goes on." in told
    with pytest.raises(UserError, match="2 of 3 jobs failed") as error:
        own.close()
    assert "lora: killed by SIGKILL" in str(error.value)
    assert "lora-2: data.path=x: no such file" in str(error.value)
    assert capsys.readouterr().out.count("no results") == 1  # the folder of the other ran later
    assert record.status(tmp_path / "lora")["state"] == "running"


def test_a_job_that_was_begun_goes_on(begun: list[list[str]], tmp_path: Path) -> None:
    swept(tmp_path, 9)
    with pytest.raises(StopIteration):  # what stands in for a child finds no lr among the words
        swept(tmp_path, 9)
    assert begun[-1] == [f"resume='{tmp_path / 'lora'}'"]


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "SHA256SUMS"])
def test_a_finished_job_of_which_a_file_is_damaged_is_not_finished(
    name: str, begun: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(tmp_path, 1, 2)
    (tmp_path / "lora" / name).write_text("{")
    with pytest.raises(StopIteration):
        swept(tmp_path, 2, 1)
    assert "Job 1 of 2 finished before" in capsys.readouterr().out
    assert begun[-1] == [f"resume='{tmp_path / 'lora'}'"]


def test_what_a_kill_left_as_the_reason_of_an_earlier_failure_is_not_told(
    begun: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.set_status(tmp_path / "lora", "failed", "id of lr=1", error="the disk was full")
    monkeypatch.setattr(sweep, "_run_child", lambda words: -signal.SIGKILL)
    assert swept(tmp_path, 1).failed == [("lora", "killed by SIGKILL")]


def test_a_job_does_not_sweep_what_its_preset_sweeps(
    begun: list[list[str]], tmp_path: Path
) -> None:
    swept(tmp_path, 1)
    assert "hydra.sweeper.params=null" in begun[0]
