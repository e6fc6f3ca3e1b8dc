"""The card of a model that is handed on: what it is and what it can't do, from its run's record."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from lora_or_full.evaluation.spans import spans

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
Record = Mapping[str, Any]

CARD = """\
---
{metadata}
---

# {title}

{kind} It answers a question with words of a context that is given with it. Predictor and scored by
the run `{run}` of the project lora-or-full; all numbers are from that run's record.

## Use

```python
{code}
```

The prompt is `Context: …`, `Question: …` and `Answer:`, a line each, texts without white space at
their ends. An answer ends with the end-of-text token or a newline; the scores below are of greedy
answers of at most {max_new_tokens} tokens.

## Scores

Percent, by SQuAD v1.1's rules against all gold answers, with 95 % intervals over paragraphs. They
are of one training run; another seed gives other numbers.

| test set | questions | EM | F1 |
|---|---:|---:|---:|
{scores}

## Recipe

{recipe}

## Limits

{limits}

## Data

{data}

## Licences

{licences}

## Origin

{origin}
"""

IMPORTS = {
    "adapter": "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
    "model": "from transformers import AutoModelForCausalLM, AutoTokenizer",
}
CODE = """\
{imports}

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = {auto}.from_pretrained(name)
context, question = "{context}", "{question}"
prompt = f"Context: {{context.strip()}}\\nQuestion: {{question.strip()}}\\nAnswer:"
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False, pad_token_id=0)
text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
answer = text.lstrip(" ").split("\\n")[0].strip()"""


def card(
    run: str,
    name: str,
    results: Record,
    predictions: Sequence[Record],
    contexts: Mapping[str, str],
    evaluations: Sequence[Record],
    merged: bool,
) -> str:
    """The card, in Markdown, of what the `run` has trained, to be found under `name`.

    `evaluations` are the records of its scores on other test sets, `merged` says that LoRA was
    folded into the model.
    """
    config = results["config"]
    adapter = results["exported"] == "adapter" and not merged
    base, data = str(config["model"]["name"]), _paths(config)
    title = f"{shown(base)}, {_mode(config)}, on {shown(data[0])}"
    metadata = ModelCardData(
        base_model=hub_id(base),
        datasets=[path for path in data if hub_id(path)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["question-answering", *(["lora"] if config["mode"] == "lora" else [])],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="question-answering",
                dataset_type=hub_id(data[-1]) or "squad",
                dataset_name=f"{shown(data[-1])}, test questions",
                metric_type=metric,
                metric_value=round(results["test"][metric], 2),
            )
            for metric in ("exact_match", "f1")
        ],
    )
    kinds = {
        "adapter": f"A LoRA adapter for {shown(base)}: not a model by itself.",
        "merged": f"{shown(base)}, with a LoRA adapter folded into its weights.",
        "model": f"{shown(base)}, all of it fine-tuned.",
    }
    return CARD.format(
        metadata=metadata.to_yaml(),
        title=title,
        kind=kinds["adapter" if adapter else "merged" if merged else "model"],
        run=run,
        code=CODE.format(
            imports=IMPORTS["adapter" if adapter else "model"],
            auto="AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM",
            name=json.dumps(name),
            context="In 1820 Ada Byron founded the town of Elms.",
            question="Who founded Elms?",
            max_new_tokens=config["max_new_tokens"],
        ),
        max_new_tokens=config["max_new_tokens"],
        scores="\n".join(_scores(results, evaluations, shown(data[-1]))),
        recipe=_points(_recipe(results)),
        limits=_points(_limits(results, predictions, contexts)),
        data=_points(_data(results, data)),
        licences=_points(_licences(base, data)),
        origin=_points(_origin(results, base, adapter)),
    )


def hub_id(name: str) -> str | None:
    """`name`, if it can be a hub id and is no local folder or file."""
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    return None if local or "\\" in name or name.endswith(FILES) else name


def shown(name: str) -> str:
    """A name that does not depend on the machine."""
    if any(name.endswith(f"/{own}") for own in OWN):
        return f"lora-or-full's built-in {'model' if name.endswith('model') else 'data'}"
    return hub_id(name) or Path(name).name


def _paths(config: Record) -> list[str]:
    """Where training and test questions came from."""
    paths: list[str] = []
    for path in (config["data"]["path"], config["data"]["test_path"]):
        paths += [path] if isinstance(path, str) else path or []
    return paths


def _mode(config: Record) -> str:
    return f"LoRA of rank {config['rank']}" if config["mode"] == "lora" else "fully fine-tuned"


def _scores(results: Record, evaluations: Sequence[Record], test: str) -> list[str]:
    def row(name: str, scores: Record) -> str:
        cells = [
            f"{scores[metric]:.1f} [{low:.1f}, {high:.1f}]"
            for metric in ("exact_match", "f1")
            for low, high in (scores[f"{metric}_interval"],)
        ]
        return f"| {name} | {scores['questions']:,} | {' | '.join(cells)} |"

    return [
        row(f"{test}, test questions", results["test"]),
        row("the same, before fine-tuning", results["before"]),
        *(row(other["name"], other["test"]) for other in evaluations),
    ]


def _recipe(results: Record) -> list[str]:
    config, size = results["config"], results["parameters"]
    lora = config["lora"]
    return [
        f"{_mode(config)}: {size['trainable']:,} of {size['total']:,} parameters trained "
        f"({size['percent']:.4g} %)",
        *(
            [f"LoRA alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}, on "
             f"{', '.join(lora['target_modules'])}"]
            if lora and not isinstance(lora["target_modules"], str) else []
        ),
        f"AdamW, learning rate {config['lr']:g} falling linearly to zero, "
        f"{config['batch_size']} questions a step, {len(results['epochs'])} epochs, of which "
        f"number {results['best_epoch']} had the highest validation F1 and is this one",
        "loss on " + ("the answers only" if config["mask_prompt"] else "all tokens"),
        f"precision {config['trainer']['precision']}, seed {config['seed']}",
    ]  # fmt: skip


def _limits(
    results: Record, predictions: Sequence[Record], contexts: Mapping[str, str]
) -> list[str]:
    config, count = results["config"], len(predictions)
    elsewhere = sum(
        bool(p["prediction"]) and not spans(p["prediction"], contexts[str(p["paragraph"])])
        for p in predictions
    )
    endless, cut = (
        sum(not p["ended"] for p in predictions), sum(p["context_cut"] for p in predictions)
    )  # fmt: skip
    return [
        "It always answers: no question without an answer was trained on.",
        f"It writes its answers, and may write what is not in the context: {elsewhere:,} of its "
        f"{count:,} answers to the test questions do not stand there.",
        f"{endless:,} of these answers did not end within {config['max_new_tokens']} tokens.",
        f"Prompt and answer have at most {config['max_length']} tokens; a longer context was "
        f"shortened from its end ({cut:,} of the {count:,} test questions).",
        "Texts unlike the data below were not tried, nor other languages, unless the scores say "
        "so.",
        "What its base model has learned, prejudice included, is in it still.",
    ]


def _data(results: Record, paths: Sequence[str]) -> list[str]:
    data = results["data"]
    names = ", ".join(dict.fromkeys(map(shown, paths)))
    facts = [f"from {names} (fingerprint of the files: {data['source']})"]
    for name in ("train", "validation", "test"):
        split = data[name]
        facts.append(
            f"{name}: {split['questions']:,} questions over {split['paragraphs']:,} paragraphs of "
            f"{split['articles']:,} articles (fingerprint {split['fingerprint']})"
        )
    apart = results["config"]["data"]["split_by"]
    facts.append(f"train and validation share no {apart}")
    return facts


def _licences(base: str, paths: Sequence[str]) -> list[str]:
    named = {f"base model {shown(base)}": _licence(base)}
    named |= {f"data {shown(path)}": _licence(path) for path in paths}
    return [f"{what}: {licence}" for what, licence in named.items()]


def _licence(name: str) -> str:
    if any(name.endswith(f"/{own}") for own in OWN):
        return "MIT"
    if name in LICENCES:
        return LICENCES[name]
    file = Path(name) / "README.md"
    if file.is_file() and (stated := (metadata_load(file) or {}).get("license")):
        return f"{stated}, as its card says"
    return "not known here; ask whoever published it before you hand this on"


def _origin(results: Record, base: str, adapter: bool) -> list[str]:
    environment = results["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    facts = [
        f"commit {environment['commit'] or 'unknown'}, Python {environment['python']}, {packages}",
        f"base model's weights: {results['model']['fingerprint']} (SHA-256, first 16 digits)",
    ]
    if adapter and not hub_id(base):
        facts.append(
            "The base model was a local folder: adapter_config.json names the place where it was."
        )
    return facts


def _points(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
