"""`lora-or-full ask`: the answers are the recorded ones; several runs, files, wrong input."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configs import questions_of
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import experiment
from lora_or_full.cli import ask, main
from lora_or_full.config.schema import validate
from lora_or_full.data.squad import Question
from lora_or_full.errors import UserError
from lora_or_full.generation.predictor import Reply, load

Runs = dict[str, Path]
CONTEXT = "In 1200, Ada built the bridge of Oslo."


def recorded(run: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    contexts = json.loads((run / "contexts.json").read_text(encoding="utf-8"))
    return [json.loads(line) for line in lines], contexts


@pytest.fixture
def context_file(tmp_path: Path) -> str:
    (tmp_path / "context.txt").write_text(CONTEXT)
    return str(tmp_path / "context.txt")


Output = tuple[int, str, str]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """Run the command; gives its exit code, output and errors."""

    def call(*words: str | Path, typed: str = "") -> Output:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        code = 0
        try:
            main.main(["ask", *map(str, words)])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_answers_are_those_that_the_run_recorded(mode: str, finished_runs: Runs) -> None:
    predictions, contexts = recorded(finished_runs[mode])
    assert len({p["log_probability"] for p in predictions}) > 2  # they depend on the context
    run = load(finished_runs[mode], None)
    many = run.answers(questions_of(predictions, contexts))
    for p, (row, answer) in zip(predictions, many, strict=True):
        one = run.ask(run.read(row["context"]), row["question"], 0)[0]
        assert answer is not None
        assert answer.text == one.text == p["prediction"]
        assert answer.log_probability == pytest.approx(p["log_probability"], rel=1e-4)
        assert (one.ended, row["context_cut"]) == (p["ended"], p["context_cut"])


@pytest.mark.parametrize("kind", ["llama", "bf16-mixed", "bf16-true"])
def test_so_they_are_for_another_architecture_or_precision(
    kind: str, settings: dict[str, Any], llama_folder: Path, tmp_path: Path
) -> None:
    settings["lr"] = 0.1
    if kind == "llama":
        settings["model"] |= {"name": str(llama_folder), "config": {}}
        settings["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    else:
        settings["trainer"]["precision"] = kind
    experiment.run(validate(settings), tmp_path / "run")
    predictions, contexts = recorded(tmp_path / "run")
    run = load(tmp_path / "run", None)
    questions = questions_of(predictions, contexts)
    for p, (_, answer) in zip(predictions, run.answers(questions), strict=True):
        assert answer is not None
        assert answer.text == p["prediction"]
        assert answer.log_probability == pytest.approx(p["log_probability"], rel=1e-4)
    # After few steps in bfloat16 all answers may be one text, but not equally probable.
    assert len({p["log_probability"] for p in predictions}) > 2
    if kind == "llama":  # bfloat16 results depend on the batch
        alone = [run.ask(run.read(q.context), q.question, 0)[0] for q in questions]
        assert [answer.text for answer in alone] == [p["prediction"] for p in predictions]


def test_a_file_of_questions_gives_predictions_in_the_official_format(
    finished_runs: Runs, tmp_path: Path, command: Callable[..., Output]
) -> None:
    settings = json.loads((finished_runs["lora"] / "results.json").read_text())["config"]
    output = tmp_path / "predictions.json"
    data = json.loads(Path(settings["data"]["test_path"]).read_text())
    data["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []  # as in a secret test set
    (tmp_path / "questions.json").write_text(json.dumps(data))
    code, out, _ = command(
        finished_runs["lora"], "--data", tmp_path / "questions.json", "--output", output
    )
    given = json.loads(output.read_text(encoding="utf-8"))
    assert code == 0
    assert str(output) in out
    assert len(given) == 24
    predictions, _ = recorded(finished_runs["lora"])
    assert {p["id"]: p["prediction"] for p in predictions}.items() <= given.items()


def test_two_runs_answer_side_by_side(
    finished_runs: Runs, context_file: str, command: Callable[..., Output]
) -> None:
    code, out, _ = command(*finished_runs.values(), "--context", context_file, "Who was it?")
    assert code == 0
    assert out.index("lora:") < out.index("full:")
    assert out.count("probability") == 2


def test_of_several_runs_the_unfinished_ones_are_named_and_left_out(
    finished_runs: Runs, context_file: str, tmp_path: Path, command: Callable[..., Output]
) -> None:
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "config.yaml").write_text("mode: lora")
    (stopped / "status.json").write_text(json.dumps({"state": "interrupted"}))
    asked = ["--context", context_file, "Who was it?"]
    code, out, err = command(stopped, finished_runs["full"], *asked)
    assert code == 0
    assert out.count("probability") == 1
    assert err.startswith(f"Left out: {stopped} is a run that is not finished (interrupted).")
    assert f"resume='{stopped}'" in refusal(command(stopped, stopped, *asked))


def test_an_answer_that_something_speaks_against_is_shown_as_doubtful() -> None:
    sound = Reply("Ada", 0.5, True, [(0, 3)])
    assert ask.lines([sound, Reply("Bo", 0.1, True, [])], "Ada")[0] == "Ada"
    other = sound._replace(text="Bo", probability=0.6)
    assert ask.lines([sound, other], "Ada")[0] == "Ada   (doubtful: less probable than Bo)"
    cut = Reply("Cy", 0.5, False, [])
    expected = "Cy   (doubtful: not in the context; cut off at the length limit)"
    assert ask.lines([cut], "Ada")[0] == expected


def test_a_conversation_answers_each_line(
    finished_runs: Runs, context_file: str, command: Callable[..., Output]
) -> None:
    code, out, err = command(
        finished_runs["full"], "--context", context_file, typed="Who was it?\n\nWhere?\n"
    )
    assert code == 0
    assert out.count("probability") == 2
    assert "empty" in err


def test_the_context_may_be_piped_in(finished_runs: Runs, command: Callable[..., Output]) -> None:
    code, out, _ = command(finished_runs["full"], "--context", "-", "Who was it?", typed=CONTEXT)
    assert code == 0
    assert "probability" in out


def test_an_adapter_and_a_model_made_elsewhere_can_be_asked(
    gpt2_folder: Path, finished_runs: Runs, tmp_path: Path
) -> None:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gpt2_folder),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["c_fc"], fan_in_fan_out=True),
    )
    adapted.save_pretrained(str(tmp_path / "own"), save_embedding_layers=False)
    for folder in (tmp_path / "own", finished_runs["lora"] / "adapter", gpt2_folder):
        run = load(folder, str(gpt2_folder))
        assert run.record is None
        assert run.ask(run.read(CONTEXT), "Who was it?", 3)
        [(_, answer)] = run.answers([Question("a", "t", CONTEXT, "Who was it?", [], [])])
        assert answer is not None


def test_a_shortened_context_is_reported(
    finished_runs: Runs, tmp_path: Path, command: Callable[..., Output]
) -> None:
    (tmp_path / "long.txt").write_text(CONTEXT * 50)
    code, _, err = command(finished_runs["full"], "--context", tmp_path / "long.txt", "Who was it?")
    assert code == 0
    assert "of the context's" in err


def test_at_most_five_positions_are_printed() -> None:
    reply = Reply("Ada", 0.5, True, [(n, n + 3) for n in range(0, 40, 4)])
    assert (
        "characters 0-3, 4-7, 8-11, 12-15, 16-19 and 5 more:" in ask.lines([reply], "Ada " * 10)[2]
    )
    assert "more" not in ask.lines([reply._replace(spans=[(0, 3)])], "Ada")[2]


def test_an_answer_can_not_control_the_terminal() -> None:
    assert ask.printable("a\x1b[2Jb\nc") == "a\ufffd[2Jb c"


def refusal(output: Output) -> str:
    code, out, err = output
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return err


def test_wrong_input_is_refused_in_one_line(
    finished_runs: Runs, context_file: str, tmp_path: Path, command: Callable[..., Output]
) -> None:
    run = finished_runs["full"]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"Malm\xf6")
    (tmp_path / "wide.txt").write_bytes("Oslo".encode("utf-16-le"))
    for words, message in (
        ((), "Which run"),
        (("--context", context_file), "Which run"),
        ((run,), "Give --context"),
        ((run, "--context", context_file, ""), "question is empty"),
        ((run, "--context", context_file, "Who", "was", "it"), "quotation marks"),
        ((run, "runs/none", "--context", context_file), "no folder runs/none"),
        ((run, "--context", tmp_path / "none.txt", "Who?"), "can't be read"),
        ((run, "--context", tmp_path / "empty.txt", "Who?"), "is empty"),
        ((run, "--context", tmp_path / "latin.txt", "Who?"), "no text in UTF-8"),
        ((run, "--context", tmp_path / "wide.txt", "Who?"), "no text"),
        ((run, "--context", context_file, "Who?" * 2000), "ask a shorter one"),
        ((run, "--context", "-"), "give the question too"),
        ((run, "Who?", "--data", "x.json"), "takes one RUN"),
        ((run, "--data", tmp_path / "none.json"), "no file"),
        ((run.parent, "--context", context_file, "Who?"), "Name one of the runs in it: full, lora"),
    ):
        assert message in refusal(command(*words))


def test_an_unfinished_or_damaged_run_is_refused(
    finished_runs: Runs, llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    status = folder / "status.json"
    status.write_text(json.dumps({"state": "failed", "error": "no room"}))
    with pytest.raises(UserError, match="failed .no room."):
        load(folder, None)
    status.write_text(json.dumps({"state": "interrupted"}))
    with pytest.raises(UserError, match="resume="):
        load(folder, None)
    shutil.copy(finished_runs["lora"] / "results.json", folder)
    with pytest.raises(UserError, match="has no adapter/"):
        load(folder, None)
    (folder / "adapter").mkdir()
    with pytest.raises(UserError, match="no adapter in .* missing"):
        load(folder, None)
    with pytest.raises(UserError, match="another base model"):
        load(finished_runs["lora"], str(llama_folder))
    with pytest.raises(UserError, match="not available.*--model"):
        load(finished_runs["lora"], str(tmp_path / "nowhere"))
    shutil.copytree(finished_runs["full"], tmp_path / "damaged")
    with (tmp_path / "damaged" / "model" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="model/model.safetensors. .*resume="):
        load(tmp_path / "damaged", None)
    (tmp_path / "damaged" / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model/model.safetensors. .*resume="):
        load(tmp_path / "damaged", None)
    (folder / "results.json").write_text("{}")
    with pytest.raises(UserError, match="not as a run writes it"):
        load(folder, None)


def test_an_adapter_of_another_base_or_kind_is_refused(
    gpt2_folder: Path, llama_folder: Path, finished_runs: Runs, tmp_path: Path
) -> None:
    adapter = finished_runs["lora"] / "adapter"
    with pytest.raises(UserError, match="does not fit the base model"):
        load(adapter, str(llama_folder))
    deeper = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    shallow = tmp_path / "shallow"
    shutil.copytree(gpt2_folder, shallow)
    deeper.transformer.h = deeper.transformer.h[:1]
    deeper.config.n_layer = 1
    deeper.save_pretrained(shallow)
    with pytest.raises(UserError, match="do not belong to it"):
        load(adapter, str(shallow))
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gpt2_folder),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    tuned.save_pretrained(str(tmp_path / "tuned"))
    with pytest.raises(UserError, match="adds tokens"):
        load(tmp_path / "tuned", str(gpt2_folder))
