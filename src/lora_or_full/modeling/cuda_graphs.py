"""CUDA graphs: a recorded step is replayed by one launch instead of a thousand.

At a few questions a step a GPU computes faster than Python launches its kernels. A training step is
recorded once for each shape of a batch, and replayed for all others of that shape.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from lora_or_full.modeling.prefix_packing import PackedRows

WARM_UP = 2  # passes before a recording, in which libraries choose kernels and allocate
Loss = tuple[torch.Tensor, torch.Tensor]  # its sum, and the number of labels


class Recorder:
    """Records graphs that share memory: one may run only when the ones before have ended."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.last: torch.cuda.CUDAGraph | None = None  # the memory lives as long as a graph of it

    def record(self, work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """Record what `work` launches, without running it. It must have run once before.

        (`torch.cuda.graph` would give all free memory back to the system first, each time.)
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), uncached_autocast():
            graph.capture_begin(self.pool)
            try:
                work()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        self.last = graph
        return graph


@dataclass
class _Recording:
    """Graphs of one shape, and the tensors that they read and write."""

    batch: PackedRows
    loss: torch.Tensor
    count: torch.Tensor
    scale: torch.Tensor  # gradient of the loss
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class GraphedLoss:
    """The loss of a batch with its gradients, replayed.

    Gradients are added to the `grad` of the weights, as always, but these have to stay the same
    tensors: clear them by `zero_grad(set_to_none=False)`.

    Args:
        loss_sum: Computes the loss and its number of labels.
        weights: The trained weights, on a CUDA device.
    """

    def __init__(
        self, loss_sum: Callable[[PackedRows], Loss], weights: Sequence[torch.nn.Parameter]
    ) -> None:
        self.loss_sum, self.weights = loss_sum, list(weights)
        self.recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self.recorder = Recorder()
        self.start = torch.zeros((), device=self.weights[0].device, requires_grad=True)
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)

    def __call__(self, batch: PackedRows) -> Loss:
        """Give the loss of a batch, for `backward`, and its number of labels."""
        shape = (batch.tokens.shape, batch.wanted.shape)
        if shape not in self.recordings:
            state = torch.cuda.get_rng_state()
            self.recordings[shape] = self._record(batch)
            torch.cuda.set_rng_state(state)  # a resumed run records at other steps
        recording = self.recordings[shape]
        for kept, given in zip(recording.batch, batch, strict=True):
            kept.copy_(given)
        return _Replay.apply(self.start, recording), recording.count.clone()

    def _record(self, batch: PackedRows) -> _Recording:
        batch = PackedRows(*(tensor.clone() for tensor in batch))
        scale = torch.ones((), device=batch.tokens.device)
        result: list[torch.Tensor] = []

        def forward() -> None:
            result[:] = self.loss_sum(batch)

        def backward() -> None:
            found = torch.autograd.grad(result[0], self.weights, scale, allow_unused=True)
            pairs = [(w.grad, g) for w, g in zip(self.weights, found, strict=True) if g is not None]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))

        with uncached_autocast():
            for _ in range(WARM_UP):
                forward()
                torch.autograd.grad(result[0], self.weights, scale, allow_unused=True)
        result.clear()
        torch.cuda.empty_cache()  # graphs have memory of their own
        graphs = self.recorder.record(forward), self.recorder.record(backward)
        loss, count = result
        return _Recording(batch, loss.detach(), count, scale, *graphs)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: torch.Tensor, recording: _Recording) -> torch.Tensor:
        ctx.recording = recording
        recording.forward.replay()
        return recording.loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        ctx.recording.scale.copy_(gradients[0])
        ctx.recording.backward.replay()
        return None, None


def uncached_autocast() -> AbstractContextManager[Any]:
    """Autocast as it is, without its cache of cast weights, which a graph must not read later."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )
