"""`lora-or-full evaluate`: on its own test questions a run gets the scores that it recorded."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_or_full.cli import evaluate, main
from lora_or_full.data import squad
from lora_or_full.errors import UserError

Runs = dict[str, Path]


@pytest.fixture
def run(finished_runs: Runs, tmp_path: Path) -> Path:
    shutil.copytree(finished_runs["lora"], tmp_path / "run")
    return tmp_path / "run"


def called(*words: str | Path) -> int:
    try:
        main.main(["evaluate", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def record_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, str]]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return (
        json.loads((folder / "results.json").read_text(encoding="utf-8")),
        [json.loads(line) for line in lines],
        json.loads((folder / "contexts.json").read_text(encoding="utf-8")),
    )


def test_on_its_own_test_questions_a_run_scores_what_it_recorded(run: Path) -> None:
    own, recorded, contexts = record_of(run)
    config = own["config"]["data"]
    questions, counts = squad.check(
        squad.read_files([Path(config["test_path"])]), config["unanswerable"], config["misaligned"]
    )
    asked = {p["id"] for p in recorded}
    questions = [q for q in questions if q.id in asked]
    results = evaluate.evaluate(run, "again", questions, counts, None)
    assert results["test"] == own["test"]
    for key in ("questions", "paragraphs", "articles", "truncated", "fingerprint"):
        assert results["data"]["test"][key] == own["data"]["test"][key]
    again, predictions, texts = record_of(run / "evaluations" / "again")
    assert again == results
    assert results["data"]["trained_on"] == 0
    for p, q in zip(recorded, predictions, strict=True):
        assert texts[str(q["paragraph"])] == contexts[str(p["paragraph"])]
        assert q["log_probability"] == pytest.approx(p["log_probability"], rel=1e-4)
        for key in p.keys() - {"paragraph", "log_probability"}:
            assert p[key] == q[key]


def test_the_command_prints_scores_and_warns_of_training_questions(
    run: Path,
    finished_runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    squad_file: Any,
) -> None:
    data = squad_file(tmp_path / "new wiki.json", seed=7)
    full = tmp_path / "full"
    shutil.copytree(finished_runs["full"], full)
    assert called(run, full, data) == 0
    out, err = capsys.readouterr()
    assert "new_wiki" in out
    assert not err
    for folder in (run, full):
        results, predictions, _ = record_of(folder / "evaluations" / "new_wiki")
        assert results["test"]["questions"] == len(predictions) == 24
    training = json.loads((run / "results.json").read_text())["config"]["data"]["path"]
    assert called(run, training, "--name=training") == 0
    warning = re.search(r"was trained on (\d+) of these questions", capsys.readouterr().err)
    assert warning is not None
    assert int(warning[1]) >= 13  # ten to train on, three to choose by


def test_wrong_input_is_refused_in_one_line(
    run: Path,
    gpt2_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    squad_file: Any,
) -> None:
    data, other = (squad_file(tmp_path / f"{n}.json", seed=n) for n in (7, 8))
    assert called(run, data, "--name=x") == 0
    capsys.readouterr()
    (tmp_path / "empty.json").write_text('{"data": []}')
    for words, message in (
        ((run, other, "--name=x"), "other questions"),
        ((run, data, "--name=../x"), "--name"),
        ((run, tmp_path / "none.json"), "no file"),
        ((run, tmp_path / "empty.json"), "no question"),
        ((gpt2_folder, data), "is no run"),
        ((tmp_path / "none", data), "no folder"),
    ):
        assert called(*words) == 1
        err = capsys.readouterr().err
        assert err.startswith("Error: ")
        assert message in err
        assert err.count("\n") == 1
    with pytest.raises(UserError, match="another base model"):
        evaluate.evaluate(
            run, "y", squad.check(squad.read_files([data]), "refuse", "refuse")[0], {},
            str(run / "adapter"),
        )  # fmt: skip


def test_a_full_disk_is_reported(
    run: Path, squad_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = squad_file(run.parent / "other.json", seed=7)
    questions, counts = squad.check(squad.read_files([data]), "refuse", "refuse")
    monkeypatch.setattr(evaluate.store, "write_lines", full)
    with pytest.raises(UserError, match="evaluations/x can't be written: No space left"):
        evaluate.evaluate(run, "x", questions, counts, None)
