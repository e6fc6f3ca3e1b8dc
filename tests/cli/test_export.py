"""`lora-or-full export`: same answers, a model card, and an upload only if requested."""

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import FULL, questions_of
from huggingface_hub import constants, metadata_load
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizer_types import TYPES
from transformers import AutoConfig, AutoModelForCausalLM

import experiment
from lora_or_full.cli import export, main, model_card
from lora_or_full.config.schema import AdapterConfig, validate
from lora_or_full.config.template import DEFAULT
from lora_or_full.errors import UserError
from lora_or_full.generation.predictor import load
from lora_or_full.modeling.loading import add_adapter, load_model
from lora_or_full.runs import store

Runs = dict[str, Path]


def answers(folder: Path, like: Path) -> tuple[list[str], list[str]]:
    """Answers of the model in a folder to the test questions of a run, and those of its record."""
    lines = (like / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    contexts = json.loads((like / "contexts.json").read_text(encoding="utf-8"))
    # An exported model has no limits of its own: those of the run.
    loaded = load(folder, None)
    limits = {"max_new_tokens": 4, "max_length": 200}
    run = replace(loaded, config=loaded.config.model_copy(update=limits))
    given = [a.text for _, a in run.answers(questions_of(recorded, contexts)) if a]
    return given, [p["prediction"] for p in recorded]


def test_a_merged_model_answers_as_the_adapter_did(finished_runs: Runs, tmp_path: Path) -> None:
    export.export(finished_runs["lora"], tmp_path / "merged", True, None, "me/mine")
    given, recorded = answers(tmp_path / "merged", finished_runs["lora"])
    assert given == recorded
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    settings = json.loads((finished_runs["lora"] / "results.json").read_text())["config"]
    config = (tmp_path / "merged" / "config.json").read_text()
    assert settings["model"]["name"] not in config
    assert not (tmp_path / "merged.partial").exists()


def test_whole_models_have_the_dtype_of_the_base_models_file(
    settings: dict[str, Any], gpt2_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(gpt2_folder, tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(gpt2_folder).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    settings["model"]["name"] = str(tmp_path / "half")
    said = "rounded to bfloat16"
    for mode, change in (("lora", {}), ("full", FULL)):
        run = tmp_path / mode
        results = experiment.run(validate(settings | change), run)
        store.write_json(run / "status.json", {"state": "finished"})
        assert results["model"]["dtype"] == "bfloat16"
        given, recorded = answers(run, run)
        assert given == recorded
        for merge in (True, False) if mode == "lora" else (False,):
            out = tmp_path / f"{mode}-{merge}"
            export.export(run, out, merge, None, "me/mine")
            stored = load_file(next(out.glob("*.safetensors")))
            whole = merge or mode == "full"
            dtypes = {tensor.dtype for tensor in stored.values()}
            assert dtypes == {torch.bfloat16 if whole else torch.float32}
            assert (said in (out / "README.md").read_text()) is whole
            given, recorded = answers(out, run)
            assert sum(map(str.__eq__, given, recorded)) >= len(recorded) / 2


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_exported_adapter_or_model_answers_as_before(
    mode: str, finished_runs: Runs, gpt2_folder: Path, tmp_path: Path
) -> None:
    export.export(finished_runs[mode], tmp_path / "out", False, None, "me/mine")
    given, recorded = answers(tmp_path / "out", finished_runs[mode])
    assert given == recorded


def test_a_merge_that_would_change_answers_is_refused(
    finished_runs: Runs, gpt2_folder: Path, tmp_path: Path
) -> None:
    """LoRA on the embedding: the output layer shares its weights, and would change too."""
    run = tmp_path / "run"
    shutil.copytree(finished_runs["lora"], run)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gpt2_folder),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["wte"], init_lora_weights=False),
    )
    adapted.save_pretrained(str(run / "adapter"), save_embedding_layers=False)
    with pytest.raises(UserError, match="Damaged in .*resume="):
        export.export(run, tmp_path / "out", True, None, "me/mine")
    (run / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="can't be merged"):
        export.export(run, tmp_path / "out", True, None, "me/mine")
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_the_record_says(finished_runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_runs["lora"], run)
    results = json.loads((run / "results.json").read_text())
    data = {"test": results["data"]["test"], "trained_on": None}
    other = {"name": "poems", "data": data, "test": results["test"]}
    (run / "evaluations" / "poems").mkdir(parents=True)
    (run / "evaluations" / "poems" / "results.json").write_text(json.dumps(other))
    export.export(run, tmp_path / "out", True, None, str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    low, high = results["test"]["f1_interval"]
    assert text.count(f"{results['test']['f1']:.1f} [{low:.1f}, {high:.1f}]") >= 2
    assert "| poems | 6 |" in text
    assert f"{results['parameters']['trainable']:,} of {results['parameters']['total']:,}" in text
    assert results["data"]["train"]["fingerprint"] in text
    assert "ask whoever published it" in text
    assert results["config"]["model"]["name"] not in text  # a folder of this machine
    index = metadata_load(tmp_path / "out" / "README.md")
    assert index is not None
    assert "base_model" not in index
    metrics = index["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in metrics}["f1"] == round(results["test"]["f1"], 2)


@pytest.mark.parametrize("merge", [True, False])
def test_the_code_on_the_card_runs(merge: bool, finished_runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export.export(finished_runs["lora"], out, merge, None, str(out))
    text = (out / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)  # noqa: S102  # the card's own code is what is tested
    run = load(finished_runs["lora"], None)
    expected = run.ask(run.read(names["context"]), names["question"], 0)[0]
    assert names["answer"].startswith(expected.text)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        ("llama2", DEFAULT),
        ("llama3", DEFAULT),
        ("qwen2", "chat"),
        ("gemma", 'Q: {question} {{"?"}}\nText: {context}\nA:\n{answer}'),
    ],
)
def test_asking_and_the_code_on_the_card_give_the_recorded_answers(
    kind: str, template: str, llama_folder: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    base, run, out = (tmp_path / name for name in ("base", "run", "out"))
    tokenizer = TYPES[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(base)
    config = AutoConfig.from_pretrained(llama_folder, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    settings["model"]["name"] = str(base)
    results = experiment.run(validate(settings | {"prompt": template}), run)
    assert results["model"]["shares_context"] is (kind != "gemma")
    store.write_json(run / "status.json", {"state": "finished"})
    export.export(run, out, True, None, str(out))
    code = re.search(
        r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert code is not None
    loading, given, answering = re.split(r"^(context, question = .*)$", code[1], flags=re.MULTILINE)
    assert given
    names: dict[str, Any] = {}
    exec(loading, names)  # noqa: S102  # the card's own code is what is tested
    contexts = json.loads((run / "contexts.json").read_text(encoding="utf-8"))
    asked = load(run, None)
    for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        names |= {"context": contexts[str(row["paragraph"])], "question": row["question"]}
        exec(answering, names)  # noqa: S102
        assert row["context_cut"] or names["answer"] == row["prediction"]
        session = asked.read(names["context"])
        assert asked.ask(session, row["question"], 0)[0].text == row["prediction"]


def test_names_of_the_hub_and_of_this_machine() -> None:
    assert model_card.hub_id("gpt2") == "gpt2"
    assert model_card.hub_id("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    for name in ("/a/b", "./b", "~/b", "a/b/c", "data.json", "tests"):
        assert model_card.hub_id(name) is None
    assert model_card.shown("/home/me/assets/data/train.json") == "lora-or-full's built-in data"
    assert model_card.shown("/home/me/secret/mine") == "mine"


class Hub(ThreadingHTTPServer):
    """A local hub that accepts small files with the right token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}


class Request(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != "Bearer hf_right":
            self.answer(401, {"error": "no such token"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer(200, {"url": f"{self.server.url}/me/mine"})
        elif self.path == "/api/validate-yaml":  # of the card
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/me/mine/preupload/main":
            files = json.loads(body)["files"]
            kind = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"], **kind} for file in files]})
        elif self.path == "/api/models/me/mine/commit/main":
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    file = entry["value"]
                    self.server.files[file["path"]] = base64.b64decode(file["content"])
            commit = f"{self.server.url}/me/mine/commit/1"
            self.answer(200, {"commitUrl": commit, "commitOid": "1"})
        else:
            self.answer(404, {"error": self.path})

    do_GET = do_POST  # noqa: N815  # unknown requests

    def answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", served.url)  # from HF_ENDPOINT, when imported
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield served
        served.shutdown()
        thread.join()


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str | Path) -> tuple[int, str, str]:
        code = 0
        try:
            main.main(["export", *map(str, words)])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def test_only_push_uploads(
    finished_runs: Runs, tmp_path: Path, hub: Hub, command: Callable[..., Any]
) -> None:
    code, out, _ = command(finished_runs["full"], "--output", tmp_path / "a")
    assert (code, hub.created, hub.files) == (0, [], {})
    code, out, err = command(finished_runs["full"], "--output", tmp_path / "b", "--push=me/mine")
    assert code == 0, err
    assert f"{hub.url}/me/mine" in out
    assert hub.created == [{"name": "mine", "organization": "me", "visibility": "private"}]
    written = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    assert {"README.md", "model.safetensors", "config.json"} <= written.keys()
    assert hub.files == written
    assert b'name = "me/mine"' in hub.files["README.md"]


def test_an_impossible_push_is_refused_before_any_work(
    finished_runs: Runs,
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Any],
) -> None:
    words = (finished_runs["full"], "--output", tmp_path / "x", "--push=me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "can't be reached (HF_HUB_OFFLINE is set)" in refusal(command(*words))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    assert "http://127.0.0.1:9 can't be reached" in refusal(command(*words))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in refusal(command(*words))
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, out, err = command(*words)
    assert (code, out) == (1, f"{tmp_path / 'x'}\n")
    assert "was not pushed to me/mine: " in err
    assert "401" in err
    assert err.count("\n") == 1


def refusal(output: tuple[int, str, str]) -> str:
    code, out, err = output
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return err


def test_wrong_input_is_refused_in_one_line(
    finished_runs: Runs,
    tmp_path: Path,
    command: Callable[..., Any],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    lora, full = finished_runs["lora"], finished_runs["full"]
    for words, message in (
        ((full, "--merge", "--output", tmp_path / "x"), "no adapter to merge"),
        ((full, "--output", tmp_path / "full"), "holds something"),
        ((tmp_path / "none",), "no folder"),
        ((tmp_path,), "is no run"),
        ((full, "--push=me"), "USER/NAME"),
        ((full, "--push=me/a b"), "USER/NAME"),
        ((lora, "--push=me/mine"), "--merge"),
        ((lora, "--merge", "--model", tmp_path / "none", "--output", tmp_path / "x"), "--model"),
        ((full, "--output", "/proc/none"), "can't be written"),
    ):
        assert message in refusal(command(*words))
    assert (tmp_path / "full" / "thesis.tex").is_file()


def test_a_type_that_peft_can_not_merge_is_refused(llama_folder: Path) -> None:
    settings = {"_target_": "peft.LilyConfig", "r": 2, "target_modules": ["q_proj"]}
    adapter = AdapterConfig.model_validate(settings)
    adapted = add_adapter(load_model(llama_folder, "tiny", {}), adapter)
    with pytest.raises(UserError, match=r"PEFT can't merge the adapter in there: .*--merge"):
        export.merged(adapted, Path("there"))
