"""The card of an exported model: what it is and what it can't do, from its run's record."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from lora_or_full.config.schema import Config
from lora_or_full.evaluation.spans import spans
from lora_or_full.runs.reader import Answers
from lora_or_full.runs.schema import EvaluationRecord, RunRecord

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# As the hub states them, November 2026.
LICENCES = {
    "gpt2": "MIT",
    "openai-community/gpt2": "MIT",
    "gpt2-medium": "MIT",
    "distilgpt2": "Apache 2.0",
    "HuggingFaceTB/SmolLM2-135M": "Apache 2.0",
    "rajpurkar/squad": "CC BY-SA 4.0",
}
OWN = ("assets/model", "assets/data/train.json", "assets/data/dev.json")  # this project's, MIT
FILES = (".json", ".parquet")


def card(
    run: str,
    name: str,
    record: RunRecord,
    answers: Answers,
    evaluations: Sequence[EvaluationRecord],
    merged: bool,
) -> str:
    """Write the model card.

    Args:
        run: Name of the run.
        name: Folder or hub id under which the export will be found.
        record: The run's record.
        answers: The run's answers to its test questions.
        evaluations: Its scores on other test sets.
        merged: Whether the adapter was folded into the model.

    Returns:
        The card in Markdown.
    """
    config, predictions = record.config, answers.predictions
    adapter = record.exported == "adapter" and not merged
    base, data = config.model.name, _paths(config)
    test = shown(data[-1])
    arguments = config.adapter.arguments() if config.adapter else {}
    rank = "" if config.rank is None else f" of rank {config.rank}"
    arm = f"{config.label}{rank}" if config.adapter else "fully fine-tuned"
    title = f"{shown(base)}, {arm}, on {shown(data[0])}"
    metadata = ModelCardData(
        base_model=hub_id(base),
        datasets=[path for path in data if hub_id(path)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["question-answering", *([config.mode] if config.adapter else [])],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="question-answering",
                dataset_type=hub_id(data[-1]) or "squad",
                dataset_name=f"{test}, test questions",
                metric_type=metric,
                metric_value=round(value, 2),
            )
            for metric, value in (
                ("exact_match", record.test.exact_match),
                ("f1", record.test.f1),
            )
        ],
    )
    return str(
        ModelCard.from_template(
            metadata,
            template_path=str(TEMPLATE),
            title=title,
            kind="adapter" if adapter else "merged" if merged else "model",
            arm=arm,
            base=shown(base),
            local_base=not hub_id(base),
            run=run,
            name=name,
            record=record,
            config=config,
            adapter={key: value for key, value in arguments.items() if key != "r"},
            interval=lambda mean, ends: f"{mean:.1f} [{ends[0]:.1f}, {ends[1]:.1f}]",
            test_sets=[
                (f"{test}, test questions", record.test),
                ("the same, before fine-tuning", record.before),
                *((other.name, other.test) for other in evaluations),
            ],
            splits={
                "train": record.data.train,
                "validation": record.data.validation,
                "test": record.data.test,
            },
            count=len(predictions),
            elsewhere=sum(
                bool(p["prediction"])
                and not spans(p["prediction"], answers.contexts[str(p["paragraph"])])
                for p in predictions
            ),
            endless=sum(not p["ended"] for p in predictions),
            cut=sum(p["context_cut"] for p in predictions),
            data_names=", ".join(dict.fromkeys(map(shown, data))),
            licences={f"base model {shown(base)}": _licence(base)}
            | {f"data {shown(path)}": _licence(path) for path in data},
        )
    )


def hub_id(name: str) -> str | None:
    """Give `name` if it can be a hub id and is no local folder or file."""
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    return None if local or "\\" in name or name.endswith(FILES) else name


def shown(name: str) -> str:
    """A name that does not depend on the machine."""
    if any(name.endswith(f"/{own}") for own in OWN):
        return f"lora-or-full's built-in {'model' if name.endswith('model') else 'data'}"
    return hub_id(name) or Path(name).name


def _paths(config: Config) -> list[str]:
    """Where training and test questions came from."""
    paths: list[str] = []
    for path in (config.data.path, config.data.test_path):
        paths += [path] if isinstance(path, str) else path or []
    return paths


def _licence(name: str) -> str:
    if any(name.endswith(f"/{own}") for own in OWN):
        return "MIT"
    if name in LICENCES:
        return LICENCES[name]
    file = Path(name) / "README.md"
    if file.is_file() and (stated := (metadata_load(file) or {}).get("license")):
        return f"{stated}, as its card says"
    return "not known here; ask whoever published it before you hand this on"
