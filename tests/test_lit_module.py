"""The module: which weights move, which tokens carry loss, how a token weighs."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from configs import FULL
from layouts import labels_of
from repeater import Repeater
from torch.nn.functional import cross_entropy

import experiment
import lit_module
from lit_module import LitQuestionAnswering
from lora_or_full.config.schema import validate
from lora_or_full.data.prompt import IGNORED
from lora_or_full.data.tokenized import prompt_of
from lora_or_full.errors import UserError
from lora_or_full.modeling.cuda_graphs import GraphedLoss
from lora_or_full.modeling.prefix_packing import Packed, Padded

Settings = dict[str, Any]
SquadWriter = Callable[..., Path]


def as_full(settings: Settings) -> Settings:
    return settings | FULL


def without_dropout(settings: Settings) -> Settings:
    if settings["adapter"] is not None:
        settings["adapter"]["lora_dropout"] = 0.0
    settings["model"]["config"] = dict.fromkeys(settings["model"]["config"], 0.0)
    return settings


def drawn_by_paragraph(settings: Settings, folder: Path, squad_file: SquadWriter) -> Settings:
    """Four questions a paragraph, so that there is much to share."""
    files = [squad_file(folder / f"more{n}.json", 5, 2, 4, seed=n) for n in range(2)]
    settings["data"] |= {
        "path": str(files[0]), "test_path": str(files[1]), "draw_by": "paragraph",
        "validation_size": None,
    }  # fmt: skip
    return settings


def fit(settings: Settings, folder: Path, **trainer: Any) -> tuple[LitQuestionAnswering, L.Trainer]:
    arguments = settings["trainer"] | trainer
    data, module, _ = experiment.build(validate(settings | {"trainer": arguments}))
    lightning = L.Trainer(
        **arguments, logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    lightning.fit(module, data)
    return module, lightning


def test_lora_moves_its_matrices_and_nothing_else(settings: Settings, tmp_path: Path) -> None:
    _, untouched, _ = experiment.build(validate(settings))
    before = copy.deepcopy(untouched.state_dict())
    module, _ = fit(settings, tmp_path)
    after = module.state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == set(module.trainable_parameters())
    assert len(moved) == 4


def test_full_moves_every_weight_that_the_rows_reach(settings: Settings, tmp_path: Path) -> None:
    settings = as_full(settings)
    _, untouched, _ = experiment.build(validate(settings))
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
        seen.append(batch["sequences"].input_ids.flatten().tolist())
        return original(self, batch, index)

    monkeypatch.setattr(LitQuestionAnswering, "training_step", step)
    fit(settings, tmp_path)
    fit(as_full(settings), tmp_path)
    assert seen[:9] == seen[9:]
    assert seen[:3] != seen[3:6]  # each epoch in an order of its own


@pytest.mark.parametrize("packing", [True, False])
def test_loss_is_that_of_the_label_tokens(settings: Settings, packing: bool) -> None:
    data, module, _ = experiment.build(validate(settings | {"packing": packing}))
    module.eval()
    batch = data.collate_training([data.train[n] for n in range(4)], 1)["sequences"]
    assert isinstance(batch, Packed if packing else Padded)
    with torch.no_grad():
        loss, count = module.loss_sum(batch)
        logits = module.model(**batch.model_inputs()).logits
    plain = cross_entropy(
        logits[:, :-1].flatten(0, 1), labels_of(batch)[:, 1:].flatten(),
        ignore_index=IGNORED, reduction="sum",
    )  # fmt: skip
    assert count == (labels_of(batch) != IGNORED).sum() > 0
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize(("packing", "packed_length"), [(False, 1), (True, 1), (True, 1024)])
def test_neither_padding_nor_sharing_changes_a_loss(
    settings: Settings, packing: bool, packed_length: int, tmp_path: Path, squad_file: SquadWriter
) -> None:
    settings = drawn_by_paragraph(settings, tmp_path, squad_file)
    data, module, _ = experiment.build(
        validate(settings | {"packing": packing, "packed_length": packed_length})
    )
    module.eval()
    rows = [data.train[n] for n in range(6)]
    assert len({row["paragraph"] for row in rows}) < 6
    with torch.no_grad():
        whole, _ = module.loss_sum(data.collate_training(rows, 1)["sequences"])
        alone = 0.0
        for row in rows:
            ids = [*prompt_of(row).prompt, *row["answer_ids"]]
            labels = [IGNORED] * row["prompt_tokens"] + row["answer_ids"]
            output = module.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
            alone += output.loss.item() * row["answer_tokens"]
    assert whole.item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_that_shares_contexts_ends_at_the_weights_of_one_that_does_not(
    settings: Settings, mode: str, tmp_path: Path, squad_file: SquadWriter
) -> None:
    settings = drawn_by_paragraph(settings, tmp_path, squad_file)
    settings = without_dropout(settings if mode == "lora" else as_full(settings))
    # Gradients that are zero but for rounding, as those of keys' biases are, shall move nothing.
    settings["optimizer"]["eps"] = 1e-4
    settings["lr"] = 1e-3
    read: list[int] = []
    runs = []
    for packing, packed_length in ((False, 1), (True, 120), (True, 1024)):
        again = settings | {"packing": packing, "packed_length": packed_length}
        module, trainer = fit(copy.deepcopy(again), tmp_path)
        assert trainer.global_step == 9
        loader = trainer.train_dataloader
        read.append(sum(batch["sequences"].input_ids.numel() for batch in loader))
        runs.append(module)
    assert read[0] > read[1] > read[2]  # else nothing was shared
    _, untouched, _ = experiment.build(validate(settings))
    for other in runs[1:]:
        for name, weight in runs[0].trainable_parameters().items():
            assert torch.allclose(weight, other.trainable_parameters()[name], atol=1e-5, rtol=0), (
                name
            )
            assert not torch.allclose(weight, untouched.trainable_parameters()[name], atol=1e-4), (
                name
            )
        for one, two in zip(runs[0].epochs, other.epochs, strict=True):
            assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_accumulated_parts_train_as_one_step(
    settings: Settings, mode: str, packing: bool, tmp_path: Path
) -> None:
    """Ten questions in steps of four: the last step leaves a part without a row."""
    settings = settings if mode == "lora" else as_full(settings)
    settings["optimizer"]["eps"] = 1e-3  # what is zero but for rounding shall move nothing
    settings = without_dropout(settings | {"packing": packing})
    whole, _ = fit(copy.deepcopy(settings), tmp_path)
    settings["trainer"]["accumulate_grad_batches"] = 3
    parts, trainer = fit(settings, tmp_path)
    assert trainer.global_step == 9
    for name, weight in whole.trainable_parameters().items():
        assert torch.allclose(weight, parts.trainable_parameters()[name], atol=1e-6)
    for one, other in zip(whole.epochs, parts.epochs, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_validation_depends_on_no_way_of_computing_it(
    settings: Settings, tmp_path: Path, squad_file: SquadWriter
) -> None:
    """The loss is a mean over the tokens of all answers; each answer is that to its own prompt."""
    settings = drawn_by_paragraph(settings, tmp_path, squad_file)
    ways = itertools.product((1, 3, 8), ((False, 1), (True, 1), (True, 90), (True, 1024)))
    losses, answers = [], []
    for size, (packing, packed_length) in ways:
        change = {"eval_batch_size": size, "packing": packing, "packed_length": packed_length}
        data, module, _ = experiment.build(validate(settings | change))
        said: dict[str, Any] = {}
        answer = module.answers

        def keep(
            batch: Any, with_references: bool, answer: Any = answer, said: dict[str, Any] = said
        ) -> Any:
            found = answer(batch, with_references)
            said |= {
                row["id"]: (own.text, own.ended) for row, own in zip(batch.rows, found, strict=True)
            }
            return found

        module.answers = keep  # type: ignore[method-assign]
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.validate(module, data, verbose=False)
        losses.append(module.epochs[0]["validation_loss"])
        answers.append(said)
    rows = list(data.validation)
    assert len(rows) == len(answers[0]) == 8
    module.eval()
    with torch.no_grad():
        sums = [module.loss_sum(data.collate_training([row], 1)["sequences"]) for row in rows]
    expected = sum(loss.item() for loss, _ in sums) / sum(count.item() for _, count in sums)
    assert losses == pytest.approx([expected] * len(losses), rel=1e-5)
    assert all(said == answers[0] for said in answers)
    assert len(set(answers[0].values())) > 1


def test_validation_loss_is_over_answers_whatever_is_trained_on(settings: Settings) -> None:
    losses = []
    for masked in (True, False):
        data, module, _ = experiment.build(validate(settings | {"mask_prompt": masked}))
        module.eval()
        for batch in data.val_dataloader():
            module.validation_step(batch, 0)
        losses.append(module.losses)
    assert losses[0] == losses[1]
    assert len(losses[0]) == len(data.validation)


def test_training_on_prompts_too_shares_no_context_but_evaluation_does(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that is shared would count once, not once a question."""
    seen: set[type] = set()
    original = LitQuestionAnswering.loss_sum

    def loss_sum(self: LitQuestionAnswering, sequences: Any) -> Any:
        assert self.training
        seen.add(type(sequences))
        return original(self, sequences)

    monkeypatch.setattr(LitQuestionAnswering, "loss_sum", loss_sum)
    module, _ = fit(settings | {"mask_prompt": False}, tmp_path)
    assert seen == {Padded}
    assert module.packed_length == settings["packed_length"]


def test_a_model_that_can_not_share_a_context_trains_and_answers_by_rows(
    settings: Settings, windowed_folder: Path, tmp_path: Path
) -> None:
    settings["model"] |= {"name": str(windowed_folder), "config": {}}
    settings["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    results = experiment.run(validate(copy.deepcopy(settings)), tmp_path / "run")
    assert results["model"]["shares_context"] is False
    assert results["config"]["packing"] is True  # what was asked for
    plain = experiment.run(validate(settings | {"packing": False}), tmp_path / "plain")
    assert plain["epochs"] == results["epochs"]
    data, module, _ = experiment.build(validate(settings))
    assert module.packed_length is data.packed_length is None
    assert isinstance(data.collate_training([data.train[0]], 1)["sequences"], Padded)


def test_a_window_that_answers_alone_outgrow_shares_no_context(
    settings: Settings, windowed_folder: Path
) -> None:
    settings |= {"max_length": 200, "max_new_tokens": 20}
    settings["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    for window, shared in ((230, 1024), (210, None), (190, None)):
        settings["model"] |= {"name": str(windowed_folder), "config": {"sliding_window": window}}
        assert experiment.build(validate(settings))[1].packed_length == shared


def test_a_base_model_is_tried_once_for_each_content(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def trial(model: Any, length: int) -> bool:
        tried.append(length)
        return len(tried) > 1

    monkeypatch.setattr(lit_module, "shares_context", trial)
    other = copy.deepcopy(settings)
    other["model"]["config"]["resid_pdrop"] = 0.3
    cases = (settings, settings | FULL, other, settings | {"max_length": 150}, settings)
    found = [experiment.build(validate(case))[1].packed_length for case in cases]
    assert found == [None, None, 1024, 1024, None]
    assert tried == [204, 204, 154]


@pytest.mark.parametrize("packing", [True, False])
def test_the_facts_tell_whether_contexts_are_shared(settings: Settings, packing: bool) -> None:
    data, module, facts = experiment.build(validate(settings | {"packing": packing}))
    assert facts["shares_context"] is packing
    assert data.packed_length == module.packed_length == (1024 if packing else None)


@pytest.mark.parametrize("packing", [True, False])
def test_a_gold_answer_beyond_the_models_positions_has_no_loss(
    settings: Settings, packing: bool
) -> None:
    """A context cut for a short generated answer leaves no room for a long gold one."""
    settings |= {"max_length": 256, "max_new_tokens": 2, "packing": packing}
    data, module, _ = experiment.build(validate(settings))
    row = dict(data.validation[0])
    row["context_ids"] = [5] * (254 - len(row["prefix_ids"]) - len(row["question_ids"]))
    row["answer_ids"] = [7] * 10
    short = data.validation[1]
    batch = data.collate_evaluation([row, short])
    assert len(batch.rows) == len(batch.prompts) == 2
    assert batch.references == [[], short["answer_ids"]]
    module.eval()
    module.validation_step(batch, 0)
    assert len(module.samples) == 2
    [(loss, count)] = module.losses
    assert loss > 0
    assert count == len(short["answer_ids"])


# Precision and clipping


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize(("algorithm", "most"), [("norm", 0.05), ("value", 0.001), (None, 0.05)])
def test_gradients_are_clipped_in_mixed_precision_too(
    settings: Settings, mode: str, algorithm: str | None, most: float, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sizes: list[tuple[float, float]] = []
    original = LitQuestionAnswering.configure_gradient_clipping

    def size(module: LitQuestionAnswering) -> float:
        whole = torch.cat(
            [weight.grad.flatten() for weight in module.trainable_parameters().values()]
        )
        return (whole.abs().max() if algorithm == "value" else whole.norm()).item()

    def clip(self: LitQuestionAnswering, *arguments: Any, **words: Any) -> None:
        before = size(self)
        original(self, *arguments, **words)
        sizes.append((before, size(self)))

    monkeypatch.setattr(LitQuestionAnswering, "configure_gradient_clipping", clip)
    more = {"gradient_clip_algorithm": algorithm} if algorithm else {}
    _, trainer = fit(
        settings if mode == "lora" else as_full(settings), tmp_path,
        precision="bf16-mixed", gradient_clip_val=most, **more,
    )  # fmt: skip
    assert trainer.optimizers[0].defaults["fused"]
    assert len(sizes) == 9
    assert all(before > most for before, _ in sizes)
    assert [after for _, after in sizes] == pytest.approx([most] * 9, rel=1e-3)


def test_without_a_largest_norm_gradients_stay(settings: Settings) -> None:
    _, module, _ = experiment.build(validate(settings))
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer = module.configure_optimizers()["optimizer"]
    for weight in module.trainable_parameters().values():
        weight.grad = torch.full_like(weight, 100.0)
    module.configure_gradient_clipping(optimizer, None, None)
    assert all((weight.grad == 100.0).all() for weight in module.trainable_parameters().values())


def test_how_frozen_weights_are_stored_changes_neither_a_run_nor_its_counts(
    settings: Settings, tmp_path: Path
) -> None:
    """In mixed precision; in float32 they are not stored otherwise."""
    runs = {}
    for stored, precision in (
        ("auto", "bf16-mixed"), ("float32", "bf16-mixed"), ("auto", "32-true"),
    ):  # fmt: skip
        change = {"frozen_dtype": stored}
        runs[stored, precision], _ = fit(settings | change, tmp_path, precision=precision)
    low, plain, exact = runs.values()
    dtypes = [{p.dtype for p in module.parameters()} for module in (low, plain, exact)]
    assert dtypes == [{torch.float32, torch.bfloat16}, {torch.float32}, {torch.float32}]
    assert low.size == plain.size == exact.size
    assert low.epochs == plain.epochs
    assert low.epochs != exact.epochs
    for name, weight in plain.trainable_parameters().items():
        assert torch.equal(weight, low.trainable_parameters()[name])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_lightnings_other_precisions_train_and_answer(
    settings: Settings, precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    settings = without_dropout(settings)
    exact, _ = fit(copy.deepcopy(settings), tmp_path)
    other, _ = fit(settings, tmp_path, precision=precision)
    assert {p.dtype for p in other.parameters()} == {dtype}
    losses = [[epoch["validation_loss"] for epoch in run.epochs] for run in (exact, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


# The run


def test_the_learning_rate_falls_to_zero(settings: Settings, tmp_path: Path) -> None:
    _, trainer = fit(settings, tmp_path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_a_loss_that_is_not_finite_stops_the_run(settings: Settings, tmp_path: Path) -> None:
    settings["lr"] = 1e30
    settings["trainer"]["gradient_clip_val"] = None
    with pytest.raises(UserError, match="at step [1-9]"):
        fit(settings, tmp_path)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("packing", [True, False])
def test_checkpointed_activations_give_the_same_gradients_in_less_memory(
    mode: str, packing: bool, settings: Settings
) -> None:
    """With LoRA too, whose first trained weight comes after frozen embeddings; with dropout."""
    settings["packing"] = packing
    settings = as_full(settings) if mode == "full" else settings
    results = []
    for checkpointed in (False, True):
        settings["model"]["gradient_checkpointing"] = checkpointed
        data, module, _ = experiment.build(validate(settings))
        batch = next(iter(data.train_dataloader()))["sequences"]
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = module.train().loss_sum(batch)
        loss.backward()
        gradients = [
            w.grad.to_dense() for w in module.trainable_parameters().values() if w.grad is not None
        ]
        results.append((loss.item(), gradients, sum(kept.values())))
    (loss, gradients, size), (other, others, less) = results
    assert loss == other
    assert len(gradients) == len(others) == len(module.trainable_parameters())
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two)
    assert less < size


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_fit_by_replays_ends_at_the_weights_of_one_without(
    accumulated: int, settings: Settings, tmp_path: Path
) -> None:
    """In rows, as on a GPU; without one, a replay does the work again."""
    settings["trainer"]["accumulate_grad_batches"] = accumulated
    weights = []
    for replays in (False, True):
        data, module, _ = experiment.build(validate(settings))
        data.in_rows = True
        if replays:
            own = list(module.trainable_parameters().values())
            module.graphed = GraphedLoss(module.loss_sum, own, Repeater())
        trainer = L.Trainer(
            **settings["trainer"], logger=False, enable_checkpointing=False,
            enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, data)
        weights.append([w.detach().clone() for w in module.trainable_parameters().values()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("overflows", "raises"), [([1, 2, 4], False), (range(1, 18), True)])
def test_under_a_scaler_a_few_losses_may_overflow(
    overflows: list[int], raises: bool, settings: Settings, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It skips their steps. What they were does not count in the mean loss of the epoch."""
    calls = itertools.count()
    losses: list[tuple[float, int]] = []
    original = LitQuestionAnswering.loss_sum

    def loss_sum(self: LitQuestionAnswering, sequences: Any) -> Any:
        loss, count = original(self, sequences)
        if next(calls) in overflows:
            return loss + torch.inf, count
        losses.append((loss.item(), int(count)))
        return loss, count

    monkeypatch.setattr(LitQuestionAnswering, "loss_sum", loss_sum)
    monkeypatch.setattr(L.Trainer, "scaler", property(lambda self: object()))
    if raises:
        with pytest.raises(UserError, match="The loss is inf at step 17"):
            fit(settings, tmp_path, max_epochs=9)
        return
    module, _ = fit(settings, tmp_path)
    for epoch in module.epochs:
        own = losses[: 1 if epoch["epoch"] == 1 else 2 if epoch["epoch"] == 2 else 3]
        del losses[: len(own)]
        mean = sum(loss for loss, _ in own) / sum(count for _, count in own)
        assert epoch["train_loss"] == pytest.approx(mean)
    assert not losses


def test_trained_weights_come_back_from_their_file(settings: Settings, tmp_path: Path) -> None:
    module, _ = fit(settings, tmp_path)
    module.save_trained(tmp_path / "best.safetensors")
    _, other, _ = experiment.build(validate(settings))
    other.load_trained(tmp_path / "best.safetensors", 3)
    for name, weight in module.trainable_parameters().items():
        assert torch.equal(weight, other.trainable_parameters()[name])


def test_damaged_weights_are_refused(settings: Settings, tmp_path: Path) -> None:
    _, module, _ = experiment.build(validate(settings))
    file = tmp_path / "run" / "checkpoints" / "best.safetensors"
    module.epochs = [{"epoch": 1}]
    module.save_trained(file)
    damaged = f"best.safetensors is damaged.*resume={tmp_path / 'run'}"
    with pytest.raises(UserError, match=damaged):
        module.load_trained(file, 2)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=damaged):
        module.load_trained(file, 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_runs_on_cuda(settings: Settings, tmp_path: Path) -> None:
    module, _ = fit(settings, tmp_path, accelerator="cuda")
    assert len(module.epochs) == 3


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS device")
def test_training_runs_on_mps(settings: Settings, tmp_path: Path) -> None:
    module, _ = fit(settings, tmp_path, accelerator="mps")
    assert len(module.epochs) == 3
