"""What a run shows while it trains."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lora_or_full.config import compose
from lora_or_full.config.schema import validate
from lora_or_full.training.loggers import CalmProgressBar, hyperparameters


@pytest.mark.parametrize(
    ("device", "training", "expected"),
    [
        ("cpu", True, [1, 2, 3, 4, 5, 6, 7]),
        ("cuda", True, [1, 1, 3, 3, 3, 6, 6]),
        ("cuda", False, [1, 2, 3, 4, 5, 6, 7]),  # validation looks at its results anyway
    ],
)
def test_the_progress_bar_of_a_gpu_reads_few_losses(
    device: str, training: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        RichProgressBar, "get_metrics", lambda self, trainer, module: {"loss": trainer.global_step}
    )
    bar, shown = CalmProgressBar(3), []
    for step in range(1, 8):
        trainer: Any = SimpleNamespace(
            training=training, global_step=step,
            strategy=SimpleNamespace(root_device=SimpleNamespace(type=device)),
        )  # fmt: skip
        shown.append(bar.get_metrics(trainer, None)["loss"])  # type: ignore[arg-type]
    assert shown == expected


def test_runs_of_all_modes_have_the_same_hyperparameters_in_tensorboard() -> None:
    """TensorBoard takes the names from any one of the runs."""
    found = []
    for mode in ("lora", "full"):
        config = validate(compose.compose([f"mode={mode}", "batch_size=2"]))
        experiment, start, _ = hyperparameters(config, {"whole_run/f1": 1.0}, {"rank", "lr"})
        infos = _content(experiment).experiment.hparam_infos
        found.append({info.name: (info.type, info.differs) for info in infos})
        values = _content(start).session_start_info.hparams
        assert values["batch_size"].number_value == 2
        assert values["mode"].string_value == mode
        assert ("rank" in values) == (mode == "lora")
    assert found[0].keys() == found[1].keys() >= {"rank", "adapter.lora_alpha", "data.train_size"}
    assert "checkpoint_minutes" not in found[0]
    assert {name for name, (_, differs) in found[0].items() if differs} == {"rank", "lr"}
    assert found[0]["rank"] == found[1]["rank"]


def _content(summary: Any) -> HParamsPluginData:
    return HParamsPluginData.FromString(summary.value[0].metadata.plugin_data.content)
