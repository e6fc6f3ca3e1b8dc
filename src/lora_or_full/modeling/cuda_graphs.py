"""CUDA graphs: a recorded step is replayed by one launch instead of a thousand.

At a few questions a step a GPU computes faster than Python launches its kernels. A training step is
recorded once for each shape of a batch, and replayed for all others of that shape.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lora_or_full.modeling.packed_rows import PackedRows

WARM_UP = 2  # passes before a recording, in which libraries choose kernels and allocate
Loss = tuple[torch.Tensor, torch.Tensor]  # its sum, and the number of labels


class Recorder:
    """Records graphs that share memory: one may run only when the ones before have ended."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.last: torch.cuda.CUDAGraph | None = None  # the memory lives as long as a graph of it

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work on the stream of recordings, by autocast without its cache of cast weights.

        A graph would read that cache later, when it is gone.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with (
            torch.cuda.stream(self.stream),
            torch.autocast(
                "cuda",
                dtype=torch.get_autocast_dtype("cuda"),
                enabled=torch.is_autocast_enabled("cuda"),
                cache_enabled=False,
            ),
        ):
            yield
        current.wait_stream(self.stream)

    def record(self, work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """Record what `work` launches, without running it. It must have run once before.

        (`torch.cuda.graph` would give all free memory back to the system first, each time.)
        """
        graph = torch.cuda.CUDAGraph()
        with self.aside():
            graph.capture_begin(self.pool)
            try:
                work()
            finally:
                graph.capture_end()
        self.last = graph
        return graph


@dataclass
class _Recording:
    """Graphs of one shape, and the tensors that they read and write."""

    batch: PackedRows
    result: list[torch.Tensor]  # loss and number of labels
    scale: torch.Tensor  # gradient of the loss
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class GraphedLoss:
    """The loss of a batch, replayed; so is its backward pass, which adds to the weights' `grad`.

    Args:
        loss_sum: Computes the loss and its number of labels.
        weights: The trained weights, on one device.
        recorder: Records graphs.
    """

    def __init__(
        self,
        loss_sum: Callable[[PackedRows], Loss],
        weights: Sequence[torch.nn.Parameter],
        recorder: Recorder,
    ) -> None:
        self.loss_sum, self.weights, self.recorder = loss_sum, list(weights), recorder
        self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        self.recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        # Makes autograd call `_Replay.backward`.
        self.start = torch.zeros((), device=self.weights[0].device, requires_grad=True)

    def __call__(self, batch: PackedRows) -> Loss:
        """Give the loss of a batch, for `backward`, and its number of labels."""
        shape = (batch.tokens.shape, batch.wanted.shape)
        if shape not in self.recordings:
            # A resumed run records at other steps: that must not change its dropout.
            devices = [self.start.device] if self.start.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                self.recordings[shape] = self._record(batch)
        recording = self.recordings[shape]
        for kept, given in zip(recording.batch, batch, strict=True):
            kept.copy_(given)
        loss = _Replay.apply(self.start, self, recording)
        return loss, recording.result[1].clone()

    def attach_gradients(self) -> None:
        """Let the weights' `grad` be what the graphs add to; at zero where it was cleared."""
        cleared = [
            (weight, gradient)
            for weight, gradient in zip(self.weights, self.gradients, strict=True)
            if weight.grad is not gradient
        ]
        if cleared:
            torch._foreach_zero_([gradient for _, gradient in cleared])
        for weight, gradient in cleared:
            weight.grad = gradient

    def _record(self, batch: PackedRows) -> _Recording:
        batch = PackedRows(*(tensor.clone() for tensor in batch))
        scale = torch.ones((), device=batch.tokens.device)
        result: list[torch.Tensor] = []

        def forward() -> None:
            result[:] = self.loss_sum(batch)

        def gradients() -> list[torch.Tensor]:
            found = torch.autograd.grad(
                result[0], self.weights, scale, allow_unused=True, materialize_grads=True
            )
            return list(found)

        with self.recorder.aside():
            for _ in range(WARM_UP):
                forward()
                gradients()
        result.clear()
        torch.cuda.empty_cache()  # graphs have memory of their own
        graphs = (
            self.recorder.record(forward),
            self.recorder.record(lambda: torch._foreach_add_(self.gradients, gradients())),
        )
        result[:] = [tensor.detach() for tensor in result]
        return _Recording(batch, result, scale, *graphs)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, start: torch.Tensor, graphed: GraphedLoss, recording: _Recording
    ) -> torch.Tensor:
        ctx.graphed, ctx.recording = graphed, recording
        recording.forward.replay()
        return recording.result[0].detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        ctx.graphed.attach_gradients()
        ctx.recording.scale.copy_(gradients[0])
        ctx.recording.backward.replay()
        return None, None, None
