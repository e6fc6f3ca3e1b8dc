"""What survives an interruption: a resumed run ends as an uninterrupted one does."""

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from configs import FULL

import experiment
from lit_module import LitQuestionAnswering
from lora_or_full.config.schema import validate
from lora_or_full.errors import UserError
from lora_or_full.modeling import trained_weights
from lora_or_full.training.checkpoint import (
    CheckedCheckpointIO,
    Interrupted,
    Journal,
    RunCheckpoint,
    best_epoch,
    check_room,
    resume_point,
)
from lora_or_full.training.loggers import MetricsFile

Settings = dict[str, Any]
MakeSettings = Callable[[Path], Settings]
Moment = Callable[[Any, str], bool]


def interrupt_when(monkeypatch: pytest.MonkeyPatch, moment: Moment) -> None:
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
                self.stopping = True
            original(self, trainer, *rest)

        monkeypatch.setattr(RunCheckpoint, hook, act)


def run_until(settings: Settings, folder: Path, moment: Moment) -> None:
    """Run until a stop signal comes at a `moment`."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_when(patch, moment)
        with pytest.raises(Interrupted):
            experiment.run(validate(copy.deepcopy(settings)), folder)


def saved_steps(settings: Settings, folder: Path) -> tuple[dict[str, Any], list[int]]:
    """Run, and give the results and the optimizer steps at which the state was saved."""
    steps: list[int] = []
    original = RunCheckpoint._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RunCheckpoint, "_save", lambda self, t: (steps.append(t.global_step), original(self, t))
        )
        return experiment.run(validate(copy.deepcopy(settings)), folder), steps


class Whole(NamedTuple):
    """An uninterrupted run."""

    results: dict[str, Any]
    folder: Path
    saved_at: list[int]


@pytest.fixture(scope="module")
def whole(
    make_settings: MakeSettings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Whole]:
    """Uninterrupted runs by mode, with the same settings as the fixture `settings`."""
    folder = tmp_path_factory.mktemp("whole")
    settings, runs = make_settings(folder), {}
    for mode, own in (("lora", settings), ("full", settings | FULL)):
        results, steps = saved_steps(own, folder / mode)
        runs[mode] = Whole(results, folder / mode, steps)
    return runs


def outcome(results: dict[str, Any], folder: Path) -> tuple[Any, ...]:
    """What must be equal: losses and scores of all epochs, log, answers, trained weights."""
    texts = [(folder / name).read_text() for name in ("metrics.csv", "predictions.jsonl")]
    weights = sorted((folder / results["exported"]).glob("*.safetensors"))
    return results["epochs"], texts, [file.read_bytes() for file in weights]


def in_an_epoch(trainer: Any, hook: str) -> bool:
    return "train" in hook and trainer.global_step == 5


def in_the_last_test(trainer: Any, hook: str) -> bool:
    return "test" in hook and trainer.global_step == 9


@pytest.mark.parametrize(
    ("mode", "where", "moment"),
    [
        ("lora", "the middle of an epoch", in_an_epoch),
        ("full", "the middle of an epoch", in_an_epoch),
        ("lora", "a validation", lambda t, hook: "validation" in hook and t.global_step == 6),
        ("lora", "an epoch's last step", lambda t, hook: "train" in hook and t.global_step == 3),
        ("lora", "the first test", lambda t, hook: "test" in hook and t.global_step == 0),
        ("lora", "the test at the end", in_the_last_test),
        ("full", "the test at the end", in_the_last_test),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    settings: Settings,
    whole: dict[str, Whole],
    mode: str,
    where: str,
    moment: Moment,
    tmp_path: Path,
) -> None:
    if mode == "full":
        settings |= FULL
    run_until(settings, tmp_path / "run", moment)
    assert not (tmp_path / "run" / "results.json").exists()
    resumed = experiment.run(validate(settings), tmp_path / "run")
    expected = whole[mode]
    assert outcome(resumed, tmp_path / "run") == outcome(expected.results, expected.folder)
    assert resumed["before"] == expected.results["before"]
    assert resumed["cost"]["samples"] == expected.results["cost"]["samples"]


def test_a_checkpoint_is_written_before_and_after_each_validation(
    whole: dict[str, Whole],
) -> None:
    assert whole["lora"].saved_at == whole["full"].saved_at == [2, 3, 5, 6, 8, 9]


def test_a_timed_checkpoint_is_written_between_epochs(settings: Settings, tmp_path: Path) -> None:
    settings["checkpoint_minutes"] = 1e-9
    settings["trainer"]["max_epochs"] = 2
    assert saved_steps(settings, tmp_path / "run")[1] == [1, 2, 3, 4, 5, 6]


def test_saving_takes_at_most_a_twentieth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here 3 seconds each: a full run's state can be large."""
    clock = [0.0]
    saved: list[float] = []

    def save(file: Path) -> None:
        saved.append(clock[0])
        clock[0] += 3

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1, num_training_batches=1000, save_checkpoint=save,
        should_stop=False,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda value, all: value),
    )  # fmt: skip
    checkpoint = RunCheckpoint(tmp_path, 10)
    for step in range(150):
        clock[0] += 1
        checkpoint.on_train_batch_end(trainer, None, None, None, step)
    assert saved == [11, 75, 139]


def test_a_lora_checkpoint_holds_adapter_and_optimizer_only(whole: dict[str, Whole]) -> None:
    file = whole["lora"].folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    trained = sum(weight.numel() for weight in checkpoint["state_dict"].values())
    [optimizer] = checkpoint["optimizer_states"]
    moments = [value for state in optimizer["state"].values() for value in state.values()]
    assert sum(moment.numel() for moment in moments if moment.ndim) == 2 * trained


def test_a_checkpoint_of_another_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    _, module, _ = experiment.build(validate(settings))
    with pytest.raises(UserError, match="lacks 1 trained weights, and has 1 that"):
        module.on_load_checkpoint(
            {"state_dict": dict.fromkeys([*list(module.trainable_parameters())[1:], "other"])}
        )


def test_a_weight_that_is_not_finite_is_never_saved(settings: Settings) -> None:
    _, module, _ = experiment.build(validate(settings))
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


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(tmp_path, 60)
    checkpoint.request_stop(2, None)
    assert checkpoint.stopping
    with pytest.raises(SystemExit):
        checkpoint.request_stop(2, None)


@pytest.fixture(scope="module")
def interrupted_run(make_settings: MakeSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its second epoch; not to be changed."""
    folder = tmp_path_factory.mktemp("interrupted")
    run_until(make_settings(folder), folder / "run", in_an_epoch)
    return folder / "run"


@pytest.mark.parametrize("how", ["a byte", "the end", "all"])
@pytest.mark.parametrize(
    ("names", "then"),
    [
        (["last.ckpt"], "resumes from before.ckpt, step 3"),
        (["last.ckpt", "before.ckpt"], "starts from the beginning"),
        (["best.safetensors"], "starts from the beginning"),
    ],
)
def test_damaged_files_are_named_and_an_older_state_is_used(
    how: str,
    names: list[str],
    then: str,
    interrupted_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(interrupted_run / "checkpoints", tmp_path / "checkpoints")
    for name in names:
        spoil(folder / name, how)
    point = resume_point(folder)
    assert point == ((folder / "before.ckpt", 3) if "resumes" in then else (None, 0))
    damaged = ", ".join(str(folder / name) for name in names)
    assert f"Warning: damaged: {damaged}. The run {then}." in capsys.readouterr().err


def test_best_weights_of_an_epoch_that_no_checkpoint_knows_are_not_taken(
    interrupted_run: Path, tmp_path: Path
) -> None:
    """They were written right before a kill; the epoch that is redone may come out otherwise."""
    folder = shutil.copytree(interrupted_run / "checkpoints", tmp_path / "checkpoints")
    first, unknown = folder / "best.safetensors", {"weight": torch.ones(1)}
    content = first.read_bytes()
    first.replace(folder / "best.before.safetensors")
    trained_weights.save(unknown, 2, first)
    assert resume_point(folder)[0] == folder / "last.ckpt"
    assert first.read_bytes() == content
    trained_weights.save(unknown, 2, first)
    assert resume_point(folder) == (None, 0)


@pytest.mark.parametrize(
    "names", [["last.ckpt"], ["last.ckpt", "before.ckpt"], ["best.safetensors"]]
)
def test_a_run_with_damaged_files_ends_like_an_undamaged_one(
    settings: Settings,
    whole: dict[str, Whole],
    names: list[str],
    interrupted_run: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(interrupted_run, tmp_path / "run")
    for name in names:
        spoil(folder / "checkpoints" / name, "a byte")
    resumed = experiment.run(validate(settings), folder)
    assert outcome(resumed, folder) == outcome(whole["lora"].results, whole["lora"].folder)


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


def test_a_kill_between_two_renames_leaves_the_previous_checkpoint(
    interrupted_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(interrupted_run / "checkpoints", tmp_path / "checkpoints")
    assert resume_point(folder) == (folder / "last.ckpt", 5)
    (folder / "last.ckpt").unlink()
    assert resume_point(folder) == (folder / "before.ckpt", 3)


def test_a_checkpoint_that_reads_differently_than_written_does_not_replace_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"state_dict": {"weight": torch.ones(3)}, "epochs": [], "global_step": 1}
    writer = CheckedCheckpointIO()
    writer.save_checkpoint(state, tmp_path / "last.ckpt")
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, out: (save(state, out), out.seek(200),
                                                           out.write(bytes(200))))  # fmt: skip
    with pytest.raises(OSError, match="reads differently") as raised:
        writer.save_checkpoint(state | {"global_step": 2}, tmp_path / "last.ckpt")
    assert raised.value.filename == str(tmp_path / "last.ckpt")
    assert resume_point(tmp_path) == (tmp_path / "last.ckpt", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_journal_drops_a_damaged_line_and_all_after_it(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    journal = Journal(file)
    for number in range(4):
        journal.add([{"id": f"{number}"}])
    file.write_bytes(file.read_bytes().replace(b'"2"', b'"7"'))
    assert [p["id"] for p in Journal(file).predictions] == ["0", "1"]
    assert len(file.read_bytes().splitlines()) == 2


def test_metrics_keep_undamaged_rows_before_the_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    names = ["train/loss", "own/name"]
    metrics = MetricsFile(file, 0, names[:1])
    for step in range(4):
        metrics.log_metrics({names[step == 1]: 0.5}, step)  # the second row adds a column
    whole = file.read_bytes()
    assert whole.splitlines()[:3] == [b"epoch,step,train/loss,own/name", b",0,0.5,", b",1,,0.5"]
    MetricsFile(file, 2, names[:1])
    assert file.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    file.write_bytes(whole.replace(b",1,", b",\xff1,")[:-5])
    MetricsFile(file, 9, names[:1])
    kept = file.read_text().splitlines()
    assert [line.split(",")[1] for line in kept] == ["step", "0", "2"]


def test_a_run_that_the_disk_has_no_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    check_room(tmp_path, 10**6, 10**6, 2.0)
    with pytest.raises(UserError, match="the run needs 5.2 GB of disk, 1.0 GB are free"):
        check_room(tmp_path, 10**8, 10**8, 2.0)
    (tmp_path / "last.ckpt").touch()
    os.truncate(tmp_path / "last.ckpt", 45 * 10**8)  # a resumed run has most of it already
    check_room(tmp_path, 10**8, 10**8, 2.0)
    os.truncate(tmp_path / "last.ckpt", 27 * 10**8)
    check_room(tmp_path, 10**8, 10**8, 0.0)  # of an optimizer without a state


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_lightning_does_not_handle_stop_signals(
    settings: Settings, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LitQuestionAnswering.on_train_epoch_end

    def struck(self: LitQuestionAnswering) -> None:
        signal.raise_signal(number)  # Lightning looks for signals after an epoch
        original(self)

    monkeypatch.setattr(LitQuestionAnswering, "on_train_epoch_end", struck)
    with pytest.raises(Interrupted):
        experiment.run(validate(settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("f1s", "losses", "kept"),
    [
        ([50.0, 60.0, 55.0], [1.0, 2.0, 0.5], [0, 1]),
        ([50.0, 50.0, 50.0], [2.0, 1.0, 1.0], [0, 1]),
        ([50.0, 50.0, 50.0], [1.0, 1.0, 1.0], [0]),
    ],
)
def test_the_best_epoch_is_of_the_highest_f1_then_the_lowest_loss_then_the_first(
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
    module = LitQuestionAnswering.__new__(LitQuestionAnswering)  # its weights play no part
    checkpoint = RunCheckpoint(tmp_path, 60)
    trainer: Any = SimpleNamespace(is_global_zero=True)
    epochs = [{"f1": f1, "validation_loss": loss} for f1, loss in zip(f1s, losses, strict=True)]
    for number in range(len(epochs)):
        module.epochs = epochs[: number + 1]
        checkpoint.on_validation_end(trainer, module)
    assert saved == kept
    assert best_epoch(epochs) is epochs[kept[-1]]  # which results.json names
