"""A whole run in this process: what its record holds, and that it is true."""

import csv
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from configs import FULL
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import experiment
from lit_module import LitQuestionAnswering
from lora_or_full.cli import export
from lora_or_full.config import compose
from lora_or_full.config.schema import validate
from lora_or_full.data.prompt import PromptTokens
from lora_or_full.errors import UserError
from lora_or_full.evaluation.metrics.exact_match import exact_match
from lora_or_full.evaluation.metrics.f1 import f1
from lora_or_full.generation.decoding import greedy, stop_ids
from lora_or_full.modeling import precision
from lora_or_full.training import distributed

Settings = dict[str, Any]


@pytest.fixture
def lora_run(settings: Settings, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    settings["lr"] = 0.1  # far enough that the answers differ from those before training
    return experiment.run(validate(settings), tmp_path / "run"), tmp_path / "run"


def test_a_split_that_is_smaller_than_asked_for_is_told(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["data"] |= {"train_size": 1234, "validation_size": 3}
    results = experiment.run(validate(settings), tmp_path / "run")
    told = capsys.readouterr().out
    assert f"{results['data']['train']['questions']} questions of 1,234 requested" in told
    assert told.count("requested") == 1


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("elsewhere", "32-true"), "hydra.run.dir="),
        (("here", "bf16-mixed"), "trainer.precision=auto is 32-true and bf16-mixed"),
    ],
)
def test_processes_that_are_not_alike_are_refused(
    others: tuple[str, str], message: str, settings: Settings, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def gathered(own: tuple[str, str]) -> list[tuple[str, str]]:
        return [own, (own[0] if others[0] == "here" else others[0], others[1])]

    monkeypatch.setattr(distributed, "gathered", gathered)
    with pytest.raises(UserError, match=message):
        experiment.run(validate(settings), tmp_path / "run")


def predictions_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def answers_by(model: Any, folder: Path, recorded: list[dict[str, Any]], run: Path) -> list[str]:
    """The answers of a model that other libraries loaded, to the questions that a run recorded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    contexts = json.loads((run / "contexts.json").read_text(encoding="utf-8"))
    texts = [
        f"Context: {contexts[str(p['paragraph'])]}\nQuestion: {p['question']}\nAnswer:"
        for p in recorded
    ]
    prompts = [PromptTokens([], [], tokenizer(text)["input_ids"]) for text in texts]
    return [a.text for a in greedy(model.eval(), tokenizer, prompts, stop_ids(tokenizer), 4, None)]


def test_the_adapter_answers_as_recorded_when_plain_peft_loads_it(
    lora_run: tuple[dict[str, Any], Path],
) -> None:
    _, folder = lora_run
    recorded = predictions_of(folder)
    assert {file.name for file in (folder / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    given = answers_by(model, folder / "adapter", recorded, folder)
    assert given == [p["prediction"] for p in recorded]
    base = answers_by(model.get_base_model().eval(), folder / "adapter", recorded, folder)
    with model.disable_adapter():
        base = answers_by(model, folder / "adapter", recorded, folder)
    assert given != base


MODES = [mode for mode in compose.presets("mode") if mode != "full"]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT, of its own type for norms
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_its_adapter_alone_and_plain_peft_loads_it(
    mode: str, settings: Settings, tmp_path: Path
) -> None:
    composed = compose.compose([f"mode={mode}", "model=builtin"])
    keys = ("mode", "label", "rank", "adapter", "frozen_dtype")
    settings |= {key: composed[key] for key in keys} | {"lr": 0.1}
    results = experiment.run(validate(settings), tmp_path / "run")
    folder = tmp_path / "run" / "adapter"
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum(w.numel() for w in saved.values()) == results["parameters"]["trainable"]
    recorded = predictions_of(tmp_path / "run")
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    given = answers_by(model, folder, recorded, tmp_path / "run")
    assert given == [p["prediction"] for p in recorded]
    export.export(tmp_path / "run", tmp_path / "merged", True, None, "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert answers_by(merged, tmp_path / "merged", recorded, tmp_path / "run") == given


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_continues_from_the_weights_of_another_run(
    mode: str, settings: Settings, finished_runs: dict[str, Path], tmp_path: Path
) -> None:
    settings |= {"init_from": str(finished_runs[mode]), "lr": 1e-9}
    settings |= FULL if mode == "full" else {}
    settings["trainer"]["max_epochs"] = 1
    results = experiment.run(validate(settings), tmp_path / "run")
    earlier = json.loads((finished_runs[mode] / "results.json").read_text())
    answered, before = predictions_of(tmp_path / "run"), predictions_of(finished_runs[mode])
    assert [p["prediction"] for p in answered] == [p["prediction"] for p in before]
    assert [p["log_probability"] for p in answered] == pytest.approx(
        [p["log_probability"] for p in before], rel=1e-4
    )
    assert results["before"] == earlier["test"]
    assert results["model"]["fingerprint"] == earlier["model"]["fingerprint"]
    assert results["model"]["first_weights"] not in (None, earlier["model"]["fingerprint"])
    # Scores before training are not mistaken for those of the base model.
    cached = Path(settings["cache_dir"]) / "before"
    assert len(list(cached.iterdir())) == 1
    experiment.run(validate(settings | {"init_from": None}), tmp_path / "plain")
    assert len(list(cached.iterdir())) == 2


def test_an_adapter_of_another_shape_is_refused_as_a_start(
    settings: Settings, finished_runs: dict[str, Path], tmp_path: Path
) -> None:
    settings["init_from"] = str(finished_runs["lora"] / "adapter")
    settings["rank"] = settings["adapter"]["r"] = 4
    with pytest.raises(UserError, match="r is 8 there, 4 here. Give rank and adapter"):
        experiment.run(validate(settings), tmp_path / "run")


def test_the_full_model_answers_as_recorded_when_plain_transformers_loads_it(
    settings: Settings, tmp_path: Path
) -> None:
    settings |= FULL
    experiment.run(validate(settings), tmp_path / "run")
    recorded = predictions_of(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    given = answers_by(model, tmp_path / "run" / "model", recorded, tmp_path / "run")
    assert given == [p["prediction"] for p in recorded]


def test_the_record_holds_together(
    lora_run: tuple[dict[str, Any], Path], settings: Settings
) -> None:
    results, folder = lora_run
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    recorded = predictions_of(folder)
    assert len(recorded) == results["test"]["questions"] == 6
    assert results["data"]["test"]["questions"] == 6
    assert len({p["id"] for p in recorded}) == 6
    for p in recorded:
        assert p["exact_match"] == exact_match(p["prediction"], p["answers"], "squad")
        assert p["f1"] == f1(p["prediction"], p["answers"], "squad")
    assert results["test"]["f1"] == fmean([p["f1"] for p in recorded])
    assert [epoch["epoch"] for epoch in results["epochs"]] == [1, 2, 3]
    ranks = [(epoch["f1"], -epoch["validation_loss"]) for epoch in results["epochs"]]
    assert results["best_epoch"] == 1 + ranks.index(max(ranks))
    assert results["parameters"]["trainable"] == sum(
        torch.Size(shape).numel() for shape in results["shapes"].values()
    )
    assert results["cost"]["samples"] == 30
    assert min(results["cost"]["peak_memory_bytes"].values()) > 1e7
    assert not list(folder.glob("*.partial*"))


def test_the_best_epoch_is_the_one_that_is_scored_and_exported(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation F1 is made to fall after the first epoch."""
    original = LitQuestionAnswering.on_validation_epoch_end
    kept = {}

    def rising(self: LitQuestionAnswering) -> None:
        original(self)
        self.epochs[-1]["f1"] = -float(len(self.epochs))
        kept[len(self.epochs)] = {
            n: p.detach().clone() for n, p in self.trainable_parameters().items()
        }

    monkeypatch.setattr(LitQuestionAnswering, "on_validation_epoch_end", rising)
    results = experiment.run(validate(settings), tmp_path / "run")
    assert results["best_epoch"] == 1
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    exported = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for name, weight in kept[1].items():
        assert torch.equal(weight, exported[name.removeprefix("model.")])
        assert not torch.equal(weight, kept[3][name])


def test_scores_before_training_are_computed_once_and_for_both_modes(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = []
    original = experiment._test
    monkeypatch.setattr(experiment, "_test", lambda *a: (tests.append(1), original(*a))[1])
    first = experiment.run(validate(settings), tmp_path / "lora")
    second = experiment.run(validate(settings | FULL | {"seed": 2}), tmp_path / "full")
    assert len(tests) == 3
    assert first["before"] == second["before"]
    experiment.run(validate(settings | {"max_new_tokens": 5}), tmp_path / "longer")
    assert len(tests) == 5  # decoded otherwise: computed anew


def test_the_same_settings_give_the_same_run_and_another_seed_another(
    settings: Settings, tmp_path: Path
) -> None:
    runs = [
        experiment.run(validate(settings | {"seed": seed}), tmp_path / str(number))
        for number, seed in enumerate((1, 1, 2))
    ]
    assert runs[0]["epochs"] == runs[1]["epochs"]
    assert runs[0]["epochs"] != runs[2]["epochs"]
    weights = [
        (tmp_path / str(number) / "adapter" / "adapter_model.safetensors").read_bytes()
        for number in range(3)
    ]
    assert weights[0] == weights[1] != weights[2]
    fingerprints = [run["data"]["train"]["fingerprint"] for run in runs]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert len({run["data"]["test"]["fingerprint"] for run in runs}) == 1


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_run_records_the_precision_that_its_hardware_was_given(
    settings: Settings, native: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    monkeypatch.setattr(precision, "cpu_gain", lambda: 4.0)
    monkeypatch.setattr(precision, "NARROW", 16)
    settings["trainer"]["precision"] = "auto"
    computed = set()
    original = LitQuestionAnswering.training_step

    def step(self: LitQuestionAnswering, *arguments: Any) -> torch.Tensor:
        computed.add(self.trainer.precision)
        return original(self, *arguments)

    monkeypatch.setattr(LitQuestionAnswering, "training_step", step)
    results = experiment.run(validate(settings), tmp_path / "run")
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert results["config"]["trainer"]["precision"] == expected
    assert written["trainer"] == results["config"]["trainer"]
    assert results["config"]["adapter"]["target_modules"] == ["c_attn"]  # which auto stands for
    assert computed == {expected}


def test_a_run_in_mixed_precision_exports_float32_and_counts_as_in_float32(
    lora_run: tuple[dict[str, Any], Path], settings: Settings, tmp_path: Path
) -> None:
    exact, _ = lora_run
    settings["trainer"]["precision"] = "bf16-mixed"
    mixed = experiment.run(validate(settings), tmp_path / "mixed")
    assert mixed["parameters"] == exact["parameters"]
    assert mixed["shapes"] == exact["shapes"]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixed" / "adapter")
    adapter = load_file(tmp_path / "mixed" / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert sum(weight.numel() for weight in adapter.values()) == mixed["parameters"]["trainable"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_contexts_are_recorded_by_the_numbers_that_predictions_name(
    lora_run: tuple[dict[str, Any], Path], settings: Settings
) -> None:
    _, folder = lora_run
    contexts = json.loads((folder / "contexts.json").read_text(encoding="utf-8"))
    content = json.loads(Path(settings["data"]["test_path"]).read_text(encoding="utf-8"))
    told = {
        qa["id"]: paragraph["context"]
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    }
    recorded = predictions_of(folder)
    assert {p["id"]: contexts[str(p["paragraph"])] for p in recorded} == {
        p["id"]: told[p["id"]] for p in recorded
    }
    assert {str(p["paragraph"]) for p in recorded} == set(contexts)


def test_tensorboard_and_csv_hold_what_was_measured(
    lora_run: tuple[dict[str, Any], Path],
) -> None:
    results, folder = lora_run
    events = EventAccumulator(str(folder / "tb")).Reload()
    scalars = events.Tags()["scalars"]
    curves = {"train/loss", "train/lr-AdamW", "validation/loss", "validation/f1"}
    assert curves | {"whole_run/test_f1"} <= set(scalars)
    assert min(scalars).startswith("train/")  # TensorBoard opens on it
    losses = [point.value for point in events.Scalars("validation/loss")]
    assert losses == pytest.approx([epoch["validation_loss"] for epoch in results["epochs"]])
    assert events.Scalars("whole_run/test_f1")[0].value == pytest.approx(results["test"]["f1"])
    assert "hp_metric" not in scalars
    assert any("validation answers" in tag for tag in events.Tags()["tensors"])
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/loss"]]) == 9
    written = [float(row["validation/loss"]) for row in rows if row["validation/loss"]]
    assert written == pytest.approx(losses)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_length", 300, "max_length=300.*reads at most 256 tokens"),
        ("max_new_tokens", 256, "max_new_tokens=256.*reads at most 256"),
    ],
)
def test_lengths_over_the_models_are_refused(
    settings: Settings, key: str, value: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        experiment.run(validate(settings | {key: value}), tmp_path / "run")


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"max_epoch": 3}, "no key 'trainer.max_epoch'. Did you mean trainer.max_epochs"),
        ({"accelerator": "gpu2"}, "trainer.accelerator=gpu2: must be auto or cpu"),
        ({"precision": "12-true"}, "Lightning refuses"),
        ({"devices": 5}, "batch_size=4 questions can't be dealt to 5"),
        ({"devices": 2, "accumulate_grad_batches": 3}, "can't be dealt to 6"),
    ],
)
def test_what_the_trainer_does_not_take_is_refused(
    settings: Settings, trainer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings["trainer"] |= trainer
    with pytest.raises(UserError, match=message):
        experiment.run(validate(settings), tmp_path / "run")


def test_a_prompt_that_is_too_long_scores_as_no_answer(settings: Settings, tmp_path: Path) -> None:
    content = json.loads(Path(settings["data"]["test_path"]).read_text())
    qa = content["data"][0]["paragraphs"][0]["qas"][0]
    qa["question"] = "why " * 300
    settings["data"]["test_size"] = None
    Path(settings["data"]["test_path"]).write_text(json.dumps(content))
    experiment.run(validate(settings), tmp_path / "run")
    [prediction] = [p for p in predictions_of(tmp_path / "run") if p["id"] == qa["id"]]
    assert (prediction["prediction"], prediction["f1"]) == ("", 0.0)
    assert prediction["context_cut"]
