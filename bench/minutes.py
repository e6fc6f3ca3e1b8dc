"""The replaced report's recipe in plain transformers + PEFT, for the minutes that a run trained.

python bench/minutes.py RUN [RUN ...] --target_modules=c_attn --output=minutes

RUN is a finished run of this project. For each one an adapter on `target_modules` (r 8, alpha 16,
dropout 0.1, 2e-4 falling linearly to zero, 4 questions a step, one a row, the model's dropouts) is
trained by transformers' Trainer as long as RUN was, in its precision, on questions drawn from the
same articles with its seed; how many steps that is, a few measured ones tell before. Both are
scored by this project on RUN's test questions.
"""

import argparse
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

from errors import UserError, command
from evaluate_run import predictions_of
from hub import folder_of
from loading import load, quiet, results_of
from precision import device_name
from predictions import scores
from qa import prompt
from qa.squad import Question
from splits import Splits
from study import record

LEARNING_RATE, BATCH_SIZE = 2e-4, 4
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
SKIPPED, MEASURED = 3, 12  # steps before training: not counted, and counted


def train(
    config: dict[str, Any], targets: list[str], questions: list[Question], steps: int, folder: Path
) -> float:
    """Train for `steps` of the reference's recipe; the adapter goes to `folder`.

    Gives the seconds of all steps but the first SKIPPED.
    """
    base = str(folder_of(config["model"]["name"], "model", Path(config["cache_dir"])))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    rows = []
    for q in questions:
        text = f"Context: {q.context.strip()}\nQuestion: {q.question.strip()}\nAnswer:"
        before, answer = (
            tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (text, prompt.answer_text(q.answers[0]))
        )
        answer = [*answer, tokenizer.eos_token_id]
        # The replaced report cut what was too long from the right, which left nothing to learn.
        if len(before + answer) <= config["max_length"]:
            rows.append({"input_ids": before + answer, "labels": [-100] * len(before) + answer})
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(
        whole, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **LORA)
    )
    ends: list[float] = []

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
            bf16=config["trainer"]["precision"] == "bf16-mixed",
            use_cpu=config["trainer"]["accelerator"] == "cpu" or not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=config["seed"],
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Times()],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # of lines amid the table
    trainer.train()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return ends[-1] - ends[SKIPPED - 1]


def compare(place: Path, targets: list[str], output: Path) -> dict[str, Any]:
    """What the run in `place` and the plain recipe reached in the same time."""
    results = results_of(place)
    config = results["config"]
    seconds = results["cost"]["train_seconds"]
    parts = config["data"] | {"train_size": None, "draw_by": "question"}
    cache = Path(config["cache_dir"])
    questions, _ = Splits(**parts, seed=config["seed"], cache_dir=cache).read()
    folder = output / place.name
    once = train(config, targets, questions["train"], SKIPPED + MEASURED, folder) / MEASURED
    steps = round(seconds / once)
    if steps <= SKIPPED:
        raise UserError(f"{place} trained {seconds:.1f} s, the time of {steps} steps: too short.")
    took = train(config, targets, questions["train"], steps, folder) * steps / (steps - SKIPPED)
    trained = load(folder, None)
    answered, _ = predictions_of(trained, questions["test"])
    plain = scores(answered)
    record.write_lines(folder / "predictions.jsonl", answered)
    own = {
        "run": place.name,
        "seed": config["seed"],
        "precision": config["trainer"]["precision"],
        "train_seconds": seconds,
        "questions_seen": results["cost"]["samples"],
        "test": results["test"],
        "plain_train_seconds": took,
        "plain_questions_seen": steps * BATCH_SIZE,
        "plain_test": plain,
        "environment": record.environment(device_name(trained.model.device), record.commit()),
    }
    record.write_json(folder / "minutes.json", own)
    return own


@command()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--target_modules", default="c_attn", help="the model's attention projections, with commas"
    )
    parser.add_argument("--output", type=Path, default=Path("minutes"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    targets = args.target_modules.split(",")
    found = [compare(place, targets, args.output) for place in args.runs]
    head = ["run", "minutes", "questions seen", "EM", "F1", "plain: minutes", "questions seen",
            "EM", "F1", "F1, difference"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for own in found:
        cells = [own["run"]]
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
