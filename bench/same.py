"""How far apart two runs are: python bench/same.py RUN OTHER

The weights, answers and scores that two finished runs of the same test questions left.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file


def weights(run: Path) -> dict[str, NDArray[Any]]:
    """What the run exported, by name."""
    files = [file for place in ("adapter", "model") for file in run.glob(f"{place}/*.safetensors")]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def answers(run: Path) -> dict[str, dict[str, Any]]:
    """The predictions of the run, by question id."""
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return {p["id"]: p for p in map(json.loads, filter(None, lines))}


def apart(run: Path, other: Path) -> dict[str, float]:
    """The distance of two runs, each figure zero where they are the same.

    Log-probabilities are held against each other where the answers are equal.
    """
    own, others = weights(run), weights(other)
    asked, asked_other = answers(run), answers(other)
    if own.keys() != others.keys() or asked.keys() != asked_other.keys():
        raise SystemExit(f"{run} and {other} have other weights, or were asked other questions.")
    pairs = [(asked[name], asked_other[name]) for name in asked]
    alike = [(a, b) for a, b in pairs if a["prediction"] == b["prediction"]]
    test, test_other = (json.loads((r / "results.json").read_text())["test"] for r in (run, other))
    return {
        "weights, largest difference": max(
            float(np.abs(own[name].astype(float) - others[name].astype(float)).max())
            for name in own
        ),
        "log-probabilities, largest difference": max(
            (
                abs(a["log_probability"] - b["log_probability"])
                for a, b in alike
                if a["log_probability"] is not None and b["log_probability"] is not None
            ),
            default=0.0,
        ),
        "answers that differ": len(pairs) - len(alike),
        "of": len(pairs),
        "EM": test_other["exact_match"] - test["exact_match"],
        "F1": test_other["f1"] - test["f1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    args = parser.parse_args()
    for run in (args.run, args.other):
        if not (run / "results.json").is_file():
            parser.error(f"{run} is no finished run.")
    for name, value in apart(args.run, args.other).items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
