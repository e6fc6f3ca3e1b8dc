"""The model card of an export: recipe, scores and limits, from the run's record."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from lora_or_full.config.template import parse
from lora_or_full.evaluation.metrics import labels
from lora_or_full.evaluation.scoring import rules
from lora_or_full.evaluation.spans import spans
from lora_or_full.runs.reader import read_answers, read_record
from lora_or_full.runs.schema import EvaluationRecord, RunRecord

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
OWN = ("/assets/model", "/assets/data/train.json", "/assets/data/dev.json")  # this project's, MIT
FILES = (".json", ".parquet")


def card(folder: Path, name: str, record: RunRecord, merged: bool) -> str:
    """Write the model card of a run, as Markdown.

    Args:
        folder: The run's folder.
        name: Folder or hub id that the card's code loads.
        record: The run's record.
        merged: Whether the adapter was folded into its base model.

    Raises:
        UserError: The run's answers or evaluations can't be read.
    """
    config, test = record.config, record.test
    predictions, contexts = read_answers(folder)
    adapter = record.exported == "adapter" and not merged
    base = config.model.name
    data = [
        path
        for paths in (config.data.path, config.data.test_path)
        for path in ([paths] if isinstance(paths, str) else paths or [])
    ]
    rank = "" if config.rank is None else f" of rank {config.rank}"
    arm = f"{config.label}{rank}" if config.adapter else "fully fine-tuned"
    title = f"{shown(base)}, {arm}, on {shown(data[0])}"
    test_set = f"{shown(data[-1])}, test questions"
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
                dataset_name=test_set,
                metric_type=metric,
                metric_value=round(getattr(test, metric), 2),
            )
            for metric in test.metrics
        ],
    )
    prompt = parse(record.model.prompt).filled("{context.strip()}", "{question.strip()}")
    filled = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=title,
        kind="adapter" if adapter else "merged" if merged else "model",
        arm=arm,
        base=shown(base),
        local_base=not hub_id(base),
        run=folder.resolve().name,
        name=name,
        record=record,
        test_set=test_set,
        rules=rules(config.scoring),
        metrics=labels(test.metrics),
        prompt=f"f{json.dumps(prompt, ensure_ascii=False)}",
        evaluations=[
            read_record(file.parent, EvaluationRecord)
            for file in sorted(folder.glob("evaluations/*/results.json"))
        ],
        predictions=predictions,
        not_in_context=sum(
            bool(p["prediction"]) and not spans(p["prediction"], contexts[str(p["paragraph"])])
            for p in predictions
        ),
        data_names=dict.fromkeys(map(shown, data)),
        sources={f"base model {shown(base)}": base}
        | {f"data {shown(path)}": path for path in data},
        own=OWN,
        stated_licence=_stated_licence,
    )
    return str(filled)


def hub_id(name: str) -> str | None:
    """Give `name` if it can be a hub id and is no local folder or file."""
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    return None if local or "\\" in name or name.endswith(FILES) else name


def shown(name: str) -> str:
    """Name a model or data set without the paths of this machine."""
    if name.endswith(OWN):
        return f"lora-or-full's built-in {'model' if name.endswith('model') else 'data'}"
    return hub_id(name) or Path(name).name


def _stated_licence(name: str) -> str | None:
    """The licence that the card in a folder states."""
    file = Path(name) / "README.md"
    return (metadata_load(file) or {}).get("license") if file.is_file() else None
