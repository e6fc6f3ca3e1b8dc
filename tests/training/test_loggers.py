"""What a run shows while it trains."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from lora_or_full.training.loggers import CalmProgressBar


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
