"""A trial of a model: do questions over a shared context get the answers of separate prompts?"""

import torch

from lora_or_full.data.prompt import PromptTokens
from lora_or_full.generation.kv_cache import Model, PaddedCache, SharedPrefixCache
from lora_or_full.modeling.architecture import max_positions
from lora_or_full.modeling.precision import in_float32


def shares_context(model: Model, length: int) -> bool:
    """Test whether a shared context gives the same logits as separate prompts.

    Args:
        model: In eval mode; it is tried in float32.
        length: Tokens of each of the two test prompts, limited to what the model can read.
    """
    length = max(2, min(length, max_positions(model.config)) - 2)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (length,), generator=draw).tolist()
    size = max(1, length // 8)
    prompts = [
        PromptTokens([], ids[size:], ids[:size]),
        PromptTokens([], ids[size:], ids[size - 1 :: -1]),
    ]
    try:
        with in_float32(model):
            shared, alone = (
                _trial(SharedPrefixCache(model, prompts, 2 * length, 2)),
                _trial(PaddedCache(model, prompts)),
            )
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False  # the model does not accept these arguments
    return bool((shared - alone).abs().max() < 1e-3 * alone.std())


@torch.no_grad()
def _trial(backend: SharedPrefixCache | PaddedCache) -> torch.Tensor:
    """The logits (3, 2, vocabulary) after two prompts, and after one and two more tokens."""
    both = torch.arange(2, device=backend.model.device)
    return torch.stack([backend.prefill()[0], backend.step(both, both), backend.step(both, both)])
