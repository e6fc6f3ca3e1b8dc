"""Every key of conf/: what it means, in which unit, and which values it takes."""

import difflib
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_or_full.errors import UserError


@dataclass(frozen=True)
class Kind:
    """The values that a key takes: said in words, and told by a function."""

    words: str
    takes: Callable[[Any], bool]

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.words} or {other.words}", lambda v: self.takes(v) or other.takes(v))


def one_of(*values: str) -> Kind:
    return Kind(" or ".join(values), lambda v: v in values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_int(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_name(value: Any) -> bool:
    """Whether it can be a part of a path that stays in its folder; the system takes 255 bytes."""
    name = str(value)
    return re.fullmatch(r"[\w+-][\w.+-]*", name) is not None and len(os.fsencode(name)) <= 200


COUNT = Kind("a whole number from 1", lambda v: _is_int(v) and v >= 1)
WHOLE = Kind("a whole number from 0", lambda v: _is_int(v) and 0 <= v < 2**63)
POSITIVE = Kind("a number above 0", lambda v: _is_number(v) and 0 < v < float("inf"))
FROM_ZERO = Kind("a number from 0", lambda v: _is_number(v) and 0 <= v < float("inf"))
SHARE = Kind("a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1)
PART = Kind("a number between 0 and 1", lambda v: _is_number(v) and 0 < v < 1)
BETAS = Kind(
    "two numbers from 0 to below 1",
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(SHARE.takes, v)),
)
SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
TEXT = Kind("a text", _is_text)
TEXTS = Kind("a list of texts", _is_texts)
NAME = Kind("a name of letters, digits, -, _, + and ., up to 200 bytes", _is_name)
NULL = Kind("null", lambda v: v is None)
ANY = Kind("what Lightning takes", lambda v: True)

SETTINGS: dict[str, tuple[Kind, str]] = {
    "mode": (one_of("lora", "full"), "LoRA, or full fine-tuning of every weight"),
    "lr": (POSITIVE, "peak learning rate; each mode brings its own"),
    "rank": (COUNT | NULL, "LoRA's rank r; null in full"),
    "seed": (WHOLE, "of initialisation, order, dropout and the draw of the training questions"),
    "batch_size": (COUNT, "questions an optimizer step"),
    "eval_batch_size": (COUNT, "questions answered at once"),
    "max_length": (COUNT, "tokens of prompt and answer; a longer context is shortened"),
    "max_new_tokens": (COUNT, "tokens of a generated answer, at most"),
    "packing": (
        SWITCH,
        "questions share their context in one sequence, in training and evaluation",
    ),
    "packed_length": (COUNT, "tokens of a context with its questions; more repeat the context"),
    "mask_prompt": (SWITCH, "loss on answer and end-of-text only; false: on every token"),
    "resume": (TEXT | NULL, "folder of an interrupted run that shall go on"),
    "checkpoint_minutes": (POSITIVE, "minutes of work that a kill may cost"),
    "run_name": (NAME, "names the run's folder"),
    "study": (
        NAME | NULL,
        "names a sweep's folder in output_dir; the same sweep again does only what is missing",
    ),
    "output_dir": (TEXT, "where run folders are made"),
    "cache_dir": (TEXT, "where tokenized data and scores before training are kept"),
    "frozen_dtype": (
        one_of("auto", "float32") | NULL,
        "of the weights LoRA does not train; auto: what trainer.precision rounds them to anyway",
    ),
    "lora.r": (COUNT, "= rank"),
    "lora.lora_alpha": (POSITIVE, "the update is scaled by lora_alpha / r"),
    "lora.lora_dropout": (SHARE, "share of LoRA's inputs that is dropped"),
    "lora.target_modules": (TEXTS | TEXT, "names of the layers that get LoRA"),
    "model.name": (TEXT, "hub id or local folder of any causal language model"),
    "model.target_modules": (
        TEXTS | TEXT,
        "its attention projections, the default of lora.target_modules",
    ),
    "model.config": (
        Kind("keys of the model's configuration", lambda v: isinstance(v, dict)),
        "values of its own configuration, such as dropouts",
    ),
    "data.path": (TEXT | TEXTS, "hub id, folder, or .json / .parquet files in SQuAD's format"),
    "data.test_path": (
        TEXT | TEXTS | NULL,
        "the test set; null: the data set's own, or some articles",
    ),
    "data.split_by": (one_of("article", "question"), "what train and validation do not share"),
    "data.draw_by": (
        one_of("question", "paragraph"),
        "training questions are drawn and shuffled one by one, or those of a paragraph together",
    ),
    "data.split_seed": (WHOLE, "of the splits; the same for all runs of a study"),
    "data.train_size": (COUNT | NULL, "training questions; null: all"),
    "data.validation_size": (COUNT | NULL, "validation questions, by paragraph; null: all"),
    "data.test_size": (COUNT | NULL, "test questions, by paragraph; null: all"),
    "data.validation_articles": (PART, "share of the articles held out for validation"),
    "data.test_articles": (PART, "share of the articles held out where there is no test set"),
    "data.unanswerable": (one_of("refuse", "drop"), "questions without an answer (SQuAD v2.0)"),
    "data.misaligned": (one_of("refuse", "repair"), "answers that are not at their answer_start"),
    "optimizer.weight_decay": (FROM_ZERO, "of AdamW"),
    "optimizer.betas": (BETAS, "of AdamW"),
    "optimizer.eps": (POSITIVE, "of AdamW"),
    "optimizer.warmup_steps": (WHOLE, "steps in which the learning rate rises from zero"),
    "trainer.accelerator": (one_of("auto", "cpu", "gpu", "cuda", "mps"), "what computes"),
    "trainer.devices": (ANY, "how many devices, or which; they share the questions of each step"),
    "trainer.num_nodes": (COUNT, "machines, on each of which the command is started"),
    "trainer.strategy": (
        # What splits the weights over devices, as fsdp does, needs other checkpoints than ours.
        one_of("auto", "ddp"),
        "how several devices work together: ddp, each with the whole model; auto is that too",
    ),
    "trainer.precision": (
        ANY,
        "32-true, bf16-mixed, ...; auto: bf16-mixed where the hardware is fast at it, else 32-true",
    ),
    "trainer.max_epochs": (COUNT, "epochs"),
    "trainer.accumulate_grad_batches": (COUNT, "parts that a step is computed in, to save memory"),
    "trainer.gradient_clip_val": (POSITIVE | NULL, "largest norm of the gradient"),
    "trainer.log_every_n_steps": (COUNT, "steps between two points in TensorBoard"),
    "trainer.enable_progress_bar": (SWITCH, "show progress bars"),
    "trainer.deterministic": (SWITCH, "only deterministic kernels (GPU)"),
}
# Arguments of Lightning's Trainer that a run gives itself, or with which an epoch would not be all
# of its questions and a validation, or the test not all of its questions.
RESERVED = frozenset({
    "logger", "callbacks", "plugins", "default_root_dir", "num_sanity_val_steps",
    "enable_model_summary", "use_distributed_sampler", "enable_checkpointing", "barebones",
    "fast_dev_run", "overfit_batches", "limit_train_batches", "limit_val_batches",
    "limit_test_batches", "limit_predict_batches", "val_check_interval", "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs", "max_steps", "max_time", "min_epochs", "min_steps",
})  # fmt: skip
# Keys of a configuration that do not change what comes out.
PLACES = frozenset({
    "run_name", "resume", "study", "output_dir", "cache_dir", "checkpoint_minutes", "model.name",
    "data.path", "data.test_path", "trainer.enable_progress_bar", "trainer.log_every_n_steps",
})  # fmt: skip
GROUPS = ("mode", "model", "data", "trainer", "experiment")
OF_LORA = ("rank", "frozen_dtype")  # keys that full fine-tuning leaves null
DERIVED = ("lr_by_mode", "project_dir")


def check(config: Mapping[str, Any]) -> None:
    """Refuse a configuration with values that can't be.

    Raises:
        UserError: with a line for each of its problems.
    """
    values = flat(config, SETTINGS)
    for key in values:
        # Lightning and PEFT know their own arguments better, and are asked.
        if key not in SETTINGS and not key.startswith((*DERIVED, "trainer.", "lora")):
            raise unknown(key)
    full = values.get("mode") == "full"
    needed = [key for key in SETTINGS if not (full and key.startswith("lora."))] + ["lora"] * full
    if missing := [key for key in needed if key not in values and key not in config]:
        raise UserError(f"These keys can't be left out: {', '.join(missing)}.")
    problems = [
        f"{key}={value}: must be {SETTINGS[key][0].words}."
        for key, value in values.items()
        if key in SETTINGS and not SETTINGS[key][0].takes(value)
    ]
    if full:
        problems += [
            f"{key}={config[key]}: mode=full has no {key}; it belongs to mode=lora."
            for key in (*OF_LORA, "lora")
            if config[key] is not None
        ]
    elif values["rank"] is None:
        problems.append("rank=null: mode=lora needs a rank.")
    elif values["lora.r"] != values["rank"]:
        problems.append(f"lora.r={values['lora.r']}: rank={values['rank']} sets it; leave it out.")
    problems += [
        f"trainer.{key}: a run sets this itself. Fewer questions: data.train_size, "
        "data.validation_size, data.test_size; fewer epochs: trainer.max_epochs."
        for key in config["trainer"]
        if key in RESERVED
    ]
    problems += [  # each further argument that takes more than that takes an object
        f"trainer.{key}={value}: must be one word or number."
        for key, value in config["trainer"].items()
        if f"trainer.{key}" not in SETTINGS and isinstance(value, (list, Mapping))
    ]
    parts, size = values["trainer.accumulate_grad_batches"], values["batch_size"]
    if not problems and parts > size:
        problems.append(
            f"trainer.accumulate_grad_batches={parts}: a step of batch_size={size} questions "
            "can't be computed in more parts."
        )
    if problems:
        raise UserError("\n".join(problems))


def unknown(key: str, valid: Iterable[str] = ()) -> UserError:
    """The refusal of a `key` that is none, with those that are."""
    names = sorted(valid or {*SETTINGS, *GROUPS})
    near = difflib.get_close_matches(key, names, n=1)
    guess = f" Did you mean {near[0]}?" if near else ""
    return UserError(f"There is no key {key!r}.{guess} Valid keys: {', '.join(names)}.")


def explained(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """For each key its default in `config`, and what it means."""
    values = flat(config, SETTINGS)
    return [
        (key, _shown(values[key]), f"{text} ({kind.words})" if kind is not ANY else text)
        for key, (kind, text) in SETTINGS.items()
        if key in values
    ]


def _shown(value: Any) -> str:
    """As it is typed on the command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_shown, value)) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def flat(config: Mapping[str, Any], whole: Container[str] = ()) -> dict[str, Any]:
    """The values of a nested configuration by dotted key; those in `whole` are not taken apart."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name not in whole:
            inner = {f"{name}.{key}": item for key, item in value.items()}
            values |= flat(inner, whole)
        else:
            values[name] = value
    return values
