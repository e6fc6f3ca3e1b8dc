"""Labels of sequences, laid out as their token ids are."""

import torch

from lora_or_full.data.prompt import IGNORED
from lora_or_full.modeling.prefix_packing import Packed, Padded


def labels_of(sequences: Packed | Padded) -> torch.Tensor:
    """The label at each token (B, T), from the tokens before them that the loss is of."""
    needed, targets = sequences.wanted
    labels = torch.full((sequences.input_ids.numel(),), IGNORED)
    labels[needed + 1] = targets
    return labels.view(sequences.input_ids.shape)
