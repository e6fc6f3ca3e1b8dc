"""A stand-in for CUDA graphs where there is no GPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Repeater:
    """Records like a Recorder, but a replay does the work again."""

    def __init__(self) -> None:
        self.replay: Callable[[], Any]

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, work: Callable[[], Any]) -> "Repeater":
        graph = Repeater()
        graph.replay = torch.enable_grad()(work)
        return graph
