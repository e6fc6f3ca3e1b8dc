"""The record of a run (results.json) and of its answers (predictions.jsonl), typed."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict

from lora_or_full.config.schema import Config, as_now
from lora_or_full.config.template import DEFAULT

LARGEST = 10**18  # beyond what any run counts or measures, and far from where sums overflow


def _zero_or_all(value: float) -> float:
    if value not in (0.0, 100.0):
        raise ValueError("must be 0 or 100")
    return value


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100 + 1e-3)]  # a mean in float32 may exceed 100
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Interval = Annotated[tuple[Percent, Percent], Field(strict=False)]
Match = Annotated[float, AfterValidator(_zero_or_all)]
STRICT = ConfigDict(strict=True, frozen=True, protected_namespaces=())


class _Part(BaseModel):
    model_config = STRICT


class Split(_Part):
    """Counts of a split, and the fingerprint of its questions."""

    questions: Count
    paragraphs: Count
    articles: Count
    fingerprint: str
    split_by: str | None = None  # what train and validation do not share; older runs: data.split_by


class Data(_Part):
    """The splits, and the fingerprint of the files that they come from."""

    source: str
    train: Split
    validation: Split
    test: Split


class BaseModelFacts(_Part):
    """The model before training."""

    name: str
    type: str
    fingerprint: str
    dtype: str = "float32"  # of the weights in their file; runs from before it say nothing
    first_weights: str | None = None  # fingerprint of those that init_from names
    shares_context: bool
    prompt: str = DEFAULT  # as a template; a chat's with its special tokens
    special_tokens: bool = False  # whether the prompt holds some
    sliding_window: Whole | None = None  # tokens that some layers see at once


class Parameters(_Part):
    """Numbers of weights; `percent` of them are trainable."""

    trainable: Count
    total: Count
    percent: Percent


class Epoch(_Part):
    """Losses (nats per answer token) and validation scores (percent) of an epoch.

    Further metrics stand beside exact_match and f1.
    """

    model_config = STRICT | ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]

    epoch: Count
    train_loss: Number
    validation_loss: Number
    exact_match: Percent
    f1: Percent


def metric_names(scores: Collection[str]) -> list[str]:
    """Give the names of the metrics among the keys of scores: those that have an interval."""
    return [name for name in scores if f"{name}_interval" in scores]


class Scores(_Part):
    """Mean scores (percent) with 95 % intervals over paragraphs.

    Further metrics stand beside exact_match and f1.
    """

    model_config = STRICT | ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Percent | Interval]

    questions: Count
    exact_match: Percent
    exact_match_interval: Interval
    f1: Percent
    f1_interval: Interval

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return metric_names([*type(self).model_fields, *(self.model_extra or {})])


class StepProfile(_Part):
    """Memory (bytes) and operations of one training step."""

    weights_bytes: Whole
    gradients_bytes: Whole
    optimizer_bytes: Whole
    activations_bytes: Whole
    forward_operations: Count
    backward_operations: Whole
    questions: Count
    tokens: Whole


class PeakMemory(_Part):
    """Peak memory (bytes) by phase."""

    train: Whole
    evaluation: Whole


class Cost(_Part):
    """Time (seconds), rates and memory (bytes) of a run."""

    samples: Whole
    tokens: Whole
    train_seconds: NonNegative
    validation_seconds: NonNegative
    session_seconds: NonNegative
    seconds_per_batch: NonNegative
    samples_per_second: NonNegative
    tokens_per_second: NonNegative
    peak_memory_bytes: PeakMemory
    reserved_bytes: Whole = 0  # on CUDA, with what torch keeps for later; older runs do not say
    peak_memory_is: str
    imports_bytes: Whole
    exported_bytes: Whole
    step: StepProfile


class Environment(_Part):
    """Where the numbers come from."""

    device: str
    machine: str
    cores: Count
    python: str
    packages: dict[str, str]
    commit: str | None


class RunRecord(_Part):
    """What results.json holds."""

    config: Annotated[Config, BeforeValidator(as_now)]
    data: Data
    model: BaseModelFacts
    parameters: Parameters
    shapes: dict[str, list[Count]]
    epochs: Annotated[list[Epoch], Field(min_length=1)]
    best_epoch: Count
    before: Scores
    test: Scores
    cost: Cost
    exported: Literal["adapter", "model"]
    environment: Environment

    @model_validator(mode="after")
    def _epochs_are_numbered(self) -> "RunRecord":
        if [one.epoch for one in self.epochs] != list(range(1, len(self.epochs) + 1)):
            raise ValueError("epochs are not numbered from 1")
        if self.best_epoch > len(self.epochs):
            raise ValueError("best_epoch names no epoch")
        return self

    @property
    def best(self) -> Epoch:
        """The epoch that was chosen on the validation questions, and scored on the test."""
        return self.epochs[self.best_epoch - 1]


class TestSet(_Part):
    """The questions of an evaluation on another test set."""

    test: Split
    trained_on: Whole | None


class EvaluatedModel(_Part):
    """A model that is of no run: its name, the fingerprint and number of its weights."""

    name: str
    fingerprint: str
    weights: Count


class EvaluationRecord(_Part):
    """The results.json of an evaluation: the scores of a run (`model` is None) or another model."""

    name: str
    model: EvaluatedModel | None = None
    shots: Whole = 0  # answered examples before each question
    seed: int | None = None  # that drew them
    scoring: str = "squad"  # older records are by no other rules
    data: TestSet
    test: Scores


@with_config(STRICT)
class Prediction(TypedDict, extra_items=Percent):  # type: ignore[call-arg]  # new to mypy
    """A line of predictions.jsonl: an answered question and its scores (percent).

    `paragraph` is the number of its context in contexts.json. `log_probability` (natural logarithm,
    end token included) is None if the prompt was too long to be answered. Further
    metrics stand beside exact_match and f1.
    """

    id: Text
    title: Text
    paragraph: Whole
    question: Text
    answers: Annotated[list[Text], Field(min_length=1)]
    prediction: Text
    log_probability: Number | None
    ended: bool
    context_cut: bool
    exact_match: Match
    f1: Percent
