"""One measurement in a separate process: training or evaluation by one side of a comparison.

compare.py starts it with a JSON specification, gpu.py with a list of them; it prints a JSON result
for each. The sides (transformers, TRL, this project) get the same questions in the same steps,
those of this project's data module.
"""

import gc
import itertools
import json
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import lightning as L
import peft
import torch
import transformers
from datasets import Dataset
from torch.utils.data import SequentialSampler

import experiment
from datamodule import SquadDataModule
from lora_or_full.config import compose
from lora_or_full.config.schema import Config, validate
from lora_or_full.data.prompt import PromptTokens
from lora_or_full.data.tokenized import prompt_of
from lora_or_full.generation import decoding
from lora_or_full.modeling.loading import load_tokenizer
from lora_or_full.training.memory import PeakMemory
from lora_or_full.training.memory_estimate import needed_bytes
from lora_or_full.training.profiling import CostMonitor, operation_counter

SKIPPED = 2  # first steps of a run, in which kernels are chosen and memory is allocated
COUNTED = 12  # steps whose operations are counted; the others have as many on average
NEW_TOKENS = 16
Spec = dict[str, Any]
Result = dict[str, Any]


def config_of(spec: Spec) -> Config:
    """This project's configuration for a measurement."""
    bf16 = spec["precision"] == "bf16"
    words = [
        f"mode={spec['mode']}",
        f"model.name='{spec['model']}'",
        f"data.path='{spec['data']}'",
        "data.test_size=1",
        "data.validation_size=1",
        f"data.train_size={spec['questions']}",
        f"cache_dir='{spec['cache']}'",
        "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false",
        f"trainer.accelerator={device_of(spec).type}",
        *spec.get("words", []),
    ]
    if "preset" in spec:
        words.append(f"experiment={spec['preset']}")
    else:
        if spec["dropout"] is not None:  # of another model than GPT-2
            dropouts = ",".join(f"{name}:{spec['dropout']}" for name in DROPOUTS)
            words.append(f"model.config={{{dropouts}}}")
        words += [
            f"data.draw_by={spec['draw_by']}",
            f"batch_size={spec['batch_size']}",
            f"trainer.precision={'bf16-mixed' if bf16 else '32-true'}",
        ]
    return experiment.with_precision(validate(compose.compose(words)))


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def device_of(spec: Spec) -> torch.device:
    """The device of a measurement; the CPU if it names none."""
    return torch.device(spec.get("device", "cpu"))


class Clock:
    """Notes when each step ended. It waits for a GPU only where the measured time begins and ends,
    so that the steps between may overlap as they do in use."""

    def __init__(self, spec: Spec) -> None:
        self.times: list[float] = []
        self.cuda = device_of(spec).type == "cuda"
        steps = -(-spec["questions"] // config_of(spec).batch_size)
        self.ends = (SKIPPED, steps)

    def __call__(self) -> None:
        if self.cuda and len(self.times) + 1 in self.ends:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def this_project(spec: Spec, memory: PeakMemory) -> Result:
    """Fit by Lightning with this project's data and module, including the validation at the end."""
    config = config_of(spec)
    memory.reset()
    data, module, _ = experiment.build(config)
    built = memory.read()
    needed = needed_bytes(module, data, 1) if device_of(spec).type == "cuda" else 0
    clock, cost = Clock(spec), CostMonitor()

    class Times(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock()

    with tempfile.TemporaryDirectory() as folder:
        # CostMonitor too, since every run of a user has it; it resets the peak between phases.
        trainer = experiment.build_trainer(config, Path(folder), 0, [cost, Times()])
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
    peak = max(built, memory.read(), *cost.peak.values())
    device = device_of(spec)
    module.to(device)
    data.in_rows = False  # the arithmetic that is needed, without what fills up rows
    batches = list(itertools.islice(data.train_dataloader(), COUNTED))
    with trainer.precision_plugin.forward_context(), operation_counter() as count:
        for batch in batches:
            module.loss_sum(batch["sequences"].to(device))[0].backward()
    flops = count.get_total_flops() / len(batches)
    return {
        "times": clock.times, "peak": peak, "flops_per_step": flops,
        "needed": needed, "train_peak": cost.peak["train"],
    }  # fmt: skip


class InOrder:
    """Makes a Trainer take its questions in the given order."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)  # type: ignore[attr-defined]


class Times(transformers.TrainerCallback):
    """Calls a clock at the end of each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock()


def peer(spec: Spec, memory: PeakMemory) -> Result:
    """Train by transformers' Trainer with PEFT, or by TRL's SFTTrainer, as documented by them."""
    config = config_of(spec)
    data = data_of(config)
    rows = []
    for numbers, _ in data.train_dataloader().sampler:
        for row in (data.train[number] for number in numbers):
            before = prompt_of(row).prompt
            labels = [-100] * len(before) + row["answer_ids"]
            rows.append({"input_ids": before + row["answer_ids"], "labels": labels})
    memory.reset()
    model = plain_model(spec, config)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": config.batch_size,
        "num_train_epochs": 1,
        "learning_rate": config.lr,
        "bf16": spec["precision"] == "bf16",
        "use_cpu": device_of(spec).type == "cpu",
        "torch_compile": spec.get("compile", False),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token = tokenizer.eos_token
    clock = Clock(spec)
    trainer: Any
    table = Dataset.from_list(rows)
    if spec["side"] == "trl":
        import trl

        class Ordered(InOrder, trl.SFTTrainer):
            pass

        # Without packing, which needs FlashAttention; there is none for CPUs.
        arguments = trl.SFTConfig(**common, gradient_checkpointing=False, max_length=None)
        trainer = Ordered(model, args=arguments, train_dataset=table, processing_class=tokenizer)
    else:

        class OrderedPlain(InOrder, transformers.Trainer):
            pass

        trainer = OrderedPlain(
            model,
            args=transformers.TrainingArguments(**common),
            train_dataset=table,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        )
    trainer.add_callback(Times(clock))
    trainer.train()
    peak = memory.read()
    batches = list(itertools.islice(trainer.get_train_dataloader(), COUNTED))
    with operation_counter() as count:
        for batch in batches:
            trainer.compute_loss(model, trainer._prepare_inputs(dict(batch))).backward()
    flops = count.get_total_flops() / len(batches)
    return {"times": clock.times, "peak": peak, "flops_per_step": flops}


def evaluation(spec: Spec, memory: PeakMemory) -> Result:
    """Generate NEW_TOKENS tokens a question by `generate`, `rows` at a time, or by this project.

    For `generate` the whole model is stored in that precision, its fastest way.
    """
    config, device = config_of(spec), device_of(spec)
    bf16 = spec["precision"] == "bf16"
    if spec["side"] == "this project":
        data, module, _ = experiment.build(config)
        module.to(device).eval()
    else:
        data = data_of(config)
        model = plain_model(spec, config).eval()
        model.to(device, torch.bfloat16 if bf16 else torch.float32)
    prompts = [prompt_of(data.train[number]) for number in range(len(data.train))]
    memory.reset()

    def ours(some: list[PromptTokens]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            decoding.greedy(
                module.model, data.tokenizer, some, [], NEW_TOKENS, module.packed_length
            )

    def generate(some: list[PromptTokens]) -> None:
        longest = max(len(parts.prompt) for parts in some)
        missing = [longest - len(parts.prompt) for parts in some]
        ids = [[0] * n + parts.prompt for n, parts in zip(missing, some, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in missing]
        with torch.no_grad():
            model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )

    own = spec["side"] == "this project"
    answer, size = (ours, config.eval_batch_size) if own else (generate, spec.get("rows", 1))
    if device.type == "cuda":
        answer(prompts[:size])  # chooses kernels
        torch.cuda.synchronize()
    began = time.perf_counter()
    for start in range(0, len(prompts), size):
        answer(prompts[start : start + size])
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {"rate": len(prompts) / seconds, "peak": memory.read()}


def plain_model(spec: Spec, config: Config) -> Any:
    """The model of a peer: plain transformers, with PEFT for LoRA."""
    dropouts = dict.fromkeys(DROPOUTS, spec["dropout"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=torch.float32, **dropouts
    )
    if config.adapter is None:
        return model
    arguments = config.adapter.arguments()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **arguments)
    return peft.get_peft_model(model, lora)


def data_of(config: Config) -> SquadDataModule:
    """The project's data module without its model."""
    data = SquadDataModule(config, load_tokenizer(Path(config.model.name)), 1024)
    data.setup()
    return data


def product_rate(precision: str, device: torch.device) -> float:
    """Largest rate of floating-point operations (1/s) of a matrix product.

    On a CPU one of GPT-2's size; on a GPU one of 4,096 rows and columns, which fills it.
    """
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    rows, inner, columns = (1024, 768, 3072) if device.type == "cpu" else (4096, 4096, 4096)
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    right = torch.randn(inner, columns, dtype=dtype, device=device)
    turned, best = right.t(), 0.0
    products = [lambda: torch.mm(left, right)]
    if device.type == "cpu":
        products.append(
            lambda: torch.ops.mkldnn._linear_pointwise(left, turned, None, "none", [], "")
        )
    for _ in range(30):
        for product in products:
            began = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best


def measure(spec: Spec) -> Result:
    """The result of a specification: rate, peak memory and, of training, share of the product."""
    random.seed(0)
    torch.manual_seed(0)
    memory = PeakMemory(device_of(spec))
    memory.reset()
    imported = memory.read()
    if spec["what"] == "evaluation":
        result = evaluation(spec, memory)
    else:
        result = (this_project if spec["side"] == "this project" else peer)(spec, memory)
        times = result.pop("times")
        size = config_of(spec).batch_size
        steps, seconds = len(times) - SKIPPED, times[-1] - times[SKIPPED - 1]
        result["rate"] = min(steps * size, spec["questions"]) / seconds
        result["seconds"] = seconds
        precision = config_of(spec).trainer.precision if "preset" in spec else spec["precision"]
        rate = result.pop("flops_per_step") * steps / seconds
        result["utilisation"] = rate / product_rate(precision, device_of(spec))
    result["peak"] -= imported
    return result


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    given = json.loads(sys.argv[1])
    for spec in given if isinstance(given, list) else [given]:
        if spec["side"] == "trl":
            import trl  # noqa: F401  # counts to the memory of imports
        print("RESULT " + json.dumps(measure(spec)), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
