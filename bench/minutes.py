"""Compare runs with a plain transformers + PEFT recipe that trains for the same time.

python bench/minutes.py RUN [RUN ...] --target_modules=c_attn --output=minutes

RUN is a finished run of this project. For each run transformers' Trainer trains an adapter on
`target_modules` (r 8, alpha 16, dropout 0.1, learning rate 2e-4 falling linearly to zero, 4
questions per step, one per row, the model's dropouts) for the training time of RUN, in its
precision, on one device, on questions drawn from the same articles with its seed. A few measured
steps give the number of steps; if these take less than nine tenths of the time in the end, it
trains again with more. RUN's training time does not include its validation, which the table lists
separately. Both are scored by this project on RUN's test questions.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import peft
import torch
import transformers
from datasets import Dataset

from lora_or_full.cli.evaluate import predictions_of
from lora_or_full.config.schema import Config
from lora_or_full.data.hub import folder_of
from lora_or_full.data.prompt import Prompt
from lora_or_full.data.splits import Splits
from lora_or_full.data.squad import Question, fingerprint
from lora_or_full.errors import UserError, command_line_errors
from lora_or_full.evaluation.predictions import scores
from lora_or_full.generation.predictor import load, quiet_transformers
from lora_or_full.modeling.precision import device_name
from lora_or_full.runs import provenance, store
from lora_or_full.runs.reader import finished_record

LEARNING_RATE, BATCH_SIZE = 2e-4, 4
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
PRECISIONS = "32-true", "bf16-mixed", "16-mixed"
SKIPPED, MEASURED = 10, 40  # trial steps: not timed, since new lengths are slow; and timed
LEAST = 0.9  # share of the run's time to train at least: the machine's load may have dropped since


def train(
    config: Config, targets: list[str], questions: list[Question], steps: int, folder: Path
) -> float:
    """Train by the plain recipe.

    Args:
        config: Configuration of the run to compare with.
        targets: Layers that get an adapter.
        questions: Training questions.
        steps: Optimizer steps.
        folder: Where the adapter is written.

    Returns:
        Seconds of all steps but the first SKIPPED.
    """
    base = str(folder_of(config.model.name, "model", Path(config.cache_dir)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    rows, prompt = [], Prompt(tokenizer)
    prompts = prompt.tokens([(q.context, q.question) for q in questions])
    answers = prompt.answers([q.answers[0] for q in questions])
    for parts, answer in zip(prompts, answers, strict=True):
        asked = parts.prompt
        # Cut from the right, as the recipe does, a row that is too long would hold no answer.
        if len(asked + answer) <= config.max_length:
            rows.append({"input_ids": asked + answer, "labels": [-100] * len(asked) + answer})
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(
        whole, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **LORA)
    )
    ends: list[float] = []
    precision = config.trainer.precision

    class Times(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer = transformers.Trainer(
        model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            bf16=precision == "bf16-mixed",
            fp16=precision == "16-mixed",
            use_cpu=config.trainer.accelerator == "cpu" or not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=config.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Times()],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # it would print into the table
    trainer.train()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return ends[-1] - ends[SKIPPED - 1]


def compare(folder: Path, targets: list[str], output: Path) -> dict[str, Any]:
    """Compare a run with the plain recipe.

    Args:
        folder: The run's folder.
        targets: Layers that get an adapter.
        output: Where the adapter and the result are written.

    Returns:
        Times, numbers of questions and scores of both.

    Raises:
        UserError: The plain recipe has no such precision or devices, or the run's data has changed.
    """
    record = finished_record(folder)
    config, seconds = record.config, record.cost.train_seconds
    trainer = config.trainer
    if trainer.precision not in PRECISIONS:
        raise UserError(f"{folder}: trainer.precision must be one of {', '.join(PRECISIONS)}.")
    if (trainer.devices, trainer.num_nodes) != (1, 1) or torch.cuda.device_count() > 1:
        raise UserError(f"{folder}: only one device can be compared (CUDA_VISIBLE_DEVICES=0).")
    data = config.data.model_copy(update={"train_size": None, "draw_by": "question"})
    questions = Splits(data, config.seed, Path(config.cache_dir)).read().splits
    if fingerprint(questions["test"]) != record.data.test.fingerprint:
        raise UserError(f"{config.data.path}: the test questions are not those of {folder}.")
    adapter = output / folder.name
    once = train(config, targets, questions["train"], SKIPPED + MEASURED, adapter) / MEASURED
    steps = round(seconds / once)
    if steps <= SKIPPED:
        raise UserError(f"{folder} trained {seconds:.1f} s, the time of {steps} steps: too short.")

    def trained() -> float:  # the seconds of all steps
        per_step = train(config, targets, questions["train"], steps, adapter) / (steps - SKIPPED)
        return steps * per_step

    while (took := trained()) < LEAST * seconds:
        steps = round(steps * seconds / took)
    run = load(folder, None)
    model = load(adapter, None).model
    torch.nn.Module.to(model, run.model.device)
    asked = dataclasses.replace(run, model=model)  # with the limits, batches and precision of RUN
    answered = predictions_of(asked, questions["test"])
    plain = scores(answered, config.metrics)
    store.write_lines(adapter / "predictions.jsonl", answered)
    own = {
        "run": folder.name,
        "seed": config.seed,
        "precision": trainer.precision,
        "train_seconds": seconds,
        "validation_seconds": record.cost.validation_seconds,
        "questions_seen": record.cost.samples,
        "test": record.test.model_dump(),
        "plain_train_seconds": took,
        "plain_questions_seen": steps * BATCH_SIZE,
        "plain_test": plain,
        "environment": provenance.environment(device_name(run.model.device), provenance.commit()),
    }
    store.write_json(adapter / "minutes.json", own)
    return own


@command_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--target_modules", default="c_attn", help="layers that get an adapter, separated by commas"
    )
    parser.add_argument("--output", type=Path, default=Path("minutes"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_transformers()
    targets = args.target_modules.split(",")
    found = [compare(folder, targets, args.output) for folder in args.runs]
    columns = ["run", "its validation, minutes", "minutes", "questions seen", "EM", "F1",
            "plain: minutes", "questions seen", "EM", "F1", "F1, difference"]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for own in found:
        cells = [own["run"], f"{own['validation_seconds'] / 60:.1f}"]
        for side in ("", "plain_"):
            test = own[f"{side}test"]
            cells += [
                f"{own[f'{side}train_seconds'] / 60:.1f}", f"{own[f'{side}questions_seen']:,}",
                f"{test['exact_match']:.1f}", f"{test['f1']:.1f}",
            ]  # fmt: skip
        lines.append(
            "| "
            + " | ".join([*cells, f"{own['test']['f1'] - own['plain_test']['f1']:+.1f}"])
            + " |"
        )
    text = "\n".join(lines) + "\n"
    (args.output / "minutes.md").write_text(text, encoding="utf-8")
    print(json.dumps(found[-1]["environment"]) + "\n\n" + text)


if __name__ == "__main__":
    main()
