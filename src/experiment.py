"""One run: build data, model and trainer; score, fine-tune, score; record."""

import inspect
import logging
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import transformers
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger

from datamodule import SquadDataModule
from lit_module import LitQuestionAnswering
from lora_or_full.config.schema import unknown
from lora_or_full.data.fingerprints import weights_fingerprint
from lora_or_full.data.hub import folder_of
from lora_or_full.data.splits import Splits
from lora_or_full.errors import UserError, first_line
from lora_or_full.evaluation.baseline_cache import keep, kept, place_of
from lora_or_full.evaluation.predictions import Prediction, scores
from lora_or_full.modeling.kernels import onednn_is_faster
from lora_or_full.modeling.loading import load_tokenizer, max_positions
from lora_or_full.modeling.precision import device_name, frozen_dtype, precision_of
from lora_or_full.runs import provenance, store
from lora_or_full.training import console
from lora_or_full.training.checkpoint import (
    BEFORE,
    CheckedCheckpointIO,
    Journal,
    RunCheckpoint,
    StopSignal,
    check_room,
    resume_point,
)
from lora_or_full.training.distributed import check_alike, connected, gathered, is_first
from lora_or_full.training.loggers import SHOWN, MetricsFile, SampleAnswers, log_results
from lora_or_full.training.profiling import CostMonitor, estimate, profile_step

Settings = dict[str, Any]


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Fine-tune and score as `settings` (conf/) say, into `folder`; go on where it was interrupted.

    Gives what results.json holds. Of several devices each has a process that calls this; all but
    the first write nothing and get nothing.

    Raises:
        UserError: something asked for can't be done; known before training where it can be.
        Interrupted: a stop signal came; the same call goes on.
    """
    began = time.time()
    _quiet()
    settings["trainer"]["precision"] = precision_of(settings["trainer"])
    if is_first():
        store.write_text(
            folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        )
    cost = CostMonitor()
    data, module, model_facts = build(settings)
    written = module.size["trainable" if settings["lora"] else "total"]
    check_room(folder, int(module.size["trainable"]), int(written))
    commit = provenance.commit()  # now: the files may change while the run goes on
    states, journal = folder / "checkpoints", folder / "predictions.partial.jsonl"
    # What the first process finds holds for all: files may change between their looks.
    last, step = resume_point(states) if is_first() else (None, 0)
    stop = StopSignal()
    checkpoint = RunCheckpoint(states, 60 * settings["checkpoint_minutes"], stop)
    trainer = build_trainer(settings, folder, step, [checkpoint, cost])
    with stop, connected(trainer):
        check_alike(folder, settings["trainer"]["precision"])
        data.deal(trainer.world_size, trainer.global_rank)
        place = place_of(settings, data.facts["test"]["fingerprint"], model_facts["fingerprint"])
        before, last, step = trainer.strategy.broadcast((kept(place), last, step))
        seconds = estimate(module, data, trainer, tests=1 if before else 2)
        if trainer.is_global_zero:
            console.announce(
                settings, folder, data.facts, model_facts, module.size, trainer, last is not None,
                seconds,
            )  # fmt: skip
        if before is None:
            predictions = _test(trainer, module, data, folder / "before.partial.jsonl")
            if trainer.is_global_zero:
                before = scores(predictions)
                keep(before, place)
        trainer.fit(module, data, ckpt_path=last, weights_only=True)
        if trainer.global_step > step and trainer.is_global_zero:
            journal.unlink(missing_ok=True)  # its answers are those of weights before
        if not module.epochs:
            raise UserError("No epoch came to its end: there is nothing to score. Check trainer.*")
        parts = profile_step(module, data, trainer)
        module.load_trained(checkpoint.best)
        predictions = _test(trainer, module, data, journal)
        costs = cost.summary()
        devices = Counter(gathered(device_name(trainer.strategy.root_device)))
    if not trainer.is_global_zero:
        return {}
    exported = module.export(folder)
    contexts = data.test.contexts["context"]
    store.write_json(
        folder / "contexts.json", {str(number): text for number, text in enumerate(contexts)}
    )
    store.write_lines(folder / "predictions.jsonl", sorted(predictions, key=lambda p: p["id"]))
    results = {
        "config": settings,
        "data": data.facts,
        "model": model_facts,
        "parameters": module.size,
        "shapes": {
            name: list(weight.shape) for name, weight in module.trainable_parameters().items()
        },
        "epochs": module.epochs,
        "best_epoch": module.best_epoch["epoch"],
        "before": before,
        "test": scores(predictions),
        "cost": costs
        | {
            "step": parts,
            "exported_bytes": sum(file.stat().st_size for file in exported.glob("*.safetensors")),
            "session_seconds": time.time() - began,
        },
        "exported": exported.name,
        "environment": provenance.environment(
            " + ".join(name if n == 1 else f"{n} x {name}" for name, n in devices.items()), commit
        ),
    }
    wrong = [p for p in sorted(predictions, key=lambda p: p["id"]) if not p["exact_match"]]
    log_results(trainer, results, wrong[:SHOWN])
    made = [file for file in sorted(exported.rglob("*")) if file.is_file()]
    files = [folder / "predictions.jsonl", folder / "contexts.json", *made]
    store.write_results(folder, results, files)
    for file in (journal, folder / "before.partial.jsonl", states / BEFORE):
        file.unlink(missing_ok=True)
    return results


def build(settings: Settings) -> tuple[SquadDataModule, LitQuestionAnswering, dict[str, Any]]:
    """The data, the model, and facts of the model before training.

    Raises:
        UserError: either can't be had, or they do not fit together.
    """
    cache = Path(settings["cache_dir"])
    model = settings["model"]
    model_folder = folder_of(model["name"], "model", cache)
    tokenizer = load_tokenizer(model_folder)
    positions = max_positions(model_folder)
    room = positions - settings["max_new_tokens"]
    if settings["max_length"] > positions or room < 1:
        raise UserError(
            f"max_length={settings['max_length']}, max_new_tokens={settings['max_new_tokens']}: "
            f"{model['name']} reads at most {positions} tokens."
        )
    data = SquadDataModule(
        tokenizer,
        Splits(**settings["data"], seed=settings["seed"], cache_dir=cache),
        batch_size=settings["batch_size"],
        eval_batch_size=settings["eval_batch_size"],
        max_length=settings["max_length"],
        max_prompt_length=min(settings["max_length"], room),
        positions=positions,
        mask_prompt=settings["mask_prompt"],
        packed_length=None,  # until it is known whether the model can share a context
        parts=settings["trainer"]["accumulate_grad_batches"],
        cache_dir=cache,
    )
    data.setup()
    module = LitQuestionAnswering(
        model_folder,
        model["name"],
        model["config"],
        settings["lora"],
        frozen_dtype(settings["frozen_dtype"], settings["trainer"]["precision"], settings["lora"]),
        tokenizer,
        learning_rate=settings["lr"],
        **settings["optimizer"],
        total_steps=settings["trainer"]["max_epochs"] * data.steps,
        max_length=settings["max_length"],
        max_new_tokens=settings["max_new_tokens"],
        packed_length=settings["packed_length"] if settings["packing"] else None,
        seed=settings["seed"],
    )
    data.packed_length = module.packed_length
    facts = {
        "name": model["name"],
        "type": module.model.config.model_type,
        "fingerprint": weights_fingerprint(model_folder),
        "shares_context": module.packed_length is not None,
        "onednn_products": onednn_is_faster(),
    }
    return data, module, facts


def build_trainer(
    settings: Settings, folder: Path, step: int, callbacks: list[L.Callback]
) -> L.Trainer:
    """Lightning's trainer with this project's loggers and `callbacks`; it goes on from `step`.

    Raises:
        UserError: Lightning does not take an argument in trainer.*.
    """
    arguments = settings["trainer"]
    accepted = inspect.signature(L.Trainer).parameters
    if surplus := [key for key in arguments if key not in accepted]:
        raise unknown(f"trainer.{surplus[0]}", [f"trainer.{name}" for name in accepted])
    tensorboard = TensorBoardLogger(
        folder, name="", version="tb", default_hp_metric=False, purge_step=step
    )
    try:
        trainer = L.Trainer(
            **arguments,
            default_root_dir=folder,
            logger=[tensorboard, MetricsFile(folder / "metrics.csv", step)],
            callbacks=[*callbacks, SampleAnswers(), LearningRateMonitor("step")],
            plugins=[CheckedCheckpointIO()],
            num_sanity_val_steps=0,  # the scores before training have tried all of it
            enable_model_summary=False,
            use_distributed_sampler=False,  # the sampler deals its steps itself
        )
    except (
        MisconfigurationException, ImportError, ValueError, RuntimeError, TypeError,
    ) as error:  # fmt: skip
        raise UserError(f"Lightning refuses trainer.*: {first_line(error)}") from None
    shares = trainer.world_size * trainer.accumulate_grad_batches
    if shares > settings["batch_size"]:
        raise UserError(
            f"trainer.devices={arguments['devices']}, trainer.num_nodes={arguments['num_nodes']}, "
            f"trainer.accumulate_grad_batches={arguments['accumulate_grad_batches']}: a step of "
            f"batch_size={settings['batch_size']} questions can't be dealt to {shares}."
        )
    return trainer


def _test(
    trainer: L.Trainer, module: LitQuestionAnswering, data: SquadDataModule, file: Path
) -> list[Prediction]:
    """The answers to all test questions; those that `file` holds already are not asked again.

    The process of the first device alone keeps them.
    """
    journal = Journal(file) if trainer.is_global_zero else None
    if journal is not None:
        module.on_prediction = journal.add
    loader = data.test_dataloader(
        trainer.strategy.broadcast(len(journal.batches) if journal else 0)
    )
    if len(loader):
        trainer.test(module, loader, verbose=False)
    return journal.predictions if journal else []


def _quiet() -> None:
    """Leave out what libraries say of themselves; the run says it in its own words."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # Libraries that use what another library has renamed: nothing that a person could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    # Batches are made of rows that are tokenized already: workers would only cost memory.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
