"""Every key of conf/: its meaning, its unit, and the values that it accepts.

Hydra composes the values (compose.py). `validate` checks all of them at once and gives the one
`Config` that all other code receives.
"""

import json
import types
from collections.abc import Container, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from lora_or_full.config import template
from lora_or_full.config.near_misses import HABITS, unknown
from lora_or_full.config.values import (
    REQUIRED,
    Count,
    Fraction,
    Metrics,
    Name,
    NonNegative,
    PeftClass,
    Plugins,
    Positive,
    Probability,
    PromptText,
    Scoring,
    Target,
    Text,
    Texts,
    Whole,
)
from lora_or_full.errors import UserError


def key(description: str, changes_result: bool = True, default: Any = ...) -> Any:
    """Describe a key.

    Args:
        description: What the key means and its unit, for `--help`.
        changes_result: Whether another value can give other weights, answers or scores. Runs that
            differ only in keys that change no result (`neutral`) count as the same run.
        default: Value of a key that conf/ may leave out; without it the key is required.
    """
    return Field(
        default, description=description, json_schema_extra={"changes_result": changes_result}
    )


neutral = partial(key, changes_result=False)


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), populate_by_name=True
    )


class ModelConfig(_Section):
    """The base model."""

    name: Text = neutral("hub id or local folder of any causal language model")
    target_modules: Texts | Text = key(
        "the default of adapter.target_modules; auto: the layers of queries, keys and values"
    )
    gradient_checkpointing: bool = neutral(
        "compute activations twice instead of keeping them: less memory, the same gradients",
        default=False,
    )
    config: Annotated[dict[str, Any], "keys of the model's configuration"] = key(
        "values of the model's own configuration; its dropouts are 0 unless they are given here"
    )


class DataConfig(_Section):
    """The data set and its splits."""

    path: Text | Texts = neutral("hub id, folder, or .json, .jsonl, .csv, .parquet files")
    test_path: Text | Texts | None = neutral("test set; null: the data set's own, or some articles")
    config: Text | None = key("configuration of a hub data set that has several", default=None)
    split_by: Literal["article", "paragraph", "question", "nothing"] = key(
        "what train and validation do not share, by paragraph where articles are too few; nothing: "
        "these and the test are the same questions"
    )
    draw_by: Literal["question", "paragraph"] = key(
        "draw and shuffle training questions one by one, or all questions of a paragraph together"
    )
    split_seed: Whole = key("seed of the splits; the same for all runs of a study")
    train_size: Count | None = key("training questions; null: all")
    validation_size: Count | None = key("validation questions, by paragraph; null: all")
    test_size: Count | None = key("test questions, by paragraph; null: all")
    validation_articles: Fraction = key("share of the articles held out for validation")
    test_articles: Fraction = key("share of the articles held out if there is no test set")
    unanswerable: Literal["refuse", "drop"] = key(
        "questions without an answer (SQuAD v2.0), or blank ones"
    )
    misaligned: Literal["refuse", "repair"] = key("answers that are not at their answer_start")
    overlap: Literal["refuse", "drop"] = key(
        "questions to train on that the test set has too", default="refuse"
    )


class OptimizerConfig(_Section):
    """An optimizer of torch and its arguments; it checks those that are not listed."""

    model_config = ConfigDict(extra="allow")

    target: Target = Field(alias="_target_", description="class of the optimizer; lr is its lr")
    weight_decay: NonNegative = key("weight decay", default=None)
    betas: Annotated[
        list[Probability], Field(min_length=2, max_length=2), "two numbers from 0 to below 1"
    ] = key("decay rates of Adam's two moments", default=None)
    eps: Positive = key("added to Adam's denominator", default=None)
    fused: bool = key("update all weights in one kernel (never with 16-mixed)", default=None)


class SchedulerConfig(_Section):
    """A learning-rate schedule and its arguments; it checks those that are not listed."""

    model_config = ConfigDict(extra="allow")

    target: Target = Field(
        alias="_target_", description="schedule of transformers or torch, advanced at every step"
    )
    num_warmup_steps: Whole = key("steps in which the learning rate rises from zero", default=None)


class TrainerConfig(_Section):
    """Arguments of Lightning's Trainer; others can be added, and Lightning checks them."""

    model_config = ConfigDict(extra="allow")

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = key("hardware to compute on")
    devices: Any = key("number of devices, or which ones; they share the questions of each step")
    num_nodes: Count = key("machines; start the command on each of them")
    # fsdp, which splits the weights over devices, needs checkpoints of another kind.
    strategy: Literal["auto", "ddp"] = key(
        "how several devices work together: ddp gives each the whole model; auto is ddp too"
    )
    precision: Annotated[str, BeforeValidator(str), ""] = key(
        "32-true, bf16-mixed, ...; auto: bf16-mixed where the hardware is fast at it, else 32-true"
    )
    max_epochs: Count = key("epochs")
    accumulate_grad_batches: Count = key("micro-batches of a step; more of them save memory")
    gradient_clip_val: Positive | None = key("largest norm of the gradient")
    log_every_n_steps: Count = neutral("steps between two points in TensorBoard")
    enable_progress_bar: bool = neutral("show progress bars")
    deterministic: bool = key("use deterministic kernels only (GPU)")


class AdapterConfig(_Section):
    """A PEFT configuration class and its arguments; PEFT checks those that are not listed."""

    model_config = ConfigDict(extra="allow")

    target: PeftClass = Field(alias="_target_", description="PEFT's configuration class")
    r: Count = key("= rank", default=None)
    lora_alpha: Positive = key("the update is scaled by lora_alpha / r", default=None)
    lora_dropout: Probability = key("dropout of the adapter's inputs", default=None)
    target_modules: Texts | Text = key("names of the layers that get an adapter", default=None)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the PEFT configuration class, those alone that were given."""
        return self.model_dump(exclude_unset=True, exclude={"target"})


class Config(_Section):
    """The whole configuration of a run."""

    mode: Name = key("the arm: a file of conf/mode/, such as lora or full")
    label: Text = neutral("name of the arm in tables and figures")
    lr: Positive = key("peak learning rate; each mode brings its own")
    lr_by_mode: dict[str, Positive] | None = neutral(
        "learning rates by mode: a mode's own, and those of a preset for several", default=None
    )
    rank: Count | None = key("rank r of the adapter; null without one")
    seed: Whole = key("of initialization, order, dropout and the draw of the training questions")
    batch_size: Count = key("questions per optimizer step")
    eval_batch_size: Count = key("questions answered at once")
    max_length: Count = key("tokens of prompt and answer; a longer context is shortened")
    max_new_tokens: Count = key("largest number of tokens of a generated answer")
    packing: bool = key("questions share their context in one sequence, in training and evaluation")
    packed_length: Count = key("tokens of a context with its questions; more repeat the context")
    # Runs from before these keys were as their defaults.
    cuda_graphs: bool = neutral(
        "on a GPU replay recorded steps: faster where they are small", default=True
    )
    matmul_precision: Literal["highest", "high", "medium"] = key(
        "products in float32; high: TF32 on a GPU, faster and less exact", default="highest"
    )
    prompt: PromptText = key(
        "text of prompt and answer, \\n a new line; chat: the tokenizer's own chat template",
        default=template.DEFAULT,
    )
    mask_prompt: bool = key("loss on answer and end-of-text only; false: on every token")
    scoring: Scoring = key(
        "rules of exact match and F1: SQuAD's, or those of MLQA for a language", default="squad"
    )
    metrics: Metrics = key("metrics of an answer, percent", default=REQUIRED)
    resume: Text | None = neutral("folder of an interrupted run to resume")
    checkpoint_minutes: Positive = neutral(
        "minutes between checkpoints: the work that a kill can cost"
    )
    run_name: Name = neutral("name of the run's folder")
    init_from: Text | None = neutral(
        "finished run or adapter folder: training starts from its weights", default=None
    )
    study: Name | None = neutral(
        "name of a sweep's folder in output_dir; the same sweep again runs only what is missing"
    )
    output_dir: Text = neutral("folder of the run folders")
    cache_dir: Text = neutral("folder of tokenized data and of scores before training")
    frozen_dtype: Literal["auto", "float32"] | None = key(
        "dtype of frozen weights; auto: what trainer.precision rounds them to anyway"
    )
    adapter: AdapterConfig | None
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    trainer: TrainerConfig
    logger: Plugins = neutral("loggers beside metrics.csv: files of conf/logger/")
    callbacks: Plugins = key("Lightning callbacks: files of conf/callbacks/")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as conf/ has them."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def flat(self) -> dict[str, Any]:
        """Values by dotted key; a mapping that changes no result is one value."""
        return flat(self.to_dict(), RESULT_NEUTRAL)

    def with_precision(self, precision: str) -> "Config":
        """Give the same configuration with the precision that `auto` stands for here."""
        trainer = self.trainer.model_copy(update={"precision": precision})
        return self.model_copy(update={"trainer": trainer})

    def with_layers(self, layers: list[str] | str, settings: dict[str, Any]) -> "Config":
        """Give the same configuration with the layers that `auto` stands for.

        Args:
            layers: These layers, as PEFT's `target_modules`.
            settings: All values of the model's own configuration that the run sets.
        """

        def filled(section: Any) -> Any:
            found = getattr(section, "target_modules", None) == AUTO
            return section.model_copy(update={"target_modules": layers}) if found else section

        model = filled(self.model).model_copy(update={"config": settings})
        return self.model_copy(update={"model": model, "adapter": filled(self.adapter)})


_QUESTIONS = "Fewer questions: data.train_size, data.validation_size, data.test_size."
_EPOCHS = "Shorter: trainer.max_epochs, data.train_size, or callbacks=early_stopping."
_EACH_EPOCH = "A run validates after each epoch: data.train_size sets how long one is."
# Arguments of Lightning's Trainer that a run sets itself, or with which an epoch, a validation or
# the test would leave out questions; and what there is instead.
RESERVED = {
    "logger": "Loggers: logger=csv, logger=wandb, logger=[tensorboard,wandb].",
    "callbacks": "Callbacks: callbacks=early_stopping, +callbacks.<name>._target_=<class>.",
    "profiler": "A profile: debug=profile.",
    "fast_dev_run": "A quick trial: debug=fast.",
    "overfit_batches": "One batch learned by heart: debug=overfit.",
    "default_root_dir": "Folders: output_dir, hydra.run.dir.",
    "enable_checkpointing": "It saves every checkpoint_minutes, and exports the best epoch.",
    "limit_train_batches": _QUESTIONS,
    "limit_val_batches": _QUESTIONS,
    "limit_test_batches": _QUESTIONS,
    "limit_predict_batches": _QUESTIONS,
    "max_steps": _EPOCHS,
    "max_time": _EPOCHS,
    "min_steps": _EPOCHS,
    "min_epochs": _EPOCHS,
    "val_check_interval": _EACH_EPOCH,
    "check_val_every_n_epoch": _EACH_EPOCH,
    "reload_dataloaders_every_n_epochs": "The order of each epoch is drawn from seed.",
    "use_distributed_sampler": "trainer.devices shares each step's questions.",
    "num_sanity_val_steps": "Scoring before training tries all of it.",
    "enable_model_summary": "The table at the start has the numbers of weights.",
    "plugins": "Precision: trainer.precision.",
    "barebones": "A quick trial: debug=fast.",
}
GROUPS = (
    "mode", "model", "data", "optimizer", "scheduler", "trainer", "logger", "callbacks",
    "experiment", "debug",
)  # fmt: skip
PLUGINS = ("optimizer", "scheduler", "logger", "callbacks")  # groups of what `_target_` names
AUTO = "auto"  # of target_modules
ADAPTER_KEYS = ("rank", "frozen_dtype")  # null in a mode that has no use for them
REFUSED = frozenset({"adapter.r"})  # keys of conf/ that others set


def unused(values: Mapping[str, Any]) -> list[str]:
    """Give those of ADAPTER_KEYS that the mode of these nested values has no use for."""
    adapter = values.get("adapter")
    if adapter is None:
        return list(ADAPTER_KEYS)
    return [] if "r" in adapter else ["rank"]


def _fields(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Fields by dotted key, sections taken apart."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        name = prefix + (field.alias or name)
        parts = (field.annotation, *get_args(field.annotation))
        nested = next((part for part in parts if isinstance(part, type(BaseModel))), None)
        found |= _fields(nested, f"{name}.") if nested else {name: field}
    return found


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What an annotation accepts, in words; nothing where another library decides."""
    for item in metadata:
        if isinstance(item, str):
            return item
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], arguments[1:])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    return {bool: "true or false", type(None): "null"}.get(annotation, "")


FIELDS = _fields(Config)
VALID = sorted({*FIELDS, *GROUPS} - REFUSED)  # what can be given on a command line
ACCEPTS = {name: _words(field.annotation, field.metadata) for name, field in FIELDS.items()}
RESULT_NEUTRAL = frozenset(  # keys that change no result
    name
    for name, field in FIELDS.items()
    if isinstance(field.json_schema_extra, dict) and not field.json_schema_extra["changes_result"]
)


def is_neutral(key: str) -> bool:
    """Whether a dotted key, or the section that it is in, changes no result."""
    return not RESULT_NEUTRAL.isdisjoint((key, key.partition(".")[0]))


# What runs did before these keys were.
_TENSORBOARD = {
    "_target_": "lora_or_full.training.loggers.TrainingCurves",
    "name": "",
    "version": "tb",
    "default_hp_metric": False,
}


def as_now(saved: Any) -> Any:
    """Give the saved values of a run with the keys of now, which mean what the older ones meant."""
    optimizer = saved.get("optimizer") if isinstance(saved, Mapping) else None
    if not isinstance(optimizer, Mapping) or "warmup_steps" not in optimizer:
        return saved
    rest = {name: value for name, value in optimizer.items() if name != "warmup_steps"}
    return {
        **saved,
        "optimizer": {"_target_": "torch.optim.AdamW", "fused": True, **rest},
        "scheduler": {
            "_target_": "transformers.get_linear_schedule_with_warmup",
            "num_warmup_steps": optimizer["warmup_steps"],
        },
        "logger": {"tensorboard": _TENSORBOARD},
        "callbacks": {},
    }


def validate(values: Mapping[str, Any]) -> Config:
    """Give nested values, as conf/ has them, as the typed configuration.

    Raises:
        UserError: One line for each problem: the key, its value, and what is accepted.
    """
    given = flat(values, FIELDS)
    config: Config | None = None
    problems: list[str] = []
    missing: list[str] = []
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for one in error.errors():
            name = _key_of(one["loc"])
            if one["type"] == "extra_forbidden":
                within = (k for k in given if k.startswith(f"{name}."))
                raise unknown(next(within, name), VALID) from None
            if one["type"] == "missing":
                missing.append(name)
            else:
                accepted = ACCEPTS.get(name, "a group of keys")
                shown = str(given.get(name)).replace("\n", "\\n")
                problems.append(f"{name}={shown}: must be {accepted}.")
    if missing:
        raise UserError(f"These keys can't be left out: {', '.join(missing)}.")
    problems += _conflicts(given, values.get("trainer"))
    if problems or config is None:
        raise UserError("\n".join(dict.fromkeys(problems)))  # a union has one for each of its types
    return config


def _key_of(location: tuple[int | str, ...]) -> str:
    """The dotted key of an error's location, which may lead on into a list or a union."""
    names = [str(part) for part in location]
    starts = (".".join(names[:stop]) for stop in range(len(names), 0, -1))
    return next((start for start in starts if start in FIELDS), ".".join(names))


def _conflicts(given: Mapping[str, Any], trainer: Any) -> list[str]:
    """Problems of keys that do not fit together, and of further arguments of the Trainer."""
    mode, rank, r = given.get("mode"), given.get("rank"), given.get("adapter.r")
    problems = []
    if "adapter" in given:  # null: a section with keys is taken apart
        problems += [
            f"{name}={given[name]}: mode={mode} has no {name}, since it has no adapter."
            for name in ADAPTER_KEYS
            if given.get(name) is not None
        ]
    elif "adapter.r" not in given:
        if rank is not None:
            problems.append(f"rank={rank}: the adapter of mode={mode} has no rank.")
    elif rank is None:
        problems.append(f"rank=null: mode={mode} needs a rank.")
    elif r != rank:
        problems.append(f"adapter.r={r}: rank={rank} sets it; leave it out.")
    for name, value in trainer.items() if isinstance(trainer, Mapping) else ():
        if name in RESERVED:
            problems.append(f"trainer.{name}: a run sets this itself. {RESERVED[name]}")
        elif f"trainer.{name}" not in FIELDS and isinstance(value, (list, Mapping)):
            # Lightning's further arguments that take more than one value take an object.
            problems.append(f"trainer.{name}={value}: must be one word or number.")
    if "optimizer.lr" in given:
        problems.append(f"optimizer.lr={given['optimizer.lr']}: lr sets it; leave it out.")
    problems += [
        f"{name}={given[name]}: there is no such key; it is {HABITS[name]}."
        for name in given.keys() & HABITS.keys()
    ]
    size, micro_batches = given.get("batch_size"), given.get("trainer.accumulate_grad_batches")
    if isinstance(size, int) and isinstance(micro_batches, int) and micro_batches > size > 0:
        problems.append(
            f"trainer.accumulate_grad_batches={micro_batches}: a step of batch_size={size} "
            "questions can't be computed in more micro-batches."
        )
    return problems


def explained(values: Mapping[str, Any]) -> list[str]:
    """Give for each key its default in `values` and its meaning, as lines of help."""
    given, lines = flat(values, FIELDS), []
    for name, field in FIELDS.items():
        if name in given:
            words = f" ({ACCEPTS[name]})" if ACCEPTS[name] else ""
            lines += [f"  {name}={typed(given[name])}", f"        {field.description}{words}"]
    return lines


def flat(values: Mapping[str, Any], leaves: Container[str] = ()) -> dict[str, Any]:
    """Give nested values by dotted key; mappings at the keys `leaves` stay whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in leaves:
            found |= flat({f"{name}.{inner}": item for inner, item in value.items()}, leaves)
        else:
            found[name] = value
    return found


def typed(value: Any) -> str:
    """Give a value as it is typed on the command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{typed(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(typed, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value).replace("\n", "\\n")
    # Braces without quotes are a mapping to Hydra.
    return "'" + text.replace("'", "\\'") + "'" if not text or "{" in text else text
