"""Parameters and arithmetic of LoRA and of full fine-tuning, from the shapes of trained weights.

A product of a vector with a weight (in, out) counts 2 · in · out operations. For each token and
each such weight W a step computes: forward W x, backward the gradient of x, and, where W is
trained, the gradient of W: three products of the same size. LoRA (Hu et al., 2021, arXiv
2106.09685) trains A (r, in) and B (out, r) instead of W.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Operations of AdamW per weight and step, about: moments, corrections, root, decay, update.
ADAMW = 16


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with LoRA that occurs `count` times in the model; W is (inputs, outputs)."""

    name: str
    count: int
    inputs: int
    outputs: int
    rank: int

    @property
    def full(self) -> int:
        """Number of weights of W."""
        return self.inputs * self.outputs

    @property
    def lora(self) -> int:
        """Number of weights of A and B."""
        return self.rank * (self.inputs + self.outputs)

    @property
    def share(self) -> float:
        """Weights of A and B, in percent of those of W."""
        return 100 * self.lora / self.full

    @property
    def claimed(self) -> float:
        """The often quoted r/d in percent, with d the layer's inputs."""
        return 100 * self.rank / self.inputs

    def operations(self, lora: bool) -> dict[str, int]:
        """Give operations per token (of the optimizer: per step) in one such layer."""
        forward = 2 * (self.full + self.lora * lora)
        trained = self.lora if lora else self.full
        return {
            "forward": forward,
            "backward, inputs": forward,
            "backward, weights": 2 * trained,
            "optimizer, per step": ADAMW * trained,
        }


def lora_layers(shapes: Mapping[str, Sequence[int]]) -> list[Layer]:
    """Find the layers with LoRA by names and shapes of trained weights; equal ones count once."""
    found: Counter[tuple[str, int, int, int]] = Counter()
    for name, shape in shapes.items():
        path, mark, _ = name.partition(".lora_A.")
        other = shapes.get(name.replace(".lora_A.", ".lora_B."))
        if mark and other is not None and len(shape) == len(other) == 2:
            found[path.rpartition(".")[2], shape[1], other[0], shape[0]] += 1
    return [Layer(name, count, *sizes) for (name, *sizes), count in found.items()]


def total(layers: Iterable[Layer]) -> int:
    """Number of LoRA's weights in all layers."""
    return sum(layer.count * layer.lora for layer in layers)
