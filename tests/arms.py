"""What another mode sets, to be merged into the settings of a LoRA run."""

from typing import Any

# The keys of conf/mode/full.yaml but its learning rate and name.
FULL: dict[str, Any] = {
    "mode": "full", "label": "full", "adapter": None, "rank": None, "frozen_dtype": None,
}  # fmt: skip
