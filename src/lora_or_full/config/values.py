"""What the keys of conf/ accept, each with its words for help and refusals."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from lora_or_full.config import template


def _text(value: Any) -> str:
    # Not by pydantic's own type, which refuses paths that are no UTF-8.
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return value


def _name(value: Any) -> str:
    # It becomes part of a path and has to stay in its folder; systems take 255 bytes.
    name = "" if value is None or isinstance(value, (bool, list, dict)) else str(value)
    if not re.fullmatch(r"[\w+-][\w.+-]*", name) or len(os.fsencode(name)) > 200:
        raise ValueError
    return name


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    text = value.replace("\\n", "\n")  # as it is typed on a command line
    if text != template.CHAT:
        template.parse(text)
    return text


def _metrics(value: Any) -> list[str]:
    known = [file.stem for folder in METRICS for file in folder.glob("[a-z]*.py")]
    if not isinstance(value, list) or value[:2] != REQUIRED or len(set(value)) < len(value):
        raise ValueError
    if not set(value) <= set(known):
        raise ValueError
    return value


REQUIRED = ["exact_match", "f1"]  # what epochs and configurations are chosen by, and compared
METRICS = [Path(__file__).parents[1] / "evaluation" / "metrics"]  # a file per metric
# A text in an annotation is what the type accepts, in the words of help and refusals.
Count = Annotated[int, Field(ge=1), "a whole number from 1"]
Whole = Annotated[int, Field(ge=0, lt=2**63), "a whole number from 0"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), "a number above 0"]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), "a number from 0"]
Probability = Annotated[float, Field(ge=0, lt=1), "a number from 0 to below 1"]
Fraction = Annotated[float, Field(gt=0, lt=1), "a number between 0 and 1"]
Text = Annotated[str, PlainValidator(_text), "a text"]
Texts = Annotated[list[Text], Field(min_length=1), "a list of texts"]
Name = Annotated[
    str, PlainValidator(_name), "a name of letters, digits, -, _, + and ., up to 200 bytes"
]
Scoring = Annotated[
    str,
    Field(pattern=r"^(squad|mlqa-[a-z]{2,3})$"),
    "squad, or mlqa- and the code of a language, such as mlqa-zh",
]
Metrics = Annotated[
    list[str],
    PlainValidator(_metrics),
    "a list: exact_match, f1, then any other file of evaluation/metrics/, such as rouge_l",
]
Target = Annotated[
    str,
    Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)+$"),
    "a Python name with its module, such as torch.optim.SGD",
]
PromptText = Annotated[
    str,
    PlainValidator(_prompt),
    "a text with {context}, {question} and, at its end, {answer}, each once; or chat",
]
PeftClass = Annotated[
    str,
    Field(pattern=r"^peft\.\w+Config$"),
    "the name of a PEFT configuration class, such as peft.LoraConfig",
]


def _plugins(value: Any) -> dict[str, Any]:
    # By name; `~callbacks.<name>` takes one out.
    if not isinstance(value, dict) or not all(
        isinstance(one, dict) and isinstance(one.get("_target_"), str) for one in value.values()
    ):
        raise ValueError
    return value


Plugins = Annotated[
    dict[str, Any], PlainValidator(_plugins), "names, each with the _target_ of a class"
]
