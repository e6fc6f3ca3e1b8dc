"""Check this project on a GPU and measure it there: python bench/gpu.py --output=gpu.md

Each part runs in a process of its own with a time limit, so that the failure of one does not hide
the others; what it found is appended to the output as soon as it ends. Everything that is needed is
made here: a GPT-2 of full size with random weights, and questions of SQuAD's lengths over nonsense
texts. --device=cpu tries all parts with small models. TRL is compared where it is installed.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import sides

import experiment
from lora_or_full.config import compose
from lora_or_full.config.schema import validate
from lora_or_full.generation import decoding
from lora_or_full.modeling.loading import load_tokenizer
from lora_or_full.training.profiling import operation_counter

BENCH = Path(__file__).resolve().parent
PROJECT = BENCH.parent
BUILTIN = PROJECT / "assets" / "model"
TOLERANCE = 1e-4  # relative difference of a loss or gradient in float32
LIMIT = 8 * 60  # seconds of the whole check
Row = list[str]


@dataclass
class Place:
    """Where a part runs: a device, a folder for what it makes, and whether models are small."""

    device: torch.device
    folder: Path

    @property
    def small(self) -> bool:
        return self.device.type == "cpu"


# Parts: each gives the rows of its table, the first of them its head.


def gradients(place: Place) -> Iterator[Row]:
    """Loss and every gradient in float32, against the CPU."""
    yield ["model", "mode", "sequences", "loss", "largest gradient difference", f"<= {TOLERANCE}"]
    for model in (BUILTIN, llama(place.folder)):
        for mode in ("lora", "full"):
            for packing in (True, False):
                module, batch = first_batch(place, model, mode, packing)
                own = loss_and_gradients(module, batch, torch.device("cpu"))
                there = loss_and_gradients(module, batch, place.device)
                differences = [relative(there[name], own[name]) for name in own]
                worst = max(differences[1:])
                yield [
                    model.name, mode, "packed" if packing else "padded", f"{differences[0]:.1e}",
                    f"{worst:.1e}", verdict(max(differences) <= TOLERANCE),
                ]  # fmt: skip


def answers(place: Place) -> Iterator[Row]:
    """Greedy answers in batches, against one by one on the same device and on the CPU."""
    yield ["model", "mode", "questions", "as one by one", "as on the CPU", "all"]
    for model in (BUILTIN, llama(place.folder)):
        for mode in ("lora", "full"):
            data, module = project(place, model, mode, True)
            module.eval()
            rows = [data.validation[n] for n in range(8 if place.small else 48)]
            prompts = [data._prompt(row) for row in rows]
            found: dict[str, list[str]] = {}
            for name, device in (("cpu", torch.device("cpu")), ("here", place.device)):
                module.to(device)
                found[name] = texts(module, data, prompts, module.packed_length)
            found["alone"] = [
                text for prompt in prompts for text in texts(module, data, [prompt], None)
            ]
            alone, cpu = (
                sum(map(str.__eq__, found["here"], found[other])) for other in ("alone", "cpu")
            )
            good = verdict(alone == cpu == len(prompts))
            yield [model.name, mode, str(len(prompts)), str(alone), str(cpu), good]


def training(place: Place) -> Iterator[Row]:
    """Training, against plain transformers + PEFT and TRL, in bf16 with sdpa."""
    yield ["mode", "questions a step", "side", "questions/s", "times plain", "peak, MB",
           "of plain", "product share, %"]  # fmt: skip
    peers: list[sides.Spec] = [{"side": "plain"}, {"side": "plain", "compile": True}]
    peers += [{"side": "trl"}] * (find_spec("trl") is not None)
    for mode in ("lora", "full"):
        for size, steps in ((5, 60), (64, 24)) if not place.small else ((5, 6),):
            base: sides.Result = {}
            for peer in [*peers, {"side": "this project"}]:
                spec = {"what": "training", "mode": mode, "batch_size": size} | peer
                result = measured(place, spec | {"questions": size * steps})
                side = peer["side"] + " compiled" * peer.get("compile", False)
                if "error" in result:
                    yield [mode, str(size), side, result["error"], *[""] * 4]
                    continue
                base = base or result
                yield [
                    mode, str(size), side, f"{result['rate']:.1f}",
                    f"{result['rate'] / base['rate']:.2f}", f"{result['peak'] / 1e6:,.0f}",
                    f"{result['peak'] / base['peak']:.2f}", f"{100 * result['utilisation']:.1f}",
                ]  # fmt: skip


def answering(place: Place) -> Iterator[Row]:
    """Answering 16 tokens a question, against `generate`, in bf16."""
    yield ["side", "questions/s", "times one by one", "peak, MB"]
    first = 0.0
    for name, count, spec in (
        ("generate, one by one", 20, {"side": "generate"}),
        ("generate, batches of 32", 160, {"side": "generate", "rows": 32}),
        ("this project", 640, {"side": "this project"}),
    ):
        spec = {"what": "evaluation", "mode": "lora", "batch_size": 5} | spec
        result = measured(place, spec | {"questions": 20 if place.small else count})
        if "error" in result:
            yield [name, result["error"], "", ""]
            continue
        first = first or result["rate"]
        ratio = f"{result['rate'] / first:.2f}"
        yield [name, f"{result['rate']:.1f}", ratio, f"{result['peak'] / 1e6:,.0f}"]


def floor(place: Place) -> Iterator[Row]:
    """Operations and bytes of a step, and the least times that follow from them."""
    yield ["mode", "questions a step", "GFLOP", "ms by the product's rate", "MB at least",
           "ms by the memory's rate", "ms measured"]  # fmt: skip
    model = BUILTIN if place.small else gpt2(place.folder)
    product, memory = sides.product_rate("bf16", place.device), memory_rate(place.device)
    for mode in ("lora", "full"):
        for size in (5, 64):
            data, module = project(place, model, mode, True, batch_size=size, bf16=True)
            module.to(place.device).train()
            batch = next(iter(data.train_dataloader()))["sequences"].to(place.device)

            def step(module: Any = module, batch: Any = batch) -> None:
                with torch.autocast(place.device.type, torch.bfloat16):
                    loss, _ = module.loss_sum(batch)
                loss.backward()

            with operation_counter() as count:
                step()
            operations = count.get_total_flops()
            # Every weight is read forward and backward; a trained one also by AdamW, with its
            # gradient and two moments, and three of these are written.
            sizes = [p.nbytes for p in module.parameters()]
            trained = [p.nbytes for p in module.parameters() if p.requires_grad]
            moved = 2 * sum(sizes) + 7 * sum(trained)
            yield [
                mode, str(size), f"{operations / 1e9:.1f}", f"{1e3 * operations / product:.2f}",
                f"{moved / 1e6:,.0f}", f"{1e3 * moved / memory:.2f}",
                f"{1e3 * seconds_of(step, place.device):.2f}",
            ]  # fmt: skip


def precisions(place: Place) -> Iterator[Row]:
    """The built-in demo here and on the CPU: scores within noise, in every precision."""
    yield ["mode", "device", "precision", "validation loss", "EM, %", "F1, %", "EM within 3 points"]
    here = place.device.type
    for mode in ("lora", "full"):
        runs = {
            (device, precision): start(place, mode, device, f"trainer.precision={precision}")
            for device, precision in (
                ("cpu", "32-true"), (here, "32-true"), (here, "bf16-mixed"), (here, "16-mixed"),
            )
        }  # fmt: skip
        base = None
        for (device, precision), run in runs.items():
            if (fault := run.failed()) is not None:
                yield [mode, device, precision, fault, "", "", verdict(False)]
                continue
            results = json.loads((run.folder / "results.json").read_text())
            scores = results["test"]
            base = scores["exact_match"] if base is None else base
            best = min(epoch["validation_loss"] for epoch in results["epochs"])
            yield [
                mode, device, precision, f"{best:.4f}", f"{scores['exact_match']:.1f}",
                f"{scores['f1']:.1f}", verdict(abs(scores["exact_match"] - base) <= 3),
            ]  # fmt: skip


def resumed(place: Place) -> Iterator[Row]:
    """A run that was stopped and resumed, against one that was not: its weights."""
    yield ["mode", "trainer.deterministic", "largest difference of a weight", "equal"]
    for mode in ("lora", "full"):
        for deterministic in ("false", "true"):
            words = [f"trainer.deterministic={deterministic}", "checkpoint_minutes=0.02"]
            whole, stopped = (start(place, mode, place.device.type, *words) for _ in range(2))
            file = stopped.folder / "checkpoints" / "last.ckpt"
            while stopped.process.poll() is None and not file.exists():
                time.sleep(0.05)
            stopped.process.send_signal(signal.SIGINT)
            stopped.process.wait()
            again = start(place, mode, place.device.type, f"resume={stopped.folder}")
            faults = [whole.failed(), again.failed()]
            if any(faults):
                yield [mode, deterministic, " ".join(filter(None, faults)), verdict(False)]
                continue
            own, other = (weights(run) for run in (whole.folder, stopped.folder))
            worst = max(float((own[name] - other[name]).abs().max()) for name in own)
            yield [mode, deterministic, f"{worst:.1e}", verdict(worst == 0)]


PARTS: dict[str, Callable[[Place], Iterator[Row]]] = {
    part.__name__: part
    for part in (gradients, answers, training, answering, floor, precisions, resumed)
}


# What the parts use.


@dataclass
class Run:
    """A run of the built-in demo in another process."""

    process: subprocess.Popen[str]
    folder: Path

    def failed(self) -> str | None:
        """Wait for it; its last line of error, or None."""
        _, errors = self.process.communicate()
        lines = errors.strip().splitlines() or ["no message"]
        return cell(lines[-1]) if self.process.returncode else None


def start(place: Place, mode: str, device: str, *words: str) -> Run:
    """Start a short demo run."""
    resumes = [word.removeprefix("resume=") for word in words if word.startswith("resume=")]
    if resumes:
        folder, words = Path(resumes[0]), (*words,)
    else:
        folder = Path(tempfile.mkdtemp(dir=place.folder)) / "run"
        sizes = ["data.train_size=64", "data.validation_size=32", "data.test_size=32"]
        words = (
            "experiment=demo", f"mode={mode}", f"trainer.accelerator={device}",
            f"hydra.run.dir={folder}", f"cache_dir={folder.parent / 'cache'}",
            *(sizes if place.small else []), *words,
        )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "src" / "run.py"), *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder.parent,
    )  # fmt: skip
    return Run(process, folder)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Exported weights of a run."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def measured(place: Place, spec: sides.Spec) -> sides.Result:
    """Measure one side in a process of its own, on full-size GPT-2 and questions like SQuAD's."""
    spec = {
        "model": str(BUILTIN if place.small else gpt2(place.folder)),
        "data": str(questions(place.folder, spec["questions"] // 5 + 40)),
        "cache": str(place.folder / "cache"), "draw_by": "paragraph", "dropout": 0.0,
        "precision": "bf16", "device": place.device.type,
    } | spec  # fmt: skip
    process = subprocess.run(
        [sys.executable, str(BENCH / "sides.py"), json.dumps(spec)],
        capture_output=True, text=True,
    )  # fmt: skip
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"error": cell((process.stderr.strip().splitlines() or ["no message"])[-1])}


def project(
    place: Place, model: Path, mode: str, packing: bool, batch_size: int = 6, bf16: bool = False
) -> tuple[Any, Any]:
    """This project's data and module, with random adapter weights instead of zeros."""
    config = validate(compose.compose([
        "experiment=demo", f"mode={mode}", f"model.name={model}", f"packing={packing}",
        f"batch_size={batch_size}", f"cache_dir={place.folder / 'cache'}",
        "adapter.lora_dropout=0" if mode == "lora" else "seed=1",
        f"trainer.precision={'bf16-mixed' if bf16 else '32-true'}",
        *(["model=llama", "model.target_modules=[q_proj,v_proj]"] * ("llama" in model.name)),
    ], []))  # fmt: skip
    data, module, _ = experiment.build(config)
    torch.manual_seed(0)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return data, module


def first_batch(place: Place, model: Path, mode: str, packing: bool) -> tuple[Any, Any]:
    """A module, and the sequences of its first step."""
    data, module = project(place, model, mode, packing)
    return module, next(iter(data.train_dataloader()))["sequences"]


def loss_and_gradients(module: Any, batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """The loss of a batch on a device, and the gradient of each trained weight, on the CPU."""
    module.to(device).train()
    module.zero_grad()
    loss, _ = module.loss_sum(batch.to(device))
    loss.backward()
    found = {"loss": loss.detach().cpu()}
    for name, weight in module.trainable_parameters().items():
        found[name] = weight.grad.to_dense().cpu().clone()
    module.zero_grad()
    return found


def texts(module: Any, data: Any, prompts: list[Any], packed_length: int | None) -> list[str]:
    """Greedy answers of a module."""
    limit = module.config.max_new_tokens
    found = decoding.greedy(
        module.model, data.tokenizer, prompts, module.stops, limit, packed_length
    )
    return [answer.text for answer in found]


def relative(own: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of a difference, relative to the norm of the second."""
    scale = float(other.norm())
    return float((own - other).norm()) / scale if scale else float(own.norm())


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the mean of ten after three."""
    for number in range(13):
        if number == 3:
            wait(device)
            began = time.perf_counter()
        work()
    wait(device)
    return (time.perf_counter() - began) / 10


def memory_rate(device: torch.device) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.empty(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def gpt2(folder: Path) -> Path:
    """GPT-2 of full size with random weights, and the built-in tokenizer."""
    return made(folder / "gpt2", lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()))


def llama(folder: Path) -> Path:
    """A small model of Llama's type with grouped-query attention."""
    config = transformers.LlamaConfig(
        vocab_size=transformers.AutoConfig.from_pretrained(BUILTIN).vocab_size,
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return made(folder / "llama", lambda: transformers.LlamaForCausalLM(config))


def made(folder: Path, build: Callable[[], Any]) -> Path:
    """Save a model with the built-in tokenizer, unless it is there."""
    if not folder.exists():
        torch.manual_seed(0)
        build().save_pretrained(folder)
        for file in BUILTIN.glob("tokenizer*"):
            shutil.copy(file, folder)
    return folder


def questions(folder: Path, paragraphs: int) -> Path:
    """A SQuAD file of nonsense, five questions a paragraph, with SQuAD's lengths in tokens."""
    file = folder / f"{paragraphs}.json"
    if file.exists():
        return file
    rng, tokenizer = random.Random(0), load_tokenizer(BUILTIN)
    words = ["".join(rng.choices("aeioulmnrst", k=rng.randrange(2, 8))) for _ in range(3000)]
    tokens = len(tokenizer(" ".join(words))["input_ids"]) / len(words)
    articles: list[dict[str, Any]] = []
    for number in range(paragraphs):
        # GPT-2's tokens of SQuAD's paragraphs: 155 on average, half of them from 110 to 185.
        length = max(40, min(400, rng.lognormvariate(5.0, 0.4)))
        context = " ".join(rng.choices(words, k=round(length / tokens)))
        qas = []
        for question in range(5):
            answer = rng.choice(context.split())
            asked = " ".join(rng.choices(words, k=round(13 / tokens)))
            answer_start = context.index(answer)
            qas.append({
                "id": f"{number}-{question}", "question": f"{asked}?",
                "answers": [{"text": answer, "answer_start": answer_start}],
            })  # fmt: skip
        if number % 10 == 0:
            articles.append({"title": f"Article {number}", "paragraphs": []})
        articles[-1]["paragraphs"].append({"context": context, "qas": qas})
    file.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return file


def verdict(good: bool) -> str:
    """A word for a claim that holds or does not."""
    return "yes" if good else "**NO**"


def cell(text: str) -> str:
    """Text as a cell of a table."""
    return text.replace("|", "/")[:200]


def origin(device: torch.device) -> str:
    """Say what all of this was measured with."""
    name = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
    capability = "" if device.type == "cpu" else f" ({torch.cuda.get_device_capability(device)})"
    packages = ["torch", "transformers", "peft", "lightning", *["trl"] * bool(find_spec("trl"))]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    done = subprocess.run(
        ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"],
        capture_output=True, text=True,
    )  # fmt: skip
    commit = done.stdout.strip() or "unknown"
    return f"{name}{capability}, Python {platform.python_version()}, {versions}; commit {commit}"


def run_part(name: str, device: str, folder: Path, seconds: float, output: Path) -> bool:
    """Run a part in a process of its own, and append what it prints; whether it ended well."""
    print(f"{name} ...", flush=True)
    began = time.perf_counter()
    words = [sys.executable, __file__, f"--device={device}", f"--part={name}", f"--folder={folder}"]
    with output.open("a", encoding="utf-8") as file:
        file.write(f"\n## {(PARTS[name].__doc__ or name).strip()}\n\n")
        file.flush()
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            errors = f"stopped after {seconds:.0f} s"
            process.returncode = 1
        if process.returncode:
            file.write(f"\n**This part failed:**\n\n```\n{errors[-3000:].strip()}\n```\n")
        file.write(f"\n{time.perf_counter() - began:.0f} s\n")
    return process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="limit of the whole check")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("There is no CUDA device here; --device=cpu tries all parts on the CPU.")
    if args.part:
        transformers.utils.logging.set_verbosity_error()
        for number, row in enumerate(
            PARTS[args.part](Place(torch.device(args.device), args.folder))
        ):
            print("| " + " | ".join(row) + " |", flush=True)
            if not number:
                print("|---" * len(row) + "|", flush=True)
        return
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only={unknown[0]}: the parts are {', '.join(PARTS)}.")
    args.output.write_text(f"# On {origin(torch.device(args.device))}\n", encoding="utf-8")
    ends = time.perf_counter() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: run_part(
                name, args.device, Path(folder), max(1, ends - time.perf_counter()), args.output
            )
            for name in names
        }
    text = args.output.read_text(encoding="utf-8")
    print(text)
    if not all(results.values()) or "**NO**" in text:
        sys.exit(f"Not all is well: see {args.output}")


if __name__ == "__main__":
    main()
