"""What survives an interruption: a resumed run ends as an uninterrupted one does."""

import copy
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import experiment
from lit_module import LitQuestionAnswering
from lora_or_full.errors import UserError
from lora_or_full.training.checkpoint import (
    CheckedCheckpointIO,
    Interrupted,
    Journal,
    RunCheckpoint,
    StopSignal,
    check_room,
    resume_point,
)
from lora_or_full.training.loggers import MetricsFile

Settings = dict[str, Any]


def interrupt_when(monkeypatch: pytest.MonkeyPatch, moment: Callable[[Any, str], bool]) -> None:
    """Act as if a stop signal came at a `moment` (trainer, hook) of the next run."""

    for hook in ("on_train_batch_end", "on_validation_batch_end", "on_test_batch_end"):
        original = getattr(RunCheckpoint, hook)

        def act(
            self: RunCheckpoint,
            trainer: Any,
            *rest: Any,
            hook: str = hook,
            original: Any = original,
        ) -> None:
            if moment(trainer, hook):
                self.stop.received = True
            original(self, trainer, *rest)

        monkeypatch.setattr(RunCheckpoint, hook, act)


def outcome(results: dict[str, Any], folder: Path) -> tuple[Any, ...]:
    """What must be equal: losses and scores of all epochs, answers, trained weights."""
    answers = (folder / "predictions.jsonl").read_text()
    weights = sorted((folder / results["exported"]).glob("*.safetensors"))
    return results["epochs"], answers, [file.read_bytes() for file in weights]


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize(
    ("where", "moment"),
    [
        ("the middle of an epoch", lambda t, hook: "train" in hook and t.global_step == 5),
        ("a validation", lambda t, hook: "validation" in hook and t.global_step == 6),
        ("the last step of an epoch", lambda t, hook: "train" in hook and t.global_step == 3),
        ("the test before training", lambda t, hook: "test" in hook and t.global_step == 0),
        ("the test at the end", lambda t, hook: "test" in hook and t.global_step == 9),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    settings: Settings,
    mode: str,
    where: str,
    moment: Callable[[Any, str], bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if mode == "full":
        settings |= {"mode": "full", "lora": None, "rank": None}
    whole = experiment.run(copy.deepcopy(settings), tmp_path / "whole")
    # The scores before training are cached: without this the second run would not ask for them.
    settings["cache_dir"] = str(tmp_path / "second cache")
    with monkeypatch.context() as patch:
        interrupt_when(patch, moment)
        with pytest.raises(Interrupted):
            experiment.run(copy.deepcopy(settings), tmp_path / "parts")
    assert not (tmp_path / "parts" / "results.json").exists()
    resumed = experiment.run(copy.deepcopy(settings), tmp_path / "parts")
    assert outcome(resumed, tmp_path / "parts") == outcome(whole, tmp_path / "whole")
    assert resumed["before"] == whole["before"]
    assert resumed["cost"]["samples"] == whole["cost"]["samples"]


def test_metrics_hold_each_step_once_after_a_resume(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.run(copy.deepcopy(settings), tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_when(patch, lambda t, hook: "train" in hook and t.global_step == 5)
        with pytest.raises(Interrupted):
            experiment.run(copy.deepcopy(settings), tmp_path / "parts")
    experiment.run(copy.deepcopy(settings), tmp_path / "parts")
    whole, parts = ((tmp_path / n / "metrics.csv").read_text() for n in ("whole", "parts"))
    assert parts == whole


def test_a_timed_checkpoint_is_written_between_epochs(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["checkpoint_minutes"] = 1e-9
    steps = []
    original = RunCheckpoint._save
    monkeypatch.setattr(
        RunCheckpoint, "_save", lambda self, t: (steps.append(t.global_step), original(self, t))
    )
    experiment.run(settings, tmp_path / "run")
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_checkpoint_stands_before_each_validation_and_behind_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    original = RunCheckpoint._save
    monkeypatch.setattr(
        RunCheckpoint, "_save", lambda self, t: (steps.append(t.global_step), original(self, t))
    )
    experiment.run(settings, tmp_path / "run")
    assert steps == [2, 3, 5, 6, 8, 9]


def test_a_lora_checkpoint_holds_adapter_and_optimizer_only(
    settings: Settings, tmp_path: Path
) -> None:
    experiment.run(settings, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    trained = sum(weight.numel() for weight in checkpoint["state_dict"].values())
    [optimizer] = checkpoint["optimizer_states"]
    moments = [value for state in optimizer["state"].values() for value in state.values()]
    assert sum(moment.numel() for moment in moments if moment.ndim) == 2 * trained


def test_a_checkpoint_of_another_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    _, module, _ = experiment.build(settings)
    with pytest.raises(UserError, match="1 trained weights are missing in it, 1 have no place"):
        module.on_load_checkpoint(
            {"state_dict": dict.fromkeys([*list(module.trainable_parameters())[1:], "other"])}
        )


def test_a_weight_that_is_not_finite_is_never_saved(settings: Settings) -> None:
    _, module, _ = experiment.build(settings)
    next(iter(module.trainable_parameters().values())).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        module.on_save_checkpoint({})


def test_the_journal_drops_a_line_that_was_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.add([{"id": "1"}, {"id": "2"}])
    journal.add([{"id": "3"}])
    with (tmp_path / "journal").open("a") as out:
        out.write(json.dumps([{"id": "4"}])[:5])
    again = Journal(tmp_path / "journal")
    again.add([{"id": "4"}])
    assert [p["id"] for p in Journal(tmp_path / "journal").predictions] == ["1", "2", "3", "4"]


def test_a_second_signal_ends_at_once() -> None:
    stop = StopSignal()
    stop._note(2, None)
    assert stop.received
    with pytest.raises(SystemExit):
        stop._note(2, None)


@pytest.fixture
def interrupted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Path]:
    """Makes a copy of a run that was interrupted in its second epoch, and gives its folder."""
    with monkeypatch.context() as patch:
        interrupt_when(patch, lambda t, hook: "train" in hook and t.global_step == 5)
        with pytest.raises(Interrupted):
            experiment.run(copy.deepcopy(settings), tmp_path / "parts")
    numbers = itertools.count()
    return lambda: shutil.copytree(tmp_path / "parts", tmp_path / f"copy{next(numbers)}")


@pytest.mark.parametrize("how", ["a byte", "the end", "all"])
def test_what_is_damaged_is_told_and_the_run_ends_as_if_it_were_not(
    settings: Settings,
    how: str,
    interrupted: Callable[[], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = experiment.run(copy.deepcopy(settings), tmp_path / "whole")
    for names, then in (
        (["last.ckpt"], "goes on from before.ckpt, step 3"),
        (["last.ckpt", "before.ckpt"], "begins anew"),
        (["best.safetensors"], "begins anew"),
    ):
        folder = interrupted()
        for name in names:
            spoil(folder / "checkpoints" / name, how)
        resumed = experiment.run(copy.deepcopy(settings), folder)
        assert outcome(resumed, folder) == outcome(whole, tmp_path / "whole")
        told = ", ".join(str(folder / "checkpoints" / name) for name in names)
        assert f"Warning: damaged: {told}. The run {then}." in capsys.readouterr().err


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    changed = bytes([content[middle] ^ 1])
    file.write_bytes(
        {
            "a byte": content[:middle] + changed + content[middle + 1 :],
            "the end": content[:-1],
            "all": b"",
        }[how]
    )


def test_a_kill_between_two_renames_leaves_the_checkpoint_before(
    settings: Settings, interrupted: Callable[[], Path]
) -> None:
    folder = interrupted() / "checkpoints"
    assert resume_point(folder) == (folder / "last.ckpt", 5)
    (folder / "last.ckpt").unlink()
    assert resume_point(folder) == (folder / "before.ckpt", 3)


def test_a_checkpoint_that_reads_otherwise_than_written_does_not_replace_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"state_dict": {"weight": torch.ones(3)}, "epochs": [], "global_step": 1}
    writer = CheckedCheckpointIO()
    writer.save_checkpoint(state, tmp_path / "last.ckpt")
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, out: (save(state, out), out.seek(200),
                                                           out.write(bytes(200))))  # fmt: skip
    with pytest.raises(OSError, match="reads otherwise") as raised:
        writer.save_checkpoint(state | {"global_step": 2}, tmp_path / "last.ckpt")
    assert raised.value.filename == str(tmp_path / "last.ckpt")
    assert resume_point(tmp_path) == (tmp_path / "last.ckpt", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_journal_drops_what_is_damaged_with_all_behind_it(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    journal = Journal(file)
    for number in range(4):
        journal.add([{"id": f"{number}"}])
    file.write_bytes(file.read_bytes().replace(b'"2"', b'"7"'))
    assert [p["id"] for p in Journal(file).predictions] == ["0", "1"]
    assert len(file.read_bytes().splitlines()) == 2


def test_metrics_without_what_was_cut_off_go_on(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    metrics = MetricsFile(file, 0)
    for step in range(4):
        metrics.log_metrics({"train/loss": 0.5}, step)
    whole = file.read_bytes()
    MetricsFile(file, 2)
    assert file.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    file.write_bytes(whole.replace(b",1,", b",\xff1,")[:-5])
    MetricsFile(file, 9)
    kept = file.read_text().splitlines()
    assert [line.split(",")[1] for line in kept] == ["step", "0", "2"]


def test_a_disk_without_room_for_a_run_is_told_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    check_room(tmp_path, 10**6, 10**6)
    with pytest.raises(UserError, match="the run needs 4.8 GB of disk, 1.0 GB are free"):
        check_room(tmp_path, 10**8, 10**8)
    (tmp_path / "last.ckpt").touch()
    os.truncate(tmp_path / "last.ckpt", 4 * 10**9)  # of a run that goes on, most is there
    check_room(tmp_path, 10**8, 10**8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_is_this_projects_to_handle(
    settings: Settings, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LitQuestionAnswering.on_train_epoch_end

    def struck(self: LitQuestionAnswering) -> None:
        signal.raise_signal(number)  # Lightning looks for signals behind an epoch
        original(self)

    monkeypatch.setattr(LitQuestionAnswering, "on_train_epoch_end", struck)
    with pytest.raises(Interrupted):
        experiment.run(settings, tmp_path / "run")


@pytest.mark.parametrize(
    ("f1s", "losses", "kept"),
    [
        ([50.0, 60.0, 55.0], [1.0, 2.0, 0.5], [0, 1]),
        ([50.0, 50.0, 50.0], [2.0, 1.0, 1.0], [0, 1]),
        ([50.0, 50.0, 50.0], [1.0, 1.0, 1.0], [0]),
    ],
)
def test_the_epoch_of_the_best_f1_is_kept_of_equals_the_lowest_loss_then_the_first(
    f1s: list[float],
    losses: list[float],
    kept: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(
        LitQuestionAnswering, "save_trained", lambda self, file: saved.append(len(self.epochs) - 1)
    )
    module = LitQuestionAnswering.__new__(LitQuestionAnswering)  # what it trains plays no part
    checkpoint = RunCheckpoint(tmp_path, 60, StopSignal())
    trainer: Any = SimpleNamespace(is_global_zero=True)
    epochs = [{"f1": f1, "validation_loss": loss} for f1, loss in zip(f1s, losses, strict=True)]
    for number in range(len(epochs)):
        module.epochs = epochs[: number + 1]
        checkpoint.on_validation_end(trainer, module)
    assert saved == kept
    assert module.best_epoch is epochs[kept[-1]]  # which results.json names
