"""The module: which weights move, which tokens carry loss, how a token weighs."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn.functional import cross_entropy

import experiment
from errors import UserError
from lit_module import LitQuestionAnswering
from qa.prompt import IGNORED

Settings = dict[str, Any]


def as_full(settings: Settings) -> Settings:
    return settings | {"mode": "full", "lora": None, "rank": None}


def fit(settings: Settings, folder: Path, **trainer: Any) -> tuple[LitQuestionAnswering, L.Trainer]:
    data, module, _ = experiment.build(settings)
    arguments = settings["trainer"] | trainer
    lightning = L.Trainer(
        **arguments, logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    lightning.fit(module, data)
    return module, lightning


def test_lora_moves_its_matrices_and_nothing_else(settings: Settings, tmp_path: Path) -> None:
    _, untouched, _ = experiment.build(settings)
    before = copy.deepcopy(untouched.state_dict())
    module, _ = fit(settings, tmp_path)
    after = module.state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == set(module.trained())
    assert len(moved) == 4


def test_full_moves_every_weight_that_the_rows_reach(settings: Settings, tmp_path: Path) -> None:
    settings = as_full(settings)
    _, untouched, _ = experiment.build(settings)
    before = copy.deepcopy(untouched.state_dict())
    module, _ = fit(settings, tmp_path)
    after = module.state_dict()
    assert all(not torch.equal(weight, before[name]) for name, weight in after.items())


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_goes_on_in_train_mode_after_a_validation(
    settings: Settings, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    original = LitQuestionAnswering.training_step

    def step(self: LitQuestionAnswering, *arguments: Any) -> torch.Tensor:
        modes.append(all(module.training for module in self.model.modules()))
        return original(self, *arguments)

    monkeypatch.setattr(LitQuestionAnswering, "training_step", step)
    fit(settings if mode == "lora" else as_full(settings), tmp_path)
    assert modes == [True] * 9


def test_both_modes_see_the_same_questions_in_the_same_order(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    original = LitQuestionAnswering.training_step

    def step(self: LitQuestionAnswering, batch: Any, index: int) -> torch.Tensor:
        seen.append(batch["input_ids"].flatten().tolist())
        return original(self, batch, index)

    monkeypatch.setattr(LitQuestionAnswering, "training_step", step)
    fit(settings, tmp_path)
    fit(as_full(settings), tmp_path)
    assert seen[:9] == seen[9:]
    assert seen[:3] != seen[3:6]  # each epoch in an order of its own


def test_loss_is_that_of_the_label_tokens(settings: Settings) -> None:
    data, module, _ = experiment.build(settings)
    module.eval()
    batch = data.collate_training([data.train[n] for n in range(4)], 1)
    with torch.no_grad():
        loss, count = module.loss_sum(batch["input_ids"], batch["labels"])
        logits = module.model(input_ids=batch["input_ids"]).logits
    plain = cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED, reduction="sum",
    )  # fmt: skip
    assert count == (batch["labels"] != IGNORED).sum()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_padding_changes_no_loss(settings: Settings) -> None:
    data, module, _ = experiment.build(settings)
    module.eval()
    rows = [data.train[n] for n in range(4)]
    with torch.no_grad():
        together = data.collate_training(rows, 1)
        whole, _ = module.loss_sum(together["input_ids"], together["labels"])
        alone = 0.0
        for row in rows:
            batch = data.collate_training([row], 1)
            alone += module.loss_sum(batch["input_ids"], batch["labels"])[0].item()
    assert whole.item() == pytest.approx(alone, rel=1e-5)


def test_accumulated_parts_train_as_one_step(settings: Settings, tmp_path: Path) -> None:
    """Ten questions in steps of four: the last step leaves a part without a row."""
    settings["lora"]["lora_dropout"] = 0.0
    settings["model"]["config"] = dict.fromkeys(settings["model"]["config"], 0.0)
    whole, _ = fit(copy.deepcopy(settings), tmp_path)
    settings["trainer"]["accumulate_grad_batches"] = 3
    parts, trainer = fit(settings, tmp_path)
    assert trainer.global_step == 9
    for name, weight in whole.trained().items():
        assert torch.allclose(weight, parts.trained()[name], atol=1e-6)
    for one, other in zip(whole.epochs, parts.epochs, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_validation_loss_is_a_mean_over_tokens_whatever_the_batches(settings: Settings) -> None:
    losses = []
    for size in (1, 2, 3):
        data, module, _ = experiment.build(settings | {"eval_batch_size": size})
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.validate(module, data, verbose=False)
        losses.append(module.epochs[0]["validation_loss"])
    rows = [data.validation[n] for n in range(3)]
    module.eval()
    with torch.no_grad():
        sums = [module.loss_sum(**_tensors(data.collate_training([row], 1))) for row in rows]
    expected = sum(loss.item() for loss, _ in sums) / sum(count.item() for _, count in sums)
    assert losses == pytest.approx([expected] * 3, rel=1e-5)


def _tensors(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def test_validation_loss_is_over_answers_whatever_is_trained_on(settings: Settings) -> None:
    counts = []
    for masked in (True, False):
        data, _, _ = experiment.build(settings | {"mask_prompt": masked})
        batches = list(data.val_dataloader())
        counts.append([(batch["labels"] != IGNORED).sum().item() for batch in batches])
    assert counts[0] == counts[1]


def test_a_gold_answer_beyond_the_models_positions_has_no_loss(settings: Settings) -> None:
    """A context cut for a short generated answer leaves no room for a long gold one."""
    settings |= {"max_length": 256, "max_new_tokens": 2}
    data, module, _ = experiment.build(settings)
    row = dict(data.validation[0])
    row["context_ids"] = [5] * (254 - len(data.head) - len(row["question_ids"]))
    row["answer_ids"] = [7] * 10
    batch = data.collate_evaluation([row, data.validation[1]])
    assert len(batch["rows"]) == len(batch["prompts"]) == 2
    assert len(batch["labels"]) == 1
    module.eval()
    assert len(module.predict(batch)) == 2


def test_the_learning_rate_falls_to_zero(settings: Settings, tmp_path: Path) -> None:
    _, trainer = fit(settings, tmp_path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_a_loss_that_is_not_finite_stops_the_run(settings: Settings, tmp_path: Path) -> None:
    settings["lr"] = 1e30
    settings["trainer"]["gradient_clip_val"] = None
    with pytest.raises(UserError, match="at step [1-9]"):
        fit(settings, tmp_path)


def test_trained_weights_come_back_from_their_file(settings: Settings, tmp_path: Path) -> None:
    module, _ = fit(settings, tmp_path)
    module.save_trained(tmp_path / "best.safetensors")
    _, other, _ = experiment.build(settings)
    other.load_trained(tmp_path / "best.safetensors")
    for name, weight in module.trained().items():
        assert torch.equal(weight, other.trained()[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_runs_on_cuda(settings: Settings, tmp_path: Path) -> None:
    module, _ = fit(settings, tmp_path, accelerator="cuda")
    assert len(module.epochs) == 3


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS device")
def test_training_runs_on_mps(settings: Settings, tmp_path: Path) -> None:
    module, _ = fit(settings, tmp_path, accelerator="mps")
    assert len(module.epochs) == 3
