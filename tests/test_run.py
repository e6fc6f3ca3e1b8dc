"""The user's own commands, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import run
from lora_or_full.runs import store

PROJECT = Path(__file__).parents[1]
RUN = [sys.executable, str(PROJECT / "src" / "run.py")]
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@pytest.fixture
def words(settings: dict[str, Any], tmp_path: Path) -> list[str]:
    """The command line that gives the tiny run of the fixture `settings`."""
    return [
        f"model.name={settings['model']['name']}",
        f"data.path={settings['data']['path']}",
        f"data.test_path={settings['data']['test_path']}",
        "data.train_size=10",
        "data.validation_size=3",
        "data.test_size=6",
        "eval_batch_size=2",
        "max_length=200",
        "max_new_tokens=4",
        "trainer.accelerator=cpu",
        f"output_dir={tmp_path / 'runs'}",
        f"cache_dir={tmp_path / 'cache'}",
    ]


def command(
    *words: str, folder: Path = PROJECT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *words], capture_output=True, text=True, cwd=folder, timeout=300,
        env=os.environ | QUIET | environment,
    )  # fmt: skip


def refusal(*words: str, folder: Path = PROJECT, **environment: str) -> str:
    """The message of a command that is refused: never a trace."""
    done = command(*words, folder=folder, **environment)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("Error: "), done.stderr
    return done.stderr


def until(lines: Iterable[str], text: str) -> None:
    """Read `lines` up to one with `text`."""
    assert any(text in line for line in lines)


def test_help_names_every_key_and_no_torch_is_needed_for_it() -> None:
    from lora_or_full.config.schema import FIELDS

    done = command("--help")
    assert done.returncode == 0
    assert {key for key in FIELDS if key not in done.stdout} == set()


def test_a_run_from_another_folder_ends_with_its_table(words: list[str], tmp_path: Path) -> None:
    done = command("mode=lora", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("Will run", "precision 32-true", "before training", "peak memory", "4.2216 %"):
        assert text in done.stdout
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("lora_r8_lr0.0002_seed1")
    assert {file.name for file in folder.iterdir()} == {
        ".lock", "SHA256SUMS", "adapter", "checkpoints", "config.yaml", "contexts.json",
        "metrics.csv", "predictions.jsonl", "results.json", "status.json", "tb",
    }  # fmt: skip
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_a_sweep_runs_each_job_once_goes_on_behind_a_failed_one_and_tells_it(
    words: list[str], tmp_path: Path
) -> None:
    done = command(
        "-m", "mode=lora,full", "rank=4,0x,8", *words, "hydra.sweep.dir=" + str(tmp_path / "sweep")
    )
    assert done.returncode == 1
    assert "rank=0x" in done.stderr  # known before anything runs
    assert not (tmp_path / "sweep").exists()

    done = command("-m", "mode=lora,full", "rank=4,8", "adapter.target_modules=[c_attn]", *words)
    assert "this mode has no adapter" in done.stderr

    place = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    done = command("-m", "mode=lora,full", "rank=4,8", "frozen_dtype=float32", *words, place)
    assert done.returncode == 0, done.stderr
    folders = sorted(folder.name for folder in (tmp_path / "sweep").iterdir() if folder.is_dir())
    assert len(folders) == 3
    assert "run once" in done.stdout
    assert not any("=" in name for name in folders)
    records = [json.loads(file.read_text()) for file in tmp_path.glob("sweep/*/results.json")]
    assert sorted((record["config"]["rank"] for record in records), key=str) == [4, 8, None]


def test_a_sweep_again_does_what_is_missing_alone(words: list[str], tmp_path: Path) -> None:
    sweep = ["-m", "mode=lora,full", "study=mine", *words]
    done = command(*sweep)
    assert done.returncode == 0, done.stderr
    assert "Job 2 of 2, about" in done.stdout
    first, second = sorted((tmp_path / "runs" / "mine").glob("*_seed1"))
    before = {folder: (folder / "results.json").stat().st_mtime_ns for folder in (first, second)}
    table = done.stdout[done.stdout.rindex("Sweep") :]
    assert all(folder.name in table for folder in (first, second))

    # As a kill -9 of the second job leaves it: no results, and a process that is gone.
    (second / "results.json").unlink()
    status = json.loads((second / "status.json").read_text())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (second / "status.json").write_text(
        json.dumps(status | {"state": "running", "process": gone.pid})
    )
    done = command(*sweep)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before") == 1
    after = {folder: (folder / "results.json").stat().st_mtime_ns for folder in (first, second)}
    assert after[first] == before[first]
    assert after[second] > before[second]
    assert len(list((tmp_path / "runs" / "mine").glob("*/config.yaml"))) == 2

    # Another process is at it, and finishes it: the sweep waits.
    lock = store.run_lock(second)
    lock.acquire()
    with subprocess.Popen(
        [*RUN, *sweep], stdout=subprocess.PIPE, text=True, env=os.environ | QUIET
    ) as waiting:
        assert waiting.stdout is not None
        until(waiting.stdout, "is running in another process: waiting for it.")
        finished = (second / "results.json").stat().st_mtime_ns
        lock.release()
        assert "finished before" in waiting.stdout.read()
    assert waiting.returncode == 0
    assert (second / "results.json").stat().st_mtime_ns == finished


@pytest.mark.slow
def test_a_launchers_workers_do_a_sweep_as_one_process_does(
    words: list[str], tmp_path: Path
) -> None:
    sweep = [
        "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "study=mine", "lr=1e-4,1e30",
        "mode=lora,full", "trainer.gradient_clip_val=null", *words,
    ]  # fmt: skip
    done = command(*sweep, folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("The sweep continues.") == done.stderr.count("\n  ") == 2
    assert "2 of 4 jobs failed" in done.stderr
    place = tmp_path / "runs" / "mine"
    states = {f.parent.name: store.status(f.parent)["state"] for f in place.glob("*/status.json")}
    assert states == {
        "lora_r8_lr0.0001_seed1": "finished", "full_lr0.0001_seed1": "finished",
        "lora_r8_lr1e+30_seed1": "failed", "full_lr1e+30_seed1": "failed",
    }  # fmt: skip
    table = done.stdout[done.stdout.rindex("Sweep") :]
    assert all(name in table for name in states)
    assert not list(place.glob(".jobs-*"))
    done = command(*sweep, folder=tmp_path)
    assert done.stdout.count("finished before") == 2
    assert "2 of 4 jobs failed" in done.stderr


@pytest.mark.slow
def test_a_preset_may_be_a_sweep_and_the_command_line_wins(
    words: list[str], tmp_path: Path
) -> None:
    # two presets, of which the second is a sweep
    swept = ["experiment=[fast,grid]", "lr=1e-4", "rank=2", "study=preset"]
    done = command("-m", *swept, *words)
    assert done.returncode == 0, done.stderr
    names = {folder.name for folder in (tmp_path / "runs" / "preset").iterdir() if folder.is_dir()}
    assert names == {"full_lr0.0001_seed1", "lora_r2_lr0.0001_seed1"}


def test_a_failed_job_of_a_sweep_is_told_and_the_others_run(
    words: list[str], tmp_path: Path
) -> None:
    done = command(
        "-m", "lr=1e-4,1e30", "trainer.gradient_clip_val=null", "mode=full", *words,
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "1 of 2 jobs failed" in done.stderr
    assert "The loss is" in done.stderr
    states = [json.loads(f.read_text())["state"] for f in tmp_path.glob("sweep/*/status.json")]
    assert sorted(states) == ["failed", "finished"]


def test_two_processes_do_not_work_on_one_run(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with store.run_lock(folder):
        message = refusal(*words, f"hydra.run.dir={folder}")
    assert message == f"Error: {folder}: another process is working on this run.\n"


def test_an_interrupted_run_says_how_to_go_on_and_does(words: list[str], tmp_path: Path) -> None:
    slow = ["trainer.max_epochs=10"]
    process = subprocess.Popen(
        [*RUN, "mode=lora", *words, *slow],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | QUIET, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal's Ctrl-C does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    [folder] = (tmp_path / "runs").iterdir()
    assert f"python src/run.py resume='{folder}'" in errors
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "interrupted"
    seconds_before = status["seconds"]

    message = refusal(f"resume={folder}", "mode=full", "data.train_size=9", "trainer.max_epochs=5")
    assert "mode: the run has lora, requested is full" in message
    assert "data.train_size: the run has 10, requested is 9" in message
    assert "lr:" in message
    assert f"init_from='{folder}' trainer.max_epochs=<n>" in message

    # Moved: what decides is what is in the files, not where they lie.
    paths = dict(word.split("=") for word in words)
    folder = folder.rename(tmp_path / "moved run")
    for key in ("model.name", "data.path", "data.test_path"):
        place = tmp_path / f"moved_{Path(paths[key]).name}"
        shutil.move(paths[key], place) if key != "model.name" else place.symlink_to(paths[key])
        paths[key] = str(place)
    assert "no file" in refusal(f"resume='{folder}'")
    moved = [f"{key}={paths[key]}" for key in ("model.name", "data.path", "data.test_path")]
    message = refusal(f"resume='{folder}'", *moved[:2], f"data.test_path={paths['data.path']}")
    assert "the files have other content" in message

    own = ["mode=lora", "trainer.precision=auto", "checkpoint_minutes=9", "output_dir=elsewhere"]
    done = command(f"resume='{folder}'", *own, *moved, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Resumes" in done.stdout
    results = json.loads((folder / "results.json").read_text())
    assert len(results["epochs"]) == 10
    assert results["config"]["checkpoint_minutes"] == 9
    assert results["cost"]["session_seconds"] > seconds_before
    message = refusal(f"resume='{folder}'")
    assert "is finished" in message
    assert f"init_from='{folder}'" in message


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["lrr=1e-3"], "no key 'lrr'. Did you mean lr?"),
        (["trainer.max_epoch=3"], "Did you mean trainer.max_epochs?"),
        (["+lrr=1e-3"], "no key 'lrr'. Did you mean lr?"),
        (["+data.train_sise=3"], "Did you mean data.train_size?"),
        (["~max_length"], "can't be left out: max_length"),
        (["~rank"], "Interpolation key 'rank' not found"),
        (["mode=loar"], "mode=loar: must be dora, full"),
        (["model=gpt3"], "model=gpt3: must be builtin, distilgpt2, gpt2"),
        (["data=squat"], "data=squat: must be builtin, squad"),
        (["experiment=dem"], "experiment=dem: must be ablation, demo"),
        (["mode=full", "rank=8"], "mode=full has no rank"),
        (["experiment=ablation"], "experiment=ablation is a sweep, which needs -m"),
        (["experiment=[subset,ablation]"], "experiment=[subset,ablation] is a sweep, which needs"),
        (["experiment=[subset,dem]"], "experiment=dem: must be ablation, demo"),
        (["-m", "experiment=demo,grid"], "experiment=grid is a sweep itself; start it alone"),
        (["-m", "experiment=grid", "mode=full", "lr=0"], "lr=0: must be a number above 0"),
        (["study=mine"], "study names the folder of a sweep"),
        (["-m", "study=../mine"], "study=../mine: must be a name of letters"),
        (["mode=full", "adapter.lora_alpha=3"], "adapter.lora_alpha: this mode has no adapter"),
        (["lr=fast"], "lr=fast: must be a number above 0"),
        (["packing=maybe"], "packing=maybe: must be true or false"),
        (["packed_length=0"], "packed_length=0: must be a whole number from 1"),
        (["data.draw_by=foo"], "data.draw_by=foo: must be question or paragraph"),
        (["lr=1e-4,1e-3"], "needs -m"),
        (["lr="], "lr="),
        (["mode"], "mode: each word is key=value"),
        (["demo"], "Did you mean experiment=demo?"),
        (["--mdoe"], "no option --mdoe. Keys have no dashes: mode=<value>. Options: -m"),
        (["--mode", "lora"], "Keys have no dashes: mode=lora."),
        (["seed=1", "--experiment=demo"], "Keys have no dashes: experiment=demo."),
        (["--learning-rate", "1"], "Keys have no dashes: lr=1."),
        (["-m", "hydra/sweeper=optuna"], "hydra/sweeper=optuna: a sweep here runs all values"),
        (["+lora.use_rslora=true"], "no key 'lora.use_rslora'. Did you mean +adapter.use_rslora?"),
        (["data.path=My (1).json"], "can't be read. Quote it: \"data.path='My (1).json'\""),
        (["data.path=epoch=1.json"], "Quote it: \"data.path='epoch=1.json'\""),
        (["data.path=a,b.json"], "A list is written data.path=[a,b.json], a comma in a name"),
        (["resume=nowhere"], "there is no run"),
        (["output_dir=/dev/null/runs"], "output_dir=/dev/null/runs can't be written"),
        (["cache_dir=/dev/null/cache"], "cache_dir=/dev/null/cache can't be written"),
        (["hydra.run.dir=/dev/null/run"], "hydra.run.dir=/dev/null/run can't be written"),
        (["hydra.run.dir="], "hydra.run.dir=: must name a folder"),
        (["-m", "hydra.sweep.dir="], "hydra.sweep.dir=: must name a folder"),
        (["-m", "resume=nowhere,elsewhere"], "leave -m out"),
        (["-m", "seed=1,2", "trainer.num_nodes=2"], "each of its jobs runs on one machine"),
        (["-m", "hydra/launcher=slurmy"], "hydra/launcher=slurmy: there is no such launcher"),
        (["trainer.strategy=fsdp"], "trainer.strategy=fsdp: must be auto or ddp"),
        (["trainer.accelerator=tpu"], "trainer.accelerator=tpu: must be auto or cpu or gpu or"),
    ],
)
def test_a_wrong_word_is_refused_in_one_message(
    asked: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command's own main, in this process: a process of its own takes seconds for each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *asked])
    with pytest.raises(SystemExit, match="1"):
        run.main()
    out, errors = capsys.readouterr()
    assert not out
    assert errors.startswith("Error: ")
    assert message in errors


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["mode=loar"], "mode=loar: must be dora, full"),
        (["+trainer.max_epoch=3", "experiment=demo"], "Did you mean trainer.max_epochs?"),
        (["data.path=nowhere.json", "model=builtin"], "no file nowhere.json"),
        (["model.name=./nowhere"], "no such folder"),
    ],
)
def test_what_is_wrong_is_said_by_the_command_and_by_the_run(
    asked: list[str], message: str, tmp_path: Path
) -> None:
    # In a folder of its own: another test may begin a run of the same name in the same second.
    assert message in refusal(*asked, folder=tmp_path)


@pytest.mark.parametrize(
    "given",
    [["-m", "seed=1,2", "lr=1"], ["seed=1,2", "-m", "lr=1"], ["seed=1,2", "lr=1", "--multirun"]],
)
def test_an_option_may_stand_anywhere(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra gets the keys in one piece, and what is added for it behind them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    seen: list[list[str]] = []
    monkeypatch.setattr(run.Sweep, "run", lambda self, number, words: seen.append(words))
    monkeypatch.setattr(run.Sweep, "_close", lambda self: None)
    run.main()
    assert seen == [["seed=1", "lr=1"], ["seed=2", "lr=1"]]


def test_an_unreachable_hub_is_told_within_ten_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    message = refusal(
        "mode=lora", f"cache_dir={tmp_path}", f"output_dir={tmp_path / 'runs'}",
        HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "hub"),
    )  # fmt: skip
    assert time.monotonic() - start < 20  # ten, and the imports on a busy machine
    for text in ("model.name=gpt2", "set model.name to a local folder", "experiment=demo"):
        assert text in message


def test_a_folder_that_holds_a_run_is_not_overwritten(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "config.yaml").write_text("mode: lora")
    place = f"hydra.run.dir={tmp_path / 'same'}"
    assert "holds a run already" in refusal("mode=lora", *words, place)
    assert [file.name for file in (tmp_path / "same").iterdir()] == ["config.yaml"]
    assert (tmp_path / "same" / "config.yaml").read_text() == "mode: lora"
