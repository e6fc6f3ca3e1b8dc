"""Compare this project with plain transformers + PEFT and with TRL: speed, memory, utilisation.

python bench/compare.py MODEL_FOLDER QUESTIONS.json --output=bench.md

MODEL_FOLDER holds a GPT-2, QUESTIONS.json is in SQuAD's format; of each paragraph with five or more
questions the first five are used. Every measurement is a separate process; the sides of a
comparison alternate. Peers: pip install -e '.[bench]'.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from material import made_up, origin

from lora_or_full.config import compose
from lora_or_full.modeling.precision import resolve_precision

SIDES = Path(__file__).with_name("sides.py")
CPU = compose.defaults().trainer.model_copy(update={"accelerator": "cpu"})
NATIVE_BF16 = resolve_precision(CPU, 768) == "bf16-mixed"
WITH_TRL = find_spec("trl") is not None
Spec = dict[str, Any]
Result = dict[str, float]

OURS, PLAIN, TRL, GENERATE = "this project", "plain", "trl", "generate"
PARAGRAPH: Spec = {"draw_by": "paragraph", "batch_size": 5, "dropout": 0.0}
RANDOM: Spec = {"draw_by": "question", "batch_size": 4, "dropout": 0.0}
LORA: Spec = {"what": "training", "mode": "lora"}
FULL: Spec = {"what": "training", "mode": "full"}
EVALUATION: Spec = PARAGRAPH | {"what": "evaluation", "mode": "lora"}
FP32, BF16 = {"precision": "fp32"}, {"precision": "bf16"}


def sides(spec: Spec, *names: str) -> list[Spec]:
    """The same measurement for each side."""
    return [spec | {"side": name} for name in names]


# Of each comparison: the number of questions, the same ones for each side, and the sides; the first
# is the reference of the ratios.
TABLE: dict[str, tuple[int, list[Spec]]] = {
    "LoRA, by paragraph, fp32": (100, sides(LORA | PARAGRAPH | FP32, PLAIN, TRL, OURS)),
    "LoRA, by paragraph, bf16": (100, sides(LORA | PARAGRAPH | BF16, PLAIN, TRL, OURS)),
    "LoRA, random questions, fp32": (40, sides(LORA | RANDOM | FP32, PLAIN, OURS)),
    "LoRA, random questions, bf16": (40, sides(LORA | RANDOM | BF16, PLAIN, OURS)),
    "full, by paragraph, fp32": (60, sides(FULL | PARAGRAPH | FP32, PLAIN, OURS)),
    "the preset fast, against the reference's recipe": (
        40,
        [
            LORA | RANDOM | FP32 | {"side": PLAIN, "dropout": 0.1},
            LORA | PARAGRAPH | FP32 | {"side": OURS, "preset": "fast"},
        ],
    ),
    "evaluation, 16 new tokens, fp32": (40, sides(EVALUATION | FP32, GENERATE, OURS)),
    "evaluation, 16 new tokens, bf16, against fp32": (
        40,
        [EVALUATION | FP32 | {"side": GENERATE}, EVALUATION | BF16 | {"side": OURS}],
    ),
}
GROWTH = (500, 1000, 2000, 4000)  # numbers of questions, each with its own context


def measure(spec: Spec, model: str, data: Path, cache: Path) -> Result:
    """Measure in a new process."""
    spec = spec | {"model": model, "data": str(data), "cache": str(cache)}
    process = subprocess.run(
        [sys.executable, str(SIDES), json.dumps(spec)], capture_output=True, text=True
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not lines:
        sys.exit(f"This measurement failed: {spec}\n{process.stderr[-3000:]}")
    result: Result = json.loads(lines[-1].removeprefix("RESULT "))
    print(f"  {spec['side']}: {result['rate']:.2f}/s, {result['peak'] / 1e6:.0f} MB", flush=True)
    return result


def compare(name: str, rounds: int, model: str, data: Path, cache: Path) -> list[str]:
    """Measure one comparison, its sides alternating; the lines of its table."""
    print(name, flush=True)
    questions, specs = TABLE[name]
    specs = [spec for spec in specs if WITH_TRL or spec["side"] != TRL]
    results: list[list[Result]] = [[] for _ in specs]
    for _ in range(rounds):
        for spec, found in zip(specs, results, strict=True):
            found.append(measure(spec | {"questions": questions}, model, data, cache))
    lines = []
    for spec, found in zip(specs, results, strict=True):
        ratios = [own["rate"] / base["rate"] for own, base in zip(found, results[0], strict=True)]
        memory = [own["peak"] / base["peak"] for own, base in zip(found, results[0], strict=True)]
        cells = [
            name,
            spec["side"],
            spread((own["rate"] for own in found), ".2f"),
            spread(ratios, ".2f"),
            spread((own["peak"] / 1e6 for own in found), ".0f"),
            spread(memory, ".2f"),
            spread((100 * own["utilisation"] for own in found), ".0f")
            if "utilisation" in found[0]
            else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def grow(rounds: int, model: str, cache: Path, folder: Path) -> list[str]:
    """Measure how time and memory grow with the number of questions; the lines of a table."""
    found: dict[int, list[Result]] = {count: [] for count in GROWTH}
    for count in GROWTH:
        text = json.dumps(made_up(count * 3 // 2 + 80, 1, lambda rng: rng.randrange(4, 8), 1))
        (folder / f"{count}.json").write_text(text, encoding="utf-8")
    spec = LORA | RANDOM | (BF16 if NATIVE_BF16 else FP32) | {"side": OURS}
    for _ in range(rounds):  # alternating, so that other load on the machine is no growth
        for count, results in found.items():
            file = folder / f"{count}.json"
            results.append(measure(spec | {"questions": count}, model, file, cache))
    first = found[GROWTH[0]]
    return [
        f"| {count} | {spread((1000 / own['rate'] for own in results), '.1f')} | "
        + spread((a["rate"] / b["rate"] for a, b in zip(first, results, strict=True)), ".3f")
        + f" | {spread((own['peak'] / 1e6 for own in results), '.0f')} |"
        for count, results in found.items()
    ]


def five_each(source: Path) -> dict[str, Any]:
    """The paragraphs of a SQuAD file that have five questions or more, with the first five."""
    content = json.loads(source.read_text(encoding="utf-8"))
    for article in content["data"]:
        article["paragraphs"] = [
            paragraph | {"qas": paragraph["qas"][:5]}
            for paragraph in article["paragraphs"]
            if len(paragraph["qas"]) >= 5
        ]
    content["data"] = [article for article in content["data"] if article["paragraphs"]]
    return content


def spread(values: Iterable[float], form: str) -> str:
    """Median (minimum to maximum)."""
    values = list(values)
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def about(model: str, data: Path, rounds: int) -> str:
    """Say what the figures were measured with, and how to read them."""
    return (
        f"{Path(model).name}, {data.name}, {rounds} rounds; {origin(torch.device('cpu'))}.\n"
        "Each cell: median (minimum-maximum). Ratios are within a round, to the first line of the "
        "comparison.\nMemory is the peak above that of a process that has imported the libraries. "
        "Utilisation is the rate of floating-point operations relative to that of a matrix product."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("bench.md"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="run only the comparisons whose name contains this"
    )
    parser.add_argument(
        "--growth", action="store_true", help="measure how cost grows with the questions"
    )
    args = parser.parse_args()
    if not Path(args.model, "config.json").is_file() or not args.data.is_file():
        parser.error("MODEL_FOLDER must hold a config.json, and QUESTIONS.json must exist.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        if args.growth:
            columns = ["questions", "ms per question", "ratio to the first", "peak MB"]
            lines = grow(args.rounds, args.model, cache, folder)
        else:
            file = folder / "five.json"
            file.write_text(json.dumps(five_each(args.data)), encoding="utf-8")
            columns = [
                "comparison", "side", "questions/s", "ratio", "memory, MB", "ratio",
                "utilisation, %",
            ]  # fmt: skip
            names = [name for name in TABLE if args.only in name]
            if not WITH_TRL:
                print("TRL is not installed (pip install -e '.[bench]'): its side is skipped.")
            if not NATIVE_BF16:
                print("This processor is not faster in bf16: comparisons in bf16 are skipped.")
                names = [name for name in names if "bf16" not in name]
            lines = [
                line
                for name in names
                for line in compare(name, args.rounds, args.model, file, cache)
            ]
    table = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *lines]
    text = "\n".join([*table, "", about(args.model, args.data, args.rounds), ""])
    args.output.write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    main()
