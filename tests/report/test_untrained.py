"""Models that were scored without training stand beside the runs of the same test questions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lora_or_full.report.collect import collect
from lora_or_full.report.render import Table
from lora_or_full.report.sections.overview import results

MakeRun = Callable[..., Path]


def scored(run: Path, name: str, **changes: Any) -> float:
    """Gives the answers of a run to a model without training, in a folder beside it; its EM."""
    folder = run.parent / name
    folder.mkdir()
    for file in ("contexts.json", "predictions.jsonl"):
        shutil.copy(run / file, folder)
    own = json.loads((run / "results.json").read_text())
    record = {
        "name": "dev", "shots": 0, "seed": 1,
        "model": {"name": "/somewhere/gpt2", "fingerprint": "w", "weights": 1000},
        "data": {"test": own["data"]["test"], "trained_on": None},
        "test": own["test"],
    } | changes  # fmt: skip
    (folder / "results.json").write_text(json.dumps(record))
    return float(own["test"]["exact_match"])


def test_models_without_training_are_rows_of_the_results(make_run: MakeRun) -> None:
    runs = [make_run("lora", seed, share=seed / 10) for seed in (1, 2, 3)]
    zero = scored(runs[0], "zero")
    few = [scored(run, f"few{n}", shots=4, seed=n) for n, run in enumerate(runs)]
    study = collect([runs[0].parent])
    assert study.left_out == []
    table = next(block for block in results(study).blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == ["LoRA", "gpt2, 4-shot", "gpt2, zero-shot"]
    seeds, trainable, loss = (
        table.head.index(name) for name in ("seeds", "trainable", "validation loss")
    )
    by_name = {row[0]: row for row in table.rows}
    assert by_name["gpt2, zero-shot"][1] == f"{zero:.1f}"
    assert by_name["gpt2, 4-shot"][1].startswith(f"{fmean(few):.1f} ± ")
    for label, count in (("gpt2, zero-shot", "1"), ("gpt2, 4-shot", "3")):
        row = by_name[label]
        assert (row[seeds], row[trainable], row[loss]) == (count, "0", "\N{EN DASH}")
    assert "Trainable 0: scored without training" in table.caption


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scoring": "mlqa-zh"}, "scoring mlqa-zh, not test and squad"),
        ({"data": {"test": {
            "questions": 40, "paragraphs": 10, "articles": 5, "fingerprint": "other",
        }, "trained_on": None}}, "test questions other"),
        ({"test": {
            "questions": 40, "exact_match": 1.0, "exact_match_interval": [0, 9], "f1": 1.0,
            "f1_interval": [0, 9],
        }}, "does not give the exact_match"),
        ({"model": 1}, "is not as a run writes it"),
    ],
)  # fmt: skip
def test_what_is_not_comparable_is_left_out_by_name(
    make_run: MakeRun, changes: dict[str, Any], reason: str
) -> None:
    run = make_run("lora", 1)
    scored(run, "zero", **changes)
    study = collect([run.parent])
    assert study.untrained == []
    [line] = study.left_out
    assert line.startswith(f"{run.parent / 'zero'}: ")
    assert reason in line


def test_scores_by_other_rules_than_the_runs_own_are_left_out(make_run: MakeRun) -> None:
    from lora_or_full.report.sections.other_test_sets import other_test_sets

    run = make_run("lora", 1)
    scored(run, "lora_1/evaluations", model=None, scoring="mlqa-zh")
    (run / "evaluations" / "x").mkdir()
    for file in ("contexts.json", "predictions.jsonl", "results.json"):
        shutil.move(run / "evaluations" / file, run / "evaluations" / "x")
    section = other_test_sets(collect([run.parent]), None)
    assert section is not None
    assert "scoring mlqa-zh, not squad as the run's own scores" in str(section.blocks)
