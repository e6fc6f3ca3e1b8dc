"""Compare the weights, answers and scores of two runs: python bench/same.py RUN OTHER

Both are finished runs with the same test questions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file


def weights(run: Path) -> dict[str, NDArray[Any]]:
    """Exported weights of a run by name."""
    files = [file for name in ("adapter", "model") for file in run.glob(f"{name}/*.safetensors")]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def answers(run: Path) -> dict[str, dict[str, Any]]:
    """Predictions of a run by question id."""
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return {p["id"]: p for p in map(json.loads, filter(None, lines))}


def differences(run: Path, other: Path) -> dict[str, float]:
    """Differences of two runs, all zero if they are equal.

    Log-probabilities are compared where the answers are equal.
    """
    own, others = weights(run), weights(other)
    asked, asked_other = answers(run), answers(other)
    if own.keys() != others.keys() or asked.keys() != asked_other.keys():
        raise SystemExit(f"{run} and {other} differ in names of weights or test questions.")
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
    for name, value in differences(args.run, args.other).items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
