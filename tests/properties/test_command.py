"""Whatever data and settings it gets, the command ends with valid results or a message, and never
with a traceback."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Commands
from hypothesis import event, given
from hypothesis import strategies as st
from strategies import documents, examples, json_files, texts

from lora_or_full.config.schema import FIELDS

PROJECT = Path(__file__).parents[2]
SECONDS = 120  # after which a run of a few questions counts as hanging
SMALL = {
    "data.train_size": "3", "data.validation_size": "2", "data.test_size": "3", "max_length": "200",
    "max_new_tokens": "3", "eval_batch_size": "2", "trainer.max_epochs": "1",
    "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
    "data.unanswerable": "drop", "data.misaligned": "repair",
}  # fmt: skip
# Values at the edges of what is accepted, or beyond.
EDGES = {
    "mode": ("lora", "full", "loar"), "lr": ("1e-30", "1e10", "1e300", "0", "nan"),
    "rank": ("1", "10000", "99999999999999999999", "null"), "seed": ("0", "9223372036854775807"),
    "batch_size": ("1", "1000000000"), "eval_batch_size": ("1", "1000000000"),
    "max_length": ("1", "9", "20", "60", "256", "257", "1000000"),
    "max_new_tokens": ("1", "200", "255", "256", "1000000"),
    "packing": ("true", "false"), "packed_length": ("1", "1000000000"),
    "mask_prompt": ("true", "false"), "checkpoint_minutes": ("1e-9", "1e300"),
    "frozen_dtype": ("auto", "float32", "null"), "optimizer.weight_decay": ("0", "1", "1e300"),
    "optimizer.betas": ("[0,0]", "[0.999,0.999]", "[0,1]"), "optimizer.eps": ("1e-300", "1e300"),
    "scheduler.num_warmup_steps": ("0", "1", "1000000000"),
    "adapter.lora_alpha": ("1e-30", "1e30", "0"),
    "adapter.lora_dropout": ("0", "0.999", "1"), "+adapter.use_dora": ("true", "maybe"),
    "adapter.target_modules": ("[c_attn]", "[c_fc,c_proj]", "[nowhere]", "all-linear", "(", ".*"),
    "+adapter.nothing": ("1",), "+adapter.bias": ("all", "some"), "adapter.r": ("8", "4"),
    "adapter": ("null",),
    "model.config.attn_pdrop": ("0.5", "2", "high", "null"), "+model.config.n_layer": ("1", "9"),
    "+model.config.to_dict": ("1",), "+model.config.vocab_size": ("10", "-1"),
    "+model.config.n_positions": ("10", "512"), "data.split_by": ("article", "question"),
    "data.draw_by": ("question", "paragraph"), "data.train_size": ("1", "null", "1000000"),
    "data.validation_size": ("1", "null", "1000000"), "data.test_size": ("1", "null"),
    "data.validation_articles": ("0.001", "0.999"), "data.test_articles": ("0.001", "0.999"),
    "data.unanswerable": ("refuse", "drop"), "data.misaligned": ("refuse", "repair"),
    "trainer.devices": ("0", "cpu", "[0,1]", "-1"), "trainer.precision": ("16", "x", "bf16-true"),
    "trainer.accumulate_grad_batches": ("2", "100"), "trainer.gradient_clip_val": ("1e-30", "null"),
    "trainer.accelerator": ("auto", "cuda", "tpu"), "trainer.strategy": ("nowhere", "ddp_spawn"),
    "trainer.log_every_n_steps": ("1", "1000000"), "trainer.deterministic": ("true", "warn"),
    "+trainer.limit_test_batches": ("1",), "+trainer.max_steps": ("1",), "+trainer.nothing": ("1",),
    "+trainer.profiler": ("simple", "nothing", "{a:1}"), "+trainer.detect_anomaly": ("true",),
    "model.name": ("nowhere", "a/b", ".", "x" * 300), "data.test_path": ("f.json", "no.json", "."),
    "run_name": ("mine", "../x", "/x", "a b", "é", "x" * 300, "7"), "study": ("mine", "7"),
    "resume": (".", "runs", "nowhere"), "+nothing": ("1",), "~max_length": (),
}  # fmt: skip

Command = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def sound(squad_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Articles that can be split three ways."""
    file = squad_file(tmp_path_factory.mktemp("sound") / "f.json", 4, 1, 2)
    return json.loads(file.read_text("utf-8"))["data"]


@pytest.fixture(scope="module")
def command(
    gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Command]]:
    """A folder, and a function that runs the command there on a tiny model."""
    folder = tmp_path_factory.mktemp("command")
    with Commands(PROJECT / "src") as python:

        def ask(words: list[str]) -> dict[str, Any]:
            given = [f"model.name='{gpt2_folder}'", "data.path=f.json", *words]
            return python([str(PROJECT / "src" / "run.py"), *given], folder, SECONDS)

        yield folder, ask


@st.composite
def words(draw: st.DrawFn) -> list[str]:
    """Overrides for few questions, with mostly at most one edge value: with more of them nearly all
    runs would be refused."""
    asked = dict(SMALL)
    most = draw(st.sampled_from((0, 1, 1, 1, 3)))
    for key in draw(st.lists(st.sampled_from(list(EDGES)), max_size=most)):
        asked.pop(key, None)
        values = st.sampled_from(EDGES[key]) if EDGES[key] else st.just("")
        asked[key] = draw(values)
    if draw(st.integers(0, 9)) == 0:
        # Python reads words that are no UTF-8 as lone surrogates.
        value = draw(texts(2) | st.just("a\udc80"))
        # A path may lead anywhere; here it must stay in the folder.
        asked[draw(st.sampled_from(list(FIELDS)))] = value.replace("/", "").replace(".", "")
    return [f"{key}={value}" if value or key[0] != "~" else key for key, value in asked.items()]


@pytest.mark.slow
@examples(0.21)
@given(json_files() | documents() | documents() | documents(), words())
def test_the_command_ends_with_results_or_a_message(
    command: tuple[Path, Command],
    sound: list[Any],
    content: bytes | dict[str, Any],
    asked: list[str],
) -> None:
    folder, ask = command
    if isinstance(content, dict):  # besides articles that can be split
        content = json.dumps(content | {"data": content["data"] + sound}).encode()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "f.json").write_bytes(content)
    done = ask(asked)
    assert done["code"] is not None, "it hangs"
    assert "Traceback" not in done["out"] + done["errors"]
    event(f"exit code {done['code']}")
    if done["code"]:
        assert done["code"] == 1
        assert "Error: " in done["errors"]
        return
    [run] = [file.parent for file in folder.rglob("results.json")]

    def refuse(text: str) -> None:
        raise AssertionError(text)

    results = json.loads((run / "results.json").read_text(), parse_constant=refuse)
    answers = (run / "predictions.jsonl").read_text().split("\n")[:-1]
    assert results["test"]["questions"] == len(answers) > 0
    assert all(isinstance(json.loads(line, parse_constant=refuse), dict) for line in answers)
    for scores in (results["before"], results["test"], *results["epochs"]):
        assert 0 <= scores["exact_match"] <= 100
        assert 0 <= scores["f1"] <= 100.001
