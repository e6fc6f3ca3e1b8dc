"""Check this project on a GPU and measure it there: python bench/gpu.py --output=gpu.md

Each part runs in a process of its own with a time limit, so that the failure of one does not hide
the others; what it found is appended to the output when it ends. Everything that is needed is
made here: a GPT-2 of full size with random weights, and questions of SQuAD's lengths over nonsense
texts. --device=cpu tries all parts with small models. TRL is compared where it is installed.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import same
import sides
from material import BUILTIN, PROJECT, gpt2, large, llama, made_up, origin

import experiment
from lora_or_full.config import compose
from lora_or_full.config.schema import validate
from lora_or_full.generation.decoding import text_of
from lora_or_full.modeling.cuda_graphs import GraphedLoss, Recorder
from lora_or_full.training.memory_estimate import ACCURACY
from lora_or_full.training.profiling import operation_counter

TOLERANCE = 1e-4  # relative difference of a loss or gradient in float32
SMALL = ("data.train_size=64", "data.validation_size=32", "data.test_size=32")  # of a demo run
LIMIT = 8 * 60  # seconds of the whole check
MODES = ("lora", "full")
Row = list[str]


@dataclass
class Place:
    """Where a part runs: a device, and a folder for what it makes."""

    device: torch.device
    folder: Path

    @property
    def small(self) -> bool:
        """Whether this only tries the parts."""
        return self.device.type == "cpu"

    @property
    def answers(self) -> int:
        """Number of questions whose answers are compared."""
        return 8 if self.small else 12


# Parts: each gives the rows of its table, the first of them its head.


def gradients(place: Place) -> Iterator[Row]:
    """Loss and every gradient in float32, against the CPU."""
    yield ["model", "mode", "sequences", "loss", "largest gradient difference", f"<= {TOLERANCE}"]
    for model in (BUILTIN, llama(place.folder)):
        for mode in MODES:
            for packing in (True, False):
                data, module = project(place, model, mode, packing)
                batches = [b["sequences"] for b in itertools.islice(data.train_dataloader(), 4)]
                ways = ["packed" if packing else "padded"]
                ways += ["replayed"] * (packing and place.device.type == "cuda")
                for way in ways:
                    module.to(torch.device("cpu"))
                    own = [loss_and_gradients(module, module.loss_sum, b) for b in batches]
                    module.to(place.device)
                    weights = list(module.trainable_parameters().values())
                    replayed = way == "replayed"
                    loss = (
                        GraphedLoss(module.loss_sum, weights, Recorder())
                        if replayed
                        else module.loss_sum
                    )
                    there = [loss_and_gradients(module, loss, b) for b in batches]
                    losses, gradients = (
                        [
                            relative(other[name], values[name])
                            for values, other in zip(own, there, strict=True)
                            for name in values
                            if (name == "loss") == of_loss
                        ]
                        for of_loss in (True, False)
                    )
                    good = verdict(max(losses + gradients) <= TOLERANCE)
                    yield [
                        model.name, mode, way, f"{max(losses):.1e}", f"{max(gradients):.1e}", good,
                    ]  # fmt: skip


def answers(place: Place) -> Iterator[Row]:
    """Greedy answers in batches, against `generate` one by one on the same device, and the CPU."""
    yield ["model", "mode", "questions", "as one by one", "as on the CPU", "all"]
    for model in (BUILTIN, llama(place.folder)):
        for mode in MODES:
            data, module = project(place, model, mode, True)
            module.eval()
            batch = data.collate_evaluation([data.validation[n] for n in range(place.answers)])
            found: dict[str, list[str]] = {}
            for name, device in (("cpu", torch.device("cpu")), ("here", place.device)):
                module.to(device)
                found[name] = [answer.text for answer in module.answers(batch)]
            found["alone"] = [generated(module, part.prompt) for part in batch.prompts]
            alone, cpu = (
                sum(map(str.__eq__, found["here"], found[other])) for other in ("alone", "cpu")
            )
            good = verdict(alone == cpu == place.answers)
            yield [model.name, mode, str(place.answers), str(alone), str(cpu), good]


def training(place: Place) -> Iterator[Row]:
    """Training, against plain transformers + PEFT and TRL, in bf16 with sdpa."""
    trl: list[sides.Spec] = [{"side": "trl"}] * (find_spec("trl") is not None)
    yield from trained(place, [{"side": "plain"}, {"side": "this project"}, *trl])


def compiled(place: Place) -> Iterator[Row]:
    """Training by plain transformers + PEFT with torch.compile, in bf16 with sdpa."""
    yield from trained(place, [{"side": "plain", "compile": True}])


def trained(place: Place, own: list[sides.Spec]) -> Iterator[Row]:
    """Measure sides by mode and size of a step: this project in more steps, since it records."""
    yield ["mode", "questions a step", "side", "questions/s", "times plain", "peak, MB",
           "of plain", "product share, %"]  # fmt: skip
    sizes = ((5, 120, 800), (64, 40, 200)) if not place.small else ((5, 6, 6),)
    specs = [
        {"what": "training", "mode": mode, "batch_size": size} | side
        | {"questions": size * (longer if side["side"] == "this project" else steps)}
        for side in own
        for mode in MODES
        for size, steps, longer in sizes
    ]  # fmt: skip
    plain: dict[tuple[str, int], sides.Result] = {}
    for spec, result in measured(place, specs):
        side = spec["side"] + " compiled" * spec.get("compile", False)
        case = spec["mode"], spec["batch_size"]
        head = [case[0], str(case[1]), side]
        if "error" in result:
            yield [*head, result["error"], *[""] * 4]
            continue
        if side == "plain":
            plain[case] = result
        rate, peak = (
            f"{result[n] / plain[case][n]:.2f}" if case in plain else "" for n in ("rate", "peak")
        )
        yield [
            *head, f"{result['rate']:.1f}", rate, f"{result['peak'] / 1e6:,.0f}", peak,
            f"{100 * result['utilisation']:.1f}",
        ]  # fmt: skip


def answering(place: Place) -> Iterator[Row]:
    """Answering 16 tokens a question, against `generate`, in bf16."""
    yield ["side", "questions/s", "times one by one", "peak, MB"]
    ways: dict[str, tuple[int, sides.Spec]] = {
        "generate, one by one": (20, {"side": "generate"}),
        "generate, batches of 32": (160, {"side": "generate", "rows": 32}),
        "this project, batches of 32": (1280, {"side": "this project"}),
        "this project, batches of 256": (
            2560, {"side": "this project", "words": ["eval_batch_size=256"]},
        ),
    }  # fmt: skip
    common = {"what": "evaluation", "mode": "lora", "batch_size": 5}
    specs = [
        common | spec | {"questions": 20 if place.small else count} for count, spec in ways.values()
    ]
    alone = None
    for name, (_, result) in zip(ways, measured(place, specs), strict=True):
        if "error" in result:
            yield [name, result["error"], "", ""]
            continue
        alone = alone or (result["rate"] if name == "generate, one by one" else None)
        ratio = f"{result['rate'] / alone:.2f}" if alone else ""
        yield [name, f"{result['rate']:.1f}", ratio, f"{result['peak'] / 1e6:,.0f}"]


def floor(place: Place) -> Iterator[Row]:
    """Operations and bytes of a step, and the least times that follow from them."""
    yield ["mode", "questions a step", "GFLOP", "ms by the product's rate", "MB at least",
           "ms by the memory's rate", "ms measured"]  # fmt: skip
    model = BUILTIN if place.small else gpt2(place.folder)
    product, memory = sides.product_rate("bf16", place.device), memory_rate(place.device)
    for mode in MODES:
        for size in (5, 64):
            data, module = project(place, model, mode, True, batch_size=size, bf16=True)
            module.to(place.device).train()
            batch = next(iter(data.train_dataloader()))["sequences"].to(place.device)

            weights = list(module.trainable_parameters().values())
            optimizer = torch.optim.AdamW(weights, lr=0.0, fused=True)

            def step(module: Any = module, batch: Any = batch, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                with torch.autocast(place.device.type, torch.bfloat16):
                    loss, _ = module.loss_sum(batch)
                loss.backward()
                optimizer.step()

            with operation_counter() as count:
                step()
            operations = count.get_total_flops()
            # Every weight is read forward and backward; a trained one also by AdamW, with its
            # gradient and two moments, and three of these are written.
            sizes = [p.nbytes for p in module.parameters()]
            moved = 2 * sum(sizes) + 7 * sum(weight.nbytes for weight in weights)
            yield [
                mode, str(size), f"{operations / 1e9:.1f}", f"{1e3 * operations / product:.2f}",
                f"{moved / 1e6:,.0f}", f"{1e3 * moved / memory:.2f}",
                f"{1e3 * seconds_of(step, place.device):.2f}",
            ]  # fmt: skip


def fit(place: Place) -> Iterator[Row]:
    """Memory that training needs: what is estimated before, against the measured peak."""
    yield ["model", "mode", "questions a step", "estimated, MB", "measured, MB", "ratio",
           "within 20 %"]  # fmt: skip
    cases = [
        ("gpt2-medium", "lora", 64), ("gpt2-large", "full", 5), ("gpt2-xl", "lora", 5),
        ("gpt2-xl", "full", 5), ("llama-1b", "lora", 64),
    ]  # fmt: skip
    of_llama = {"words": ["model=llama", "model.target_modules=[q_proj,v_proj]"], "dropout": None}
    for name, mode, size in cases[:1] if place.small else cases:
        model = BUILTIN if place.small else large(place.folder, name)
        spec = {
            "what": "training", "side": "this project", "mode": mode, "batch_size": size,
            "questions": 5 * size, "model": str(model),
        }  # fmt: skip
        spec |= of_llama if name.startswith("llama") else {}
        for _, result in measured(place, [spec]):
            if "error" in result:
                yield [name, mode, str(size), result["error"], "", "", verdict(False)]
                continue
            ratio = result["needed"] / result["train_peak"]
            yield [
                name, mode, str(size), f"{result['needed'] / 1e6:,.0f}",
                f"{result['train_peak'] / 1e6:,.0f}", f"{ratio:.2f}",
                verdict(abs(ratio - 1) <= ACCURACY) if not place.small else "",
            ]  # fmt: skip


def precisions(place: Place) -> Iterator[Row]:
    """The built-in demo here and on the CPU: scores within noise, in every precision."""
    yield ["mode", "device", "precision", "validation loss", "EM, %", "F1, %", "EM within 3 points"]
    here = place.device.type
    for mode in MODES:
        places = [("cpu", "32-true"), (here, "32-true"), (here, "bf16-mixed"), (here, "16-mixed")]
        runs = [start(place, mode, device, f"trainer.precision={p}") for device, p in places]
        base = None
        for (device, precision), run in zip(places, runs, strict=True):
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
    # Without `deterministic` a GPU may add up in any order: there it is told, not promised.
    cases = [(mode, deterministic) for deterministic in ("true", "false") for mode in MODES]
    runs = []
    for mode, deterministic in cases:
        words = [
            f"trainer.deterministic={deterministic}", "checkpoint_minutes=0.02",
            "trainer.precision=32-true",
        ]  # fmt: skip
        runs.append([start(place, mode, place.device.type, *words) for _ in range(2)])
    for _, stopped in runs:
        file = stopped.folder / "checkpoints" / "last.ckpt"
        while stopped.process.poll() is None and not file.exists():
            time.sleep(0.05)
        stopped.process.send_signal(signal.SIGINT)
    for (mode, deterministic), (whole, stopped) in zip(cases, runs, strict=True):
        stopped.process.wait()
        again = launched(stopped.folder, f"resume={stopped.folder}")
        faults = [whole.failed(), again.failed()]
        if any(faults):
            yield [mode, deterministic, " ".join(filter(None, faults)), verdict(False)]
            continue
        own, other = (same.weights(run) for run in (whole.folder, stopped.folder))
        worst = max(float(abs(own[name] - other[name]).max()) for name in own)
        promised = deterministic == "true" or place.small
        yield [mode, deterministic, f"{worst:.1e}",
               verdict(worst == 0) if promised else "yes" if worst == 0 else "no"]  # fmt: skip


PARTS: dict[str, Callable[[Place], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        gradients, answers, precisions, resumed, training, answering, floor, fit, compiled,
    )
}  # fmt: skip
RIGHT = [gradients.__name__, answers.__name__, precisions.__name__, resumed.__name__]


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
    """Start a demo run."""
    folder = Path(tempfile.mkdtemp(dir=place.folder)) / "run"
    return launched(
        folder, "experiment=demo", f"mode={mode}", f"trainer.accelerator={device}",
        f"hydra.run.dir={folder}", f"cache_dir={folder.parent / 'cache'}",
        *(SMALL if place.small else ()), *words,
    )  # fmt: skip


def launched(folder: Path, *words: str) -> Run:
    """Start src/run.py with some words."""
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "src" / "run.py"), *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder.parent,
        env=os.environ | {"OMP_NUM_THREADS": "2"},  # several run at once
    )  # fmt: skip
    return Run(process, folder)


def measured(
    place: Place, specs: Sequence[sides.Spec]
) -> Iterator[tuple[sides.Spec, sides.Result]]:
    """Measure on full-size GPT-2 and questions like SQuAD's, each side in a process of its own."""
    common = {
        "model": str(BUILTIN if place.small else gpt2(place.folder)),
        "cache": str(place.folder / "cache"), "draw_by": "paragraph", "dropout": 0.0,
        "precision": "bf16", "device": place.device.type,
    }  # fmt: skip
    for _, own in itertools.groupby(specs, lambda spec: spec["side"]):
        given = [
            common | {"data": str(questions(place.folder, spec["questions"] // 5 + 40))} | spec
            for spec in own
        ]
        with subprocess.Popen(
            [sys.executable, sides.__file__, json.dumps(given)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            left = iter(given)
            for line in process.stdout:
                if line.startswith("RESULT "):
                    yield next(left), json.loads(line.removeprefix("RESULT "))
            lines = process.stderr.read().strip().splitlines() or ["no message"]
        for spec in left:
            yield spec, {"error": cell(lines[-1])}


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
    ]))  # fmt: skip
    data, module, _ = experiment.build(config)
    torch.manual_seed(0)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return data, module


def loss_and_gradients(
    module: Any, loss_sum: Callable[[Any], Any], batch: Any
) -> dict[str, torch.Tensor]:
    """The loss of a batch and the gradient of each trained weight, moved to the CPU."""
    module.train()
    module.zero_grad(set_to_none=False)
    loss, _ = loss_sum(batch.to(module.device))
    loss.backward()
    found = {"loss": loss.detach().cpu()}
    for name, weight in module.trainable_parameters().items():
        found[name] = weight.grad.to_dense().cpu().clone()
    return found


@torch.no_grad()
def generated(module: Any, prompt: list[int]) -> str:
    """The greedy answer to a prompt by transformers' `generate`."""
    ids = torch.tensor([prompt], device=module.device)
    output = module.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=module.config.max_new_tokens,
        eos_token_id=module.stops,
        pad_token_id=module.stops[0],
    )
    return text_of(module.tokenizer, output[0, len(prompt) :].tolist())


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


def questions(folder: Path, paragraphs: int) -> Path:
    """A SQuAD file of nonsense, five questions a paragraph, with SQuAD's lengths in tokens."""
    file = folder / f"{paragraphs}.json"
    if not file.exists():
        content = made_up(paragraphs, 5, context_words, 2)
        file.write_text(json.dumps(content), encoding="utf-8")
    return file


def context_words(rng: random.Random) -> int:
    """Draw the words of a context of a usual length: a nonsense word has about four tokens.

    Measured on SQuADShifts' Wikipedia part, made by SQuAD's procedure: 157 tokens of GPT-2 a
    context, half of them from 114 to 185; their logarithms have mean 4.97 and deviation 0.43.
    """
    return max(10, round(rng.lognormvariate(4.97, 0.43) / 4))


def verdict(good: bool) -> str:
    """A word for a claim that holds or does not."""
    return "yes" if good else "**NO**"


def cell(text: str) -> str:
    """Text as a cell of a table."""
    return text.replace("|", "/")[:200]


@dataclass
class Part:
    """A part that runs in a process of its own."""

    name: str
    process: subprocess.Popen[bytes]
    rows: Path
    errors: Path
    began: float

    @classmethod
    def started(cls, name: str, device: str, folder: Path) -> "Part":
        """Start a part."""
        print(f"{name} ...", flush=True)
        words = [f"--device={device}", f"--part={name}", f"--folder={folder}"]
        rows, errors = folder / f"{name}.md", folder / f"{name}.txt"
        with rows.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, __file__, *words], stdout=out, stderr=err, start_new_session=True
            )
        return cls(name, process, rows, errors, time.perf_counter())

    def ended(self, seconds: float, output: Path) -> bool:
        """Wait for it, and append what it printed; whether it ended well."""
        reason = ""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            reason = f"stopped after {time.perf_counter() - self.began:.0f} s"
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        with output.open("a", encoding="utf-8") as file:
            title = (PARTS[self.name].__doc__ or self.name).strip()
            file.write(f"\n## {title}\n\n{self.rows.read_text(encoding='utf-8')}")
            if self.process.returncode:
                reason = reason or self.errors.read_text(encoding="utf-8")[-3000:].strip()
                file.write(f"\n**This part failed:**\n\n```\n{reason}\n```\n")
            file.write(f"\n{time.perf_counter() - self.began:.0f} s\n")
        return self.process.returncode == 0


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
    # What is timed runs alone; the rest side by side where there are processors for it.
    together = [name for name in names if name in RIGHT and args.device == "cuda"]
    groups = [together, *([name] for name in names if name not in together)]
    good = []
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            parts = [Part.started(name, args.device, Path(folder)) for name in group]
            good += [part.ended(max(1, ends - time.perf_counter()), args.output) for part in parts]
    text = args.output.read_text(encoding="utf-8")
    print(text)
    if not all(good) or "**NO**" in text:
        sys.exit(f"Not all is well: see {args.output}")


if __name__ == "__main__":
    main()
