"""Whether the files of a run hold what a report needs."""

import math
from collections.abc import Callable
from functools import partial
from operator import eq
from typing import Any

LARGEST = 1e18  # beyond what any run counts or measures, and far from where sums overflow
DEEPEST = 20  # levels of lists and mappings in one another, many more than a run writes
MODES = ("lora", "full")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    # NaN is not, either.
    return type(value) in (int, float) and abs(value) <= LARGEST


def _is_from_zero(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _is_percent(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 100 + 1e-3  # a mean in float32 may be above


def _is_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shape, list) and all(map(_is_count, shape)) for shape in value.values()
    )


def _is_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


# What a record has to hold, by dotted path.
RECORD: dict[str, Callable[[Any], bool]] = {
    "config.mode": lambda value: value in MODES,
    "config.mask_prompt": lambda value: isinstance(value, bool),
    "config.seed": lambda value: isinstance(value, int) and _is_from_zero(value),
    **dict.fromkeys((
        "config.trainer.precision", "model.name", "model.type", "model.fingerprint",
        "data.source", "data.train.fingerprint", "data.validation.fingerprint",
        "data.test.fingerprint", "cost.peak_memory_is", "environment.device",
        "environment.machine", "environment.python",
    ), _is_text),
    "environment.commit": lambda value: value is None or _is_text(value),
    "environment.packages": _is_versions,
    "shapes": _is_shapes,
    **dict.fromkeys((
        "config.batch_size", "config.trainer.accumulate_grad_batches", "best_epoch",
        "data.test.questions", "data.test.paragraphs", "parameters.trainable",
        "environment.cores",
    ), _is_count),
    **dict.fromkeys((
        "before.exact_match", "before.f1", "test.exact_match", "test.f1", "parameters.percent",
    ), _is_percent),
    **dict.fromkeys((
        "config.lr", "cost.step.forward_operations", "cost.step.questions",
    ), _is_positive),
    **dict.fromkeys((
        "cost.samples", "cost.train_seconds", "cost.validation_seconds", "cost.session_seconds",
        "cost.seconds_per_batch", "cost.samples_per_second", "cost.tokens_per_second",
        "cost.peak_memory_bytes.train", "cost.peak_memory_bytes.evaluation",
        "cost.imports_bytes", "cost.exported_bytes", "cost.step.weights_bytes",
        "cost.step.gradients_bytes", "cost.step.optimizer_bytes", "cost.step.activations_bytes",
        "cost.step.backward_operations",
    ), _is_from_zero),
}  # fmt: skip
OF_MODE: dict[str, dict[str, Callable[[Any], bool]]] = {
    "lora": {"config.rank": _is_count, "config.lora.lora_alpha": _is_positive},
    "full": {"config.rank": lambda value: value is None},
}
EPOCH = {
    "train_loss": _is_number,
    "validation_loss": _is_number,
    "exact_match": _is_percent,
    "f1": _is_percent,
}


def at(content: Any, path: str) -> Any:
    """What a nested record holds at a dotted path."""
    for key in path.split("."):
        content = content[key]
    return content


def lacking(results: Any) -> str | None:
    """What a record lacks that a report needs, or has in another way than a run writes it."""
    missing = _amiss(results, RECORD)
    if not missing:
        missing = _amiss(results, OF_MODE[results["config"]["mode"]])
    if not missing:
        epochs = results.get("epochs")
        if not isinstance(epochs, list) or not epochs:
            missing = ["epochs"]
        else:
            missing = [
                f"epochs.{n}.{key}"
                for n, epoch in enumerate(epochs)
                for key in _amiss(epoch, {"epoch": partial(eq, n + 1), **EPOCH})
            ]
    if not missing and results["best_epoch"] > len(results["epochs"]):
        missing = ["the epoch named by best_epoch"]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    if missing:
        return f"results.json lacks {', '.join(missing[:3])}{more}"
    if not _is_plain(results, DEEPEST):
        return f"results.json holds NaN, infinity or more than {DEEPEST} levels"
    return None


def _amiss(content: Any, wanted: dict[str, Callable[[Any], bool]]) -> list[str]:
    """The paths of `wanted` at which `content` holds nothing, or another kind of value."""

    def fits(path: str, kind: Callable[[Any], bool]) -> bool:
        try:
            return kind(at(content, path))
        except (KeyError, TypeError, IndexError):
            return False

    return [path for path, kind in wanted.items() if not fits(path, kind)]


def _is_plain(value: Any, levels: int) -> bool:
    """Whether it is of up to so many levels, and its numbers are such."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return levels > 0 and all(_is_plain(item, levels - 1) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def odd(predictions: list[dict[str, Any]], contexts: Any) -> str | None:
    """What is wrong with the answers of a run."""
    if not predictions:
        return "predictions.jsonl holds no answer"
    if not isinstance(contexts, dict) or not all(map(_is_text, contexts.values())):
        return "contexts.json holds something else than texts"
    texts = list(contexts.values())
    for p in predictions:
        golds, sure, paragraph = p.get("answers"), p.get("log_probability"), p.get("paragraph")
        fine = (
            all(_is_text(p.get(key)) for key in ("id", "question", "prediction"))
            and all(isinstance(p.get(key), bool) for key in ("ended", "context_cut"))
            and p.get("exact_match") in (0, 100)
            and _is_percent(p.get("f1"))
            and isinstance(golds, list)
            and bool(golds)
            and all(map(_is_text, golds))
            and (sure is None or _is_number(sure))
        )
        if not fine:
            return f"predictions.jsonl: the answer to {p['id']} is not as a run writes it"
        if not isinstance(paragraph, int) or str(paragraph) not in contexts:
            return "contexts.json lacks a paragraph of predictions.jsonl"
        texts += [p["id"], p["question"], p["prediction"], *p["answers"]]
    if len({p["id"] for p in predictions}) < len(predictions):
        return "predictions.jsonl has a question twice"
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return "its texts hold half a character (a lone surrogate)"
    return None
