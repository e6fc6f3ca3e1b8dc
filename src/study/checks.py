"""Whether the files of a run hold what a report needs."""

import json
import math
from typing import Any

# What a record has to hold: texts, lists and mappings; numbers, finite ones; and of each epoch.
FACTS = (
    "config.mode", "config.mask_prompt", "config.batch_size", "config.trainer.precision",
    "config.trainer.accumulate_grad_batches", "model.name", "model.type", "model.fingerprint",
    "data.source", "data.train.fingerprint", "data.validation.fingerprint",
    "data.test.fingerprint", "shapes", "cost.peak_memory_is", "environment.device",
    "environment.machine", "environment.python", "environment.packages", "environment.commit",
)  # fmt: skip
NUMBERS = (
    "config.seed", "config.lr", "best_epoch", "data.test.questions", "data.test.paragraphs",
    "parameters.trainable", "parameters.percent", "before.exact_match", "before.f1",
    "test.exact_match", "test.f1", "cost.samples", "cost.train_seconds",
    "cost.validation_seconds", "cost.session_seconds", "cost.seconds_per_batch",
    "cost.samples_per_second", "cost.tokens_per_second", "cost.peak_memory_bytes.train",
    "cost.peak_memory_bytes.evaluation", "cost.imports_bytes", "cost.exported_bytes",
    "cost.step.weights_bytes", "cost.step.gradients_bytes", "cost.step.optimizer_bytes",
    "cost.step.activations_bytes", "cost.step.forward_operations",
    "cost.step.backward_operations", "cost.step.questions", "environment.cores",
)  # fmt: skip
OF_LORA = ("config.rank", "config.lora.lora_alpha")
OF_EPOCH = ("epoch", "train_loss", "validation_loss", "exact_match", "f1")


def at(content: Any, path: str) -> Any:
    """What a nested record holds at a dotted path."""
    for key in path.split("."):
        content = content[key]
    return content


def lacking(results: Any) -> str | None:
    """What a record lacks that a report needs."""

    def has(path: str, number: bool) -> bool:
        try:
            value = at(results, path)
        except (KeyError, TypeError, IndexError):
            return False
        return _finite(value) if number else True

    missing = [path for path in FACTS if not has(path, False)]
    missing += [path for path in NUMBERS if not has(path, True)]
    if not missing and results["config"]["mode"] == "lora":
        missing = [path for path in OF_LORA if not has(path, True)]
    if not missing:
        epochs = results.get("epochs")
        if not isinstance(epochs, list) or not epochs:
            missing = ["epochs"]
        else:
            missing = [
                f"epochs.{n}.{key}"
                for n in range(len(epochs))
                for key in OF_EPOCH
                if not isinstance(epochs[n], dict) or not _finite(epochs[n].get(key))
            ]
    if not missing and results["best_epoch"] not in [e["epoch"] for e in results["epochs"]]:
        missing = ["the epoch named by best_epoch"]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"results.json lacks {', '.join(missing[:3])}{more}" if missing else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def odd(predictions: list[dict[str, Any]], contexts: Any) -> str | None:
    """What is wrong with the answers of a run."""
    if not predictions:
        return "predictions.jsonl holds no answer"
    if not isinstance(contexts, dict) or not all(isinstance(c, str) for c in contexts.values()):
        return "contexts.json holds something else than texts"
    for p in predictions:
        golds = p.get("answers")
        sure = p.get("log_probability")
        fine = (
            all(isinstance(p.get(key), str) for key in ("id", "question", "prediction"))
            and all(isinstance(p.get(key), bool) for key in ("ended", "context_cut"))
            and all(_finite(p.get(key)) for key in ("exact_match", "f1"))
            and isinstance(golds, list)
            and bool(golds)
            and all(isinstance(gold, str) for gold in golds)
            and (sure is None or _finite(sure))
        )
        if not fine:
            return f"predictions.jsonl: the answer to {p['id']} is not as a run writes it"
        if str(p.get("paragraph")) not in contexts:
            return "contexts.json lacks a paragraph of predictions.jsonl"
    if len({p["id"] for p in predictions}) < len(predictions):
        return "predictions.jsonl has a question twice"
    try:
        json.dumps([predictions, contexts], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "its texts hold half a character (a lone surrogate)"
    return None
