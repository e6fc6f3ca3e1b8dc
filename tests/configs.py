"""Parts of configurations that tests change, and the questions of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lora_or_full.config import compose
from lora_or_full.config.schema import AdapterConfig, DataConfig
from lora_or_full.data.splits import Splits
from lora_or_full.data.squad import Question
from lora_or_full.modeling.loading import add_adapter

# What another mode sets, to be merged into the settings of a LoRA run: conf/mode/full.yaml but its
# learning rate and name.
FULL: dict[str, Any] = {
    "mode": "full", "label": "full", "adapter": None, "rank": None, "frozen_dtype": None,
}  # fmt: skip


def add_lora(model: PreTrainedModel, arguments: dict[str, Any]) -> PeftModel:
    """The model with LoRA; `arguments` are those of PEFT's LoraConfig."""
    adapter = AdapterConfig.model_validate({"_target_": "peft.LoraConfig", **arguments})
    return add_adapter(model, adapter)


def data_config(**values: Any) -> DataConfig:
    """The defaults of conf/data/squad.yaml, with changes."""
    return DataConfig.model_validate(compose.compose()["data"] | values)


def make_splits(path: object, cache_dir: Path, **changes: Any) -> Splits:
    """Splits of a file, a tenth of its articles for validation and a fifth for the test."""
    everything = dict.fromkeys(("test_path", "train_size", "validation_size", "test_size"))
    seed = changes.pop("seed", 0)
    shares = {"validation_articles": 0.1, "test_articles": 0.2}
    data = data_config(path=str(path), **everything | shares | changes)
    return Splits(data, seed, cache_dir)


def changed(splits: Splits, **changes: Any) -> Splits:
    """The same splits with other keys of conf/data/, or another seed."""
    seed = changes.pop("seed", splits.seed)
    return Splits(splits.data.model_copy(update=changes), seed, splits.cache_dir)


def questions_of(
    predictions: Sequence[dict[str, Any]], contexts: Mapping[str, str]
) -> list[Question]:
    """The questions of predictions.jsonl, without where their answers are."""
    return [
        Question(
            p["id"], p["title"], contexts[str(p["paragraph"])], p["question"], p["answers"], []
        )
        for p in predictions
    ]
