"""What a run takes by `_target_`: loggers, callbacks, optimizers, schedules; files of one's own."""

import copy
import csv
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger

import experiment
from lora_or_full.config import command_line, compose
from lora_or_full.config.schema import Config, validate
from lora_or_full.errors import UserError
from lora_or_full.training import plugins
from lora_or_full.training.checkpoint import Interrupted, RunCheckpoint

Settings = dict[str, Any]
HERE = "test_plugins"


class WordCount(L.Callback):
    """A callback of a user's: it logs a name of its own, and keeps a state."""

    def __init__(self, of: str = "words") -> None:
        self.of, self.steps = of, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        self.steps += 1
        pl_module.log(f"own/{self.of}", float(self.steps))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


class StopAt(L.Callback):
    """A callback that stops the training in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


class Lines(Logger):
    """A logger of a user's."""

    name, version = "lines", ""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.file = Path(save_dir) / "lines.txt"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.file.open("a") as out:
            out.write(f"{step} {' '.join(metrics)}\n")

    def log_hyperparams(self, params: Any, *_: Any) -> None:
        self.log_metrics({params["mode"]: 0.0})


@pytest.fixture(autouse=True)
def _own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this file holds can be named by `_target_`, as a user's by PYTHONPATH."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import test_plugins as importable

    for kind in (WordCount, StopAt, Lines):
        monkeypatch.setattr(importable, kind.__name__, kind)


def run(settings: Settings, folder: Path, stop: Callable[[Any], bool] | None = None) -> Any:
    """Run; if a batch comes where `stop` is true of the trainer, stop there and resume."""
    config = validate(copy.deepcopy(settings))
    if stop is not None:
        with pytest.MonkeyPatch.context() as patch:
            for hook in ("on_train_batch_end", "on_test_batch_end"):
                original = getattr(RunCheckpoint, hook)

                def act(self: Any, trainer: Any, *rest: Any, original: Any = original) -> None:
                    self.stopping = self.stopping or stop(trainer)
                    original(self, trainer, *rest)

                patch.setattr(RunCheckpoint, hook, act)
            with pytest.raises(Interrupted):
                experiment.run(config, folder)
    return experiment.run(config, folder)


def outcome(folder: Path) -> tuple[Any, ...]:
    """What must be equal: losses and scores, what was logged, answers, weights."""
    results = json.loads((folder / "results.json").read_text())
    files = ("metrics.csv", "predictions.jsonl", "adapter/adapter_model.safetensors")
    return results["epochs"], results["best_epoch"], [(folder / f).read_bytes() for f in files]


# A validation loss that must rise to be better: the second epoch is one too many.
STOPPING = {
    "_target_": "lightning.pytorch.callbacks.EarlyStopping",
    "monitor": "validation/loss", "mode": "max", "patience": 1,
}  # fmt: skip


def test_early_stopping_ends_a_run_and_a_resumed_one_ends_equally(
    settings: Settings, tmp_path: Path
) -> None:
    settings["callbacks"] = {"early_stopping": STOPPING}
    whole = run(settings, tmp_path / "whole")
    assert [epoch["epoch"] for epoch in whole["epochs"]] == [1, 2]  # of three
    assert whole["cost"]["samples"] == 20
    best = max(whole["epochs"], key=lambda one: (one["f1"], -one["validation_loss"]))
    assert whole["best_epoch"] == best["epoch"]
    for name, stop in {
        "epoch": lambda trainer: not trainer.testing and trainer.global_step == 4,
        "test": lambda trainer: trainer.testing and trainer.global_step == 6,
    }.items():
        run(settings, tmp_path / name, stop)
        assert outcome(tmp_path / name) == outcome(tmp_path / "whole")


def test_a_callback_that_stops_in_an_epoch_ends_the_run_after_it(
    settings: Settings, tmp_path: Path
) -> None:
    settings["callbacks"] = {"stop": {"_target_": f"{HERE}.StopAt", "step": 4}}
    whole = run(settings, tmp_path / "whole")
    assert [epoch["epoch"] for epoch in whole["epochs"]] == [1, 2]
    assert whole["cost"]["samples"] == 20
    run(settings, tmp_path / "resumed", lambda trainer: trainer.global_step == 5)
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")


def test_a_file_of_ones_own_adds_a_callback_and_another_a_logger(
    settings: Settings, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    for group, kind in (("callbacks", "WordCount"), ("logger", "Lines"), ("mode", "")):
        (own / group).mkdir(parents=True)
        (own / group / "mine.yaml").write_text(f"mine:\n  _target_: {HERE}.{kind}\n")
    (own / "mode" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [lora]\nmode: mine\nlr_by_mode: {mine: 1e-2}\n"
    )
    asked = ["mode=mine", "callbacks=mine", "logger=[csv,mine]", "+callbacks.mine.of=letters"]
    command = Namespace(overrides=[*asked, "cache_dir=c"], multirun=False, config_dir=str(own))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        [job] = command_line.prepare(command).jobs
        command.overrides = ["callbacks=mien"]
        with pytest.raises(UserError, match="callbacks=mien: must be early_stopping, mine"):
            command_line.prepare(command)
        assert "mine" in command_line.usage(str(own))
    assert (job.mode, job.lr) == ("mine", 0.01)
    settings |= {"callbacks": job.callbacks, "logger": job.logger}
    run(settings, tmp_path / "whole")
    with (tmp_path / "whole" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counted = [float(row["own/letters"]) for row in rows if row["own/letters"]]
    assert counted == [float(n) for n in range(1, 10)]
    lines = (tmp_path / "whole" / "lines.txt").read_text()
    assert lines.startswith("None lora\n")
    assert "own/letters" in lines
    assert lines.splitlines()[-1].startswith("9 whole_run/test_exact_match whole_run/test_f1")
    assert not (tmp_path / "whole" / "tb").exists()
    run(settings, tmp_path / "resumed", lambda trainer: trainer.global_step == 5)
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")


def build_all(config: Config, folder: Path) -> None:
    plugins.callbacks(config, folder)
    plugins.loggers(config, folder, 0)
    plugins.state_share(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+callbacks.x._target_=nowhere.Callback"], "No module named 'nowhere'.*PYTHONPATH="),
        (["+callbacks.x._target_=lightning.pytorch.callbacks.Early"], "can't be built: .*Early"),
        (["+callbacks.x._target_=os.mkdir", "+callbacks.x.path=evil"], "a kind of Callback"),
        (["+callbacks.x._target_=lightning.pytorch.callbacks.ModelCheckpoint"],
         "a run does this itself. It saves every checkpoint_minutes"),
        (["callbacks=early_stopping", "callbacks.early_stopping.monitor=val_f1"],
         "callbacks.early_stopping.monitor=val_f1: must be one of train/loss, .*validation/f1"),
        (["callbacks=early_stopping", "callbacks.early_stopping.mode=best"], "got best"),
        (["callbacks=early_stopping", "+callbacks.early_stopping.patienc=2"],
         "has no argument patienc.*patience.*'~callbacks.early_stopping.patienc'"),
        (["+logger.x._target_=os.mkdir", "+logger.x.path=evil"], "must be a kind of Logger"),
        (["optimizer._target_=os.mkdir", "+optimizer.path=evil"], "must be a kind of Optimizer"),
        (["optimizer._target_=torch.optim.SGD"], "has no argument betas, eps .*'~optimizer.betas'"),
        (["optimizer._target_=torch.optim.LBFGS", "~optimizer.betas", "~optimizer.eps",
          "~optimizer.weight_decay", "~optimizer.fused"], "LBFGS can't be used: .*closure"),
        (["scheduler._target_=os.mkdir", "+scheduler.path=evil"], "must take optimizer"),
        (["scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau",
          "~scheduler.num_warmup_steps"], "ReduceLROnPlateau can't be used: .*metrics"),
        (["scheduler._target_=torch.optim.lr_scheduler.StepLR"], "has no argument num_warmup_st"),
    ],
)  # fmt: skip
def test_a_wrong_target_is_refused_in_one_line_before_it_is_called(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = validate(compose.compose(words))
    with pytest.raises(UserError, match=message) as refusal:
        build_all(config, tmp_path)
    assert len(str(refusal.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def config(*words: str) -> Config:
    return validate(compose.compose([*words, "logger=csv"]))


@pytest.mark.parametrize(
    ("words", "share"),
    [
        (["optimizer=adamw"], 2.0),
        (["optimizer=sgd"], 1.0),
        (["optimizer=sgd", "optimizer.momentum=0"], 0.0),
        (["optimizer=adafactor"], 2 / 64),
        (["optimizer._target_=torch.optim.RAdam", "~optimizer.fused"], 2.0),
        (["+optimizer.amsgrad=true"], 3.0),
    ],
)
def test_the_state_of_any_optimizer_is_counted(words: list[str], share: float) -> None:
    assert plugins.state_share(config(*words)) == share


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447, 0]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
    ],
)
def test_each_schedule_warms_up_and_then_goes_its_way(name: str, expected: list[float]) -> None:
    chosen = config(f"scheduler={name}", "scheduler.num_warmup_steps=2", "lr=1")
    optimizer = plugins.optimizer(chosen, [torch.nn.Parameter(torch.zeros(1))])
    schedule = plugins.schedule(chosen, optimizer, 6)
    rates = []
    for _ in range(7):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_another_optimizer_and_schedule_train_and_resume(
    settings: Settings, tmp_path: Path
) -> None:
    words = ["optimizer=sgd", "scheduler=cosine", "scheduler.num_warmup_steps=2"]
    values = compose.compose(words)
    settings |= {"optimizer": values["optimizer"], "scheduler": values["scheduler"]}
    run(settings, tmp_path / "whole")
    with (tmp_path / "whole" / "metrics.csv").open(newline="") as file:
        rates = [row["lr-SGD"] for row in csv.DictReader(file) if row["lr-SGD"]]
    assert [float(rate) for rate in rates[:3]] == pytest.approx([0, 0.005, 0.01])
    run(settings, tmp_path / "resumed", lambda trainer: trainer.global_step == 5)
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")


def test_a_scaler_takes_no_fused_optimizer() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1))]
    fused = [plugins.optimizer(config(), weights, scaled).defaults["fused"] for scaled in (0, 1)]
    assert fused == [True, False]


def test_the_profile_of_a_few_steps_is_shown_and_kept(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = compose.compose(["debug=profile"])["callbacks"]
    profile["profile"] |= {"warmup": 1, "steps": 2}
    settings["callbacks"] = profile
    settings["trainer"]["max_epochs"] = 1
    run(settings, tmp_path / "run")
    assert "aten::addmm" in capsys.readouterr().out
    assert "aten::addmm" in (tmp_path / "run" / "profile.txt").read_text()
    assert json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
