"""`lora-or-full evaluate`: on its own test questions a run gets the scores that it recorded."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import ANY

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_or_full.cli import evaluate, main
from lora_or_full.data import squad
from lora_or_full.data.splits import Splits
from lora_or_full.errors import UserError
from lora_or_full.runs.reader import finished_record

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


def evaluated(
    run: Path, name: str, questions: list[squad.Question], counts: Any, base: str | None = None
) -> dict[str, Any]:
    test_set = evaluate.TestSet(questions, counts, [], None)
    output = run / "evaluations" / name
    no_examples = evaluate.Examples([], 1)
    return evaluate.evaluate(str(run), name, output, test_set, no_examples, base, {})


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
    results = evaluated(run, "again", questions, counts)
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
        ((run.parent, data), "is no run"),
        ((run, "none/such/data"), "no such file"),
        ((gpt2_folder, data, "--scoring=mlqa"), "scoring=mlqa: must be squad, or"),
        ((run, gpt2_folder, gpt2_folder, data, "--output=x"), "--output"),
        ((gpt2_folder, data, "--shots=-1"), "--shots=-1: must be"),
        ((gpt2_folder, data, "--shots=2"), "--examples=FILE names answered questions"),
        ((gpt2_folder, data, "--shots=2", f"--examples={data}"), "has 0 paragraphs"),
        ((gpt2_folder, data, "--shots=8", f"--examples={other}"), "the model reads 256"),
        ((tmp_path / "none", data), "no folder"),
    ):
        assert called(*words) == 1
        err = capsys.readouterr().err
        assert err.startswith("Error: ")
        assert message in err
        assert err.count("\n") == 1
    questions = squad.check(squad.read_files([data]), "refuse", "refuse")[0]
    with pytest.raises(UserError, match="another base model"):
        evaluated(run, "y", questions, {}, str(run / "adapter"))


def test_a_full_disk_is_reported(
    run: Path, squad_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = squad_file(run.parent / "other.json", seed=7)
    questions, counts = squad.check(squad.read_files([data]), "refuse", "refuse")
    monkeypatch.setattr(evaluate.store, "write_lines", full)
    with pytest.raises(UserError, match="evaluations/x can't be written: No space left"):
        evaluated(run, "x", questions, counts)


def test_a_model_is_scored_on_the_test_questions_of_a_run_as_before_its_training(
    run: Path, gpt2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "zero"
    assert called(gpt2_folder, run, f"--output={output}", "--metrics=exact_match,f1,rouge_l") == 0
    own, recorded, _ = record_of(run)
    results, predictions, _ = record_of(output)
    rouge = {name: results["test"].pop(name) for name in ("rouge_l", "rouge_l_interval")}
    assert results["test"] == own["before"]
    assert own["data"]["test"].pop("dropped") == 0
    for key in ("answers_too_long", "notes", "split_by"):  # of runs alone
        del own["data"]["test"][key]
    assert rouge["rouge_l"] == pytest.approx(fmean(p["rouge_l"] for p in predictions))
    assert results["data"]["test"] == dict(own["data"]["test"], in_all_files=ANY)
    assert [p["id"] for p in predictions] == [p["id"] for p in recorded]
    assert results["model"]["weights"] > 1000
    assert (results["shots"], results["scoring"]) == (0, "squad")
    assert str(output) in capsys.readouterr().out


def test_an_adapter_made_elsewhere_is_scored_like_the_run_that_made_it(
    run: Path, gpt2_folder: Path, tmp_path: Path
) -> None:
    adapter, output = tmp_path / "my-adapter", tmp_path / "scores"
    shutil.copytree(run / "adapter", adapter)
    assert called(adapter, run, f"--output={output}", f"--model={gpt2_folder}") == 0
    assert record_of(output)[0]["test"] == record_of(run)[0]["test"]


def test_examples_are_drawn_from_the_training_articles_by_a_seed(
    run: Path, gpt2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        words = ("--shots=1", f"--seed={seed}", f"--output={tmp_path / name}")
        assert called(gpt2_folder, run, *words) == 0
        results, predictions, _ = record_of(tmp_path / name)
        assert (results["name"], results["shots"]) == (f"run_1shot_seed{seed}", 1)
        drawn.append((results["examples"], predictions))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    config = finished_record(run).config
    splits = Splits(config.data, 1, Path(config.cache_dir)).read().splits
    titles = {q.title for q in splits["train"]}
    assert {
        f"Article {name.rsplit('-', 2)[0]}" for name, *_ in (drawn[0][0], drawn[2][0])
    } <= titles
    capsys.readouterr()
    assert called(gpt2_folder, run, "--shots=2", f"--output={tmp_path / 'long'}") == 0
    assert "read a shortened context for" in capsys.readouterr().err


def test_examples_stand_before_each_prompt(gpt2_folder: Path, tmp_path: Path) -> None:
    def written(name: str, people: str) -> Path:
        paragraphs = [
            {
                "context": f"{person} built mill {n}.",
                "qas": [
                    {
                        "id": f"{person}{q}",
                        "question": q,
                        "answers": [{"text": person, "answer_start": 0}],
                    }
                    for q in ("Who?", "Who built it?")
                ],
            }
            for n, person in enumerate(people.split())
        ]
        content = {"version": "1.1", "data": [{"title": name, "paragraphs": paragraphs}]}
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    data, others = (
        written("data.json", "Ada Bruno Carla"),
        written("others.json", "Ada Emeka Frida"),
    )
    words = ("--shots=2", f"--examples={others}", f"--output={tmp_path / 'scores'}")
    assert called(gpt2_folder, data, *words) == 0
    results, predictions, contexts = record_of(tmp_path / "scores")
    assert {name.rstrip("?").split("Who")[0] for name in results["examples"]} == {"Emeka", "Frida"}
    questions = {q.id: q for q in squad.read_files([others])}
    before = "".join(
        f"Context: {q.context}\nQuestion: {q.question}\nAnswer: {q.answers[0]}\n"
        for q in (questions[name] for name in results["examples"])
    )
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    for p in predictions:
        asked = f"Context: {contexts[str(p['paragraph'])]}\nQuestion: {p['question']}\nAnswer:"
        ids = tokenizer(before + asked, return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert p["prediction"] == text.lstrip(" ").split("\n")[0].strip()
        assert not p["context_cut"]
