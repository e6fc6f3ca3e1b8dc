"""Runs are read, put into arms, and left out by name where they can't be compared."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_or_full.report.collect import collect
from lora_or_full.runs import store


def test_runs_that_differ_in_seed_and_places_alone_make_an_arm(
    make_run: Any, tmp_path: Path
) -> None:
    for mode in ("full", "lora"):
        for seed in (2, 1, 3):
            make_run(mode, seed)
    study = collect([tmp_path / "study"])
    assert [(arm.label, list(arm.runs)) for arm in study.arms] == [
        ("LoRA", [1, 2, 3]), ("full", [1, 2, 3]),
    ]  # fmt: skip
    assert study.left_out == []
    assert collect([tmp_path / "study", tmp_path / "study" / "lora_1"]).left_out == []


def test_arms_of_a_mode_are_told_apart_by_what_differs(make_run: Any, tmp_path: Path) -> None:
    def of(lr: float, rank: int) -> Any:
        def change(record: dict[str, Any]) -> None:
            record["config"] |= {"lr": lr, "rank": rank}
            record["config"]["adapter"]["r"] = rank
            for epoch in record["epochs"]:
                epoch["f1"] = 60.0 + rank + lr

        return change

    for lr in (1e-4, 1e-3):
        for rank in (4, 16):
            make_run("lora", 1, change=of(lr, rank), name=f"{lr}_{rank}")
    make_run("full", 1)
    study = collect([tmp_path])
    assert [arm.label for arm in study.arms] == [
        "LoRA, lr 0.0001, rank 4", "LoRA, lr 0.001, rank 4", "LoRA, lr 0.0001, rank 16",
        "LoRA, lr 0.001, rank 16", "full",
    ]  # fmt: skip
    best = study.best("lora")
    assert best is not None
    assert best.label == "LoRA, lr 0.001, rank 16"


def test_a_label_leaves_out_what_most_of_its_mode_share(make_run: Any, tmp_path: Path) -> None:
    def of(key: str, value: Any) -> Any:
        return lambda record: record["config"].__setitem__(key, value)

    make_run("lora", 1, name="base")
    make_run("lora", 1, change=of("max_length", 256), name="shorter")
    make_run("lora", 1, change=of("mask_prompt", False), name="open")
    assert {arm.label for arm in collect([tmp_path]).arms} == {
        "LoRA", "LoRA, mask_prompt False", "LoRA, max_length 256",
    }  # fmt: skip


def test_layers_are_named_once_and_only_where_they_matter(make_run: Any, tmp_path: Path) -> None:
    def all_linear(record: Any) -> None:
        record["config"]["model"]["target_modules"] = "all-linear"
        if record["config"]["adapter"]:
            record["config"]["adapter"]["target_modules"] = "all-linear"

    for mode in ("lora", "full"):
        make_run(mode, 1, name=mode)
        make_run(mode, 2, name=f"{mode} on all", change=all_linear)
    assert {arm.label: list(arm.runs) for arm in collect([tmp_path]).arms} == {
        "LoRA, adapter.target_modules ['c_attn']": [1],
        "LoRA, adapter.target_modules all-linear": [2],
        "full": [1, 2],
    }


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        (("model", "fingerprint"), "other", "model"),
        (("data", "source"), "other", "data files"),
        (("config", "scoring"), "mlqa-zh", "scoring"),
        (("data", "test", "fingerprint"), "other", "test questions"),
        (("data", "validation", "fingerprint"), "other", "validation questions"),
    ],
)
def test_a_run_unlike_the_others_is_left_out_by_name(
    place: tuple[str, ...], value: str, word: str, make_run: Any, tmp_path: Path
) -> None:
    def change(record: dict[str, Any]) -> None:
        for key in place[:-1]:
            record = record[key]
        record[place[-1]] = value

    make_run("lora", 1)
    make_run("lora", 2)
    unlike = make_run("full", 1, change=change)
    study = collect([tmp_path])
    assert [arm.label for arm in study.arms] == ["LoRA"]
    [line] = study.left_out
    assert line.startswith(f"{unlike}: {word} ")
    assert line.endswith(" as the 2 runs shown")


def test_what_is_broken_failed_or_missing_is_left_out_by_name(
    make_run: Any, tmp_path: Path
) -> None:
    make_run("lora", 1)
    broken = {
        "not finished (status: running)": lambda f: (
            (f / "results.json").unlink(),
            (f / "status.json").write_text('{"state": "running"}'),
        ),
        "failed (no memory)": lambda f: (
            (f / "results.json").unlink(),
            (f / "config.yaml").unlink(),
            (f / "status.json").write_text('{"state": "failed", "error": "no memory"}'),
        ),
        "results.json can't be read (JSONDecodeError": lambda f: (f / "results.json").write_text(
            "{"
        ),
        "predictions.jsonl can't be read (FileNotFoundError": lambda f: (
            f / "predictions.jsonl"
        ).unlink(),
        "results.json is not as a run writes it: cost: Field required": lambda f: _without(
            f, "cost"
        ),
        "results.json is not as a run writes it: parameters: Field required": lambda f: _without(
            f, "parameters"
        ),
        "results.json is not as a run writes it: epochs: Field required": lambda f: _without(
            f, "epochs"
        ),
        "test.f1: Input should be": lambda f: _result(
            f, "test", {"exact_match": 1, "f1": math.nan}
        ),
        "epochs.0.train_loss: Field required": lambda f: _result(f, "epochs", [{"epoch": 1}]),
        "record: Value error, best_epoch names no epoch": lambda f: _result(f, "best_epoch", 3),
        "record: Value error, epochs are not numbered from 1": lambda f: _record(
            f, lambda r: r["epochs"].reverse()
        ),
        "cost.samples: Input should be less than": lambda f: _record(
            f, lambda r: r["cost"].update(samples=10**30)
        ),
        "config.seed: Input should be a valid integer": lambda f: _record(
            f, lambda r: r["config"].update(seed="1")
        ),
        "results.json can't be read (RecursionError": lambda f: (f / "results.json").write_text(
            "[" * 10**5
        ),
        "predictions.jsonl holds no answer": lambda f: _cut(f, 0),
        "predictions.jsonl has a question twice": lambda f: _answer(f, id="q001"),
        "predictions.jsonl is not as a run writes it: 0.log_probability": lambda f: _answer(
            f, log_probability=math.nan
        ),
        "predictions.jsonl is not as a run writes it: 0.answers": lambda f: _answer(f, answers=[]),
        "contexts.json lacks a paragraph": lambda f: _answer(f, paragraph=99),
        "0.prediction: Value error, holds half a character": lambda f: _answer(
            f, prediction="\ud800"
        ),
        "contexts.json is not as a run writes it": lambda f: (f / "contexts.json").write_text("[]"),
        "predictions.jsonl does not give the exact_match": lambda f: _cut(f, 7),
        "damaged: predictions.jsonl (resume=": lambda f: _sealed(f, "predictions.jsonl"),
        "damaged: results.json": lambda f: _sealed(f, "results.json"),
        "results.json is not as a run writes it: record": lambda f: (f / "results.json").write_text(
            "[1]"
        ),
    }
    for number, spoil in enumerate(broken.values()):
        spoil(make_run("full", number))
    study = collect([tmp_path])
    assert [arm.label for arm in study.arms] == ["LoRA"]
    assert len(study.left_out) == len(broken)
    for number, reason in enumerate(broken):
        [line] = [line for line in study.left_out if f"full_{number}:" in line]
        assert reason in line


def _sealed(folder: Path, name: str) -> None:
    """Seal a run, and change a letter of a file that stays what it was otherwise."""
    store.write_checksums(folder, {file.name: file for file in folder.iterdir()})
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("Person", "person", 1).replace("gpt2", "gpt3", 1))


def _without(folder: Path, key: str) -> None:
    _record(folder, lambda record: record.pop(key))


def _record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "results.json").read_text())
    change(record)
    (folder / "results.json").write_text(json.dumps(record))


def _result(folder: Path, key: str, value: Any) -> None:
    _record(folder, lambda record: record.update({key: value}))


def _answer(folder: Path, **more: Any) -> None:
    """Change the first answer, which stays written as JSON."""
    file = folder / "predictions.jsonl"
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | more), *others]) + "\n")


def _cut(folder: Path, lines: int) -> None:
    file = folder / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))


def test_the_same_run_twice_counts_once(make_run: Any, tmp_path: Path) -> None:
    make_run("lora", 1)
    twin = make_run("lora", 1, name="twin", change=of_commit("d" * 40))
    os.utime(twin / "results.json", (2e9, 2e9))  # the later one
    study = collect([tmp_path])
    assert [run.folder for arm in study.arms for run in arm.runs.values()] == [twin]
    [line] = study.left_out
    assert line.startswith(f"{tmp_path / 'study' / 'lora_1'}: the same run as {twin}")
    assert "another commit" in line


def of_commit(commit: str) -> Any:
    def change(record: dict[str, Any]) -> None:
        record["environment"]["commit"] = commit

    return change


def test_what_a_sweep_never_began_is_named(make_run: Any, tmp_path: Path) -> None:
    make_run("lora", 1)
    make_run("lora", 2, name="lora_1-2")
    (tmp_path / "study" / "sweep.json").write_text(
        json.dumps({"runs": ["lora_1", "lora_1", "lora_1", "full_1"]})
    )
    found = collect([tmp_path]).left_out
    place = tmp_path / "study"
    assert found == [
        f"{place / n}: it was planned, but never started" for n in ("lora_1", "full_1")
    ]


def test_a_name_that_ends_in_a_number_is_not_taken_for_a_second_run(
    make_run: Any, tmp_path: Path
) -> None:
    make_run("lora", 1, name="mine-1")
    make_run("full", 1, name="mine-2")
    plan = {"runs": ["mine-1", "mine-2"]}
    (tmp_path / "study" / "sweep.json").write_text(json.dumps(plan))
    assert collect([tmp_path, tmp_path / "study"]).left_out == []


def test_lines_end_at_newlines_only(make_run: Any, tmp_path: Path) -> None:
    folder = make_run("lora", 1)
    file = folder / "predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["question"] = "Who\u2028is\x85it?"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert collect([tmp_path]).left_out == []


def test_the_best_arm_is_one_with_the_most_seeds(make_run: Any, tmp_path: Path) -> None:
    def better(record: dict[str, Any]) -> None:
        record["config"]["lr"] = 0.5
        for epoch in record["epochs"]:
            epoch["f1"] = 99.0

    make_run("lora", 1)
    make_run("lora", 2)
    make_run("lora", 1, change=better, name="better")
    best = collect([tmp_path]).best("lora")
    assert best is not None
    assert list(best.runs) == [1, 2]
