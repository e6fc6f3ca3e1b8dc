"""What survives an interruption: a resumed run ends as an uninterrupted one does."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import experiment
from checkpoint import Interrupted, Journal, RunCheckpoint, StopSignal
from errors import UserError

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
            {"state_dict": dict.fromkeys([*list(module.trained())[1:], "other"])}
        )


def test_a_weight_that_is_not_finite_is_never_saved(settings: Settings) -> None:
    _, module, _ = experiment.build(settings)
    next(iter(module.trained().values())).data[0, 0] = float("nan")
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
