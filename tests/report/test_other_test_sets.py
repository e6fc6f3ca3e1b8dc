"""The report's section on other test sets: who is in it, and what its numbers are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_or_full.report.collect import collect
from lora_or_full.report.render import Points, Table
from lora_or_full.report.sections import other_test_sets
from lora_or_full.report.stats.comparison import compare_arms

MakeRun = Callable[..., Path]


def evaluated(run: Path, wrong: int, name: str = "poems", known: int = 0) -> float:
    """Gives a run scores on another test set, of 40 questions all but so many right; its EM."""
    folder = run / "evaluations" / name
    folder.mkdir(parents=True)
    shutil.copy(run / "contexts.json", folder)
    predictions = [
        json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()
    ]
    for number, p in enumerate(predictions):
        score = 0.0 if number < wrong else 100.0
        p |= {"exact_match": score, "f1": score, "prediction": "Mars"}
    mean = fmean(p["exact_match"] for p in predictions)
    record: dict[str, Any] = {
        "name": name,
        "data": {
            "test": {"questions": 40, "paragraphs": 10, "articles": 5, "fingerprint": name},
            "trained_on": known,
        },
        "test": {
            "questions": 40,
            "exact_match": mean,
            "exact_match_interval": [0, 100],
            "f1": mean,
            "f1_interval": [0, 100],
        },
    }
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
    return mean


def section(place: Path) -> list[Any]:
    study = collect([place])
    found = other_test_sets.other_test_sets(study, compare_arms(study, 1.0))
    return [] if found is None else found.blocks


def test_without_other_test_sets_there_is_no_section(make_run: MakeRun) -> None:
    assert section(make_run("lora", 1).parent) == []


def test_scores_drops_and_differences_are_of_the_answers(make_run: MakeRun) -> None:
    matches: dict[str, list[float]] = {"lora": [], "full": []}
    own: dict[str, list[float]] = {"lora": [], "full": []}
    for seed in (1, 2, 3):
        for mode, wrong in (("lora", 5 * seed), ("full", 2 * seed)):
            run = make_run(mode, seed)
            matches[mode].append(evaluated(run, wrong))
            results = json.loads((run / "results.json").read_text())
            own[mode].append(results["test"]["exact_match"])
    blocks = section(run.parent)
    scores, gaps = (block for block in blocks if isinstance(block, Table))
    rows = {row[0]: row for row in scores.rows}
    assert list(rows) == ["LoRA, own test set", "LoRA, poems", "full, own test set", "full, poems"]
    assert rows["LoRA, poems"][2].startswith(f"{fmean(matches['lora']):.1f} ± ")
    drop = fmean(matches["full"]) - fmean(own["full"])
    assert rows["full, poems"][4] == f"{drop:+.2f}".replace("-", "\N{MINUS SIGN}")
    apart = fmean(matches["lora"]) - fmean(matches["full"])
    assert gaps.rows[0][:3] == ["poems, EM", "3", f"{apart:+.2f}".replace("-", "\N{MINUS SIGN}")]
    assert all(cell.startswith("[") for cell in gaps.rows[0][3:])


def test_runs_that_lack_a_test_set_are_not_counted_for_it(make_run: MakeRun) -> None:
    evaluated(make_run("lora", 1), 5)
    place = make_run("lora", 2).parent
    table = section(place)[1]
    assert [row[:2] for row in table.rows] == [["LoRA, own test set", "2"], ["LoRA, poems", "1"]]


def test_what_is_broken_or_known_is_named(make_run: MakeRun) -> None:
    run = make_run("lora", 1)
    evaluated(run, 5, known=7)
    evaluated(run, 6, "cut")
    (run / "evaluations" / "cut" / "predictions.jsonl").write_text('{"id": "a"')
    evaluated(run, 7, "false")
    file = run / "evaluations" / "false" / "results.json"
    record = json.loads(file.read_text())
    record["test"]["exact_match"] = 1.0
    file.write_text(json.dumps(record))
    notes = next(block for block in section(run.parent) if isinstance(block, Points)).items
    assert len(notes) == 3
    assert "7 questions of poems" in " ".join(notes)
    assert "can't be read" in " ".join(notes)
    assert "does not give the exact_match" in " ".join(notes)
