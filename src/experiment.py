"""One run: build data, model and trainer; score, fine-tune, score; record."""

import hashlib
import inspect
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger

import terminal
from checkpoint import Journal, RunCheckpoint, StopSignal
from cost import CostMonitor, anatomy, estimate
from datamodule import SquadDataModule
from errors import UserError
from hub import folder_of
from identity import weights_fingerprint
from lit_module import LitQuestionAnswering
from logs import SHOWN, MetricsFile, SampleAnswers, answers_table
from precision import device_name, frozen_dtype, precision_of
from predictions import Prediction, scores
from qa.kernels import onednn_is_faster
from qa.model import load_tokenizer, max_positions
from settings import unknown
from splits import Splits
from study import record

Settings = dict[str, Any]


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Fine-tune and score as `settings` (conf/) say, into `folder`; go on where it was interrupted.

    Gives what results.json holds.

    Raises:
        UserError: something asked for can't be done; known before training where it can be.
        Interrupted: a stop signal came; the same call goes on.
    """
    began = time.time()
    _quiet()
    settings["trainer"]["precision"] = precision_of(settings["trainer"])
    record.write_text(
        folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    )
    cost = CostMonitor()
    data, module, model_facts = build(settings)
    commit = record.commit()  # now: the files may change while the run goes on
    with StopSignal() as stop:
        last = folder / "checkpoints" / "last.ckpt"
        checkpoint = RunCheckpoint(last.parent, 60 * settings["checkpoint_minutes"], stop)
        trainer = build_trainer(settings, folder, last, [checkpoint, cost])
        before = _scores_before(settings, data, model_facts)
        terminal.announce(
            settings, folder, data.facts, model_facts, module.size, trainer, last.is_file(),
            estimate(module, data, trainer, tests=1 if before else 2),
        )  # fmt: skip
        if before is None:
            predictions = _test(trainer, module, data, folder / "before.partial.jsonl")
            before = scores(predictions)
            record.write_json(_before_file(settings, data, model_facts), before)
        trainer.fit(module, data, ckpt_path=last if last.is_file() else None, weights_only=True)
        if not module.epochs:
            raise UserError("No epoch came to its end: there is nothing to score. Check trainer.*")
        parts = anatomy(module, data, trainer)
        module.load_trained(checkpoint.best)
        exported = module.export(folder)
        journal = folder / "predictions.partial.jsonl"
        predictions = _test(trainer, module, data, journal)
    contexts = data.test.contexts["context"]
    record.write_json(
        folder / "contexts.json", {str(number): text for number, text in enumerate(contexts)}
    )
    record.write_lines(folder / "predictions.jsonl", sorted(predictions, key=lambda p: p["id"]))
    results = {
        "config": settings,
        "data": data.facts,
        "model": model_facts,
        "parameters": module.size,
        "shapes": {name: list(weight.shape) for name, weight in module.trained().items()},
        "epochs": module.epochs,
        "best_epoch": min(module.epochs, key=lambda epoch: epoch["validation_loss"])["epoch"],
        "before": before,
        "test": scores(predictions),
        "cost": cost.summary()
        | {
            "step": parts,
            "exported_bytes": sum(file.stat().st_size for file in exported.glob("*.safetensors")),
            "session_seconds": time.time() - began,
        },
        "exported": exported.name,
        "environment": record.environment(device_name(trainer.strategy.root_device), commit),
    }
    wrong = [p for p in sorted(predictions, key=lambda p: p["id"]) if not p["exact_match"]]
    _log_results(trainer, results, wrong[:SHOWN])
    record.write_json(folder / "results.json", results)  # last: where it is, the run is finished
    for file in (journal, folder / "before.partial.jsonl"):
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
    settings: Settings, folder: Path, last: Path, callbacks: list[L.Callback]
) -> L.Trainer:
    """Lightning's trainer with this project's loggers and `callbacks`.

    Raises:
        UserError: Lightning does not take an argument in trainer.*.
    """
    arguments = settings["trainer"]
    accepted = inspect.signature(L.Trainer).parameters
    if surplus := [key for key in arguments if key not in accepted]:
        raise unknown(f"trainer.{surplus[0]}", [f"trainer.{name}" for name in accepted])
    if arguments["num_nodes"] != 1 or arguments["devices"] not in (1, "1", [0]):
        raise UserError(
            f"trainer.devices={arguments['devices']}, trainer.num_nodes={arguments['num_nodes']}: "
            "a run uses one device so far. Give each run of a sweep a device of its own."
        )
    step = 0
    if last.is_file():
        step = torch.load(last, weights_only=True, mmap=True, map_location="cpu")["global_step"]
    tensorboard = TensorBoardLogger(
        folder, name="", version="tb", default_hp_metric=False, purge_step=step or None
    )
    try:
        return L.Trainer(
            **arguments,
            default_root_dir=folder,
            logger=[tensorboard, MetricsFile(folder / "metrics.csv", step)],
            callbacks=[*callbacks, SampleAnswers(), LearningRateMonitor("step")],
            num_sanity_val_steps=0,  # the scores before training have tried all of it
            enable_model_summary=False,
            use_distributed_sampler=False,  # the sampler deals its steps itself
        )
    except (MisconfigurationException, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"Lightning refuses trainer.*: {str(error).splitlines()[0]}") from None


def _test(
    trainer: L.Trainer, module: LitQuestionAnswering, data: SquadDataModule, file: Path
) -> list[Prediction]:
    """The answers to all test questions; those that `file` holds already are not asked again."""
    journal = Journal(file)
    module.on_prediction = journal.add
    loader = data.test_dataloader(skip=len(journal.batches))
    if len(loader):
        trainer.test(module, loader, verbose=False)
    return journal.predictions


def _before_file(settings: Settings, data: SquadDataModule, model: dict[str, Any]) -> Path:
    """Where the scores before training are kept, by all that they depend on."""
    source = sorted((Path(__file__).parent / "qa").glob("*.py"))
    key = {
        "model": model["fingerprint"],
        "model_config": settings["model"]["config"],
        "test": data.facts["test"]["fingerprint"],
        "lengths": [settings["max_length"], settings["max_new_tokens"]],
        "precision": settings["trainer"]["precision"],
        "accelerator": settings["trainer"]["accelerator"],
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in source)).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(settings["cache_dir"]) / "before" / f"{name}.json"


def _scores_before(
    settings: Settings, data: SquadDataModule, model: dict[str, Any]
) -> dict[str, Any] | None:
    file = _before_file(settings, data, model)
    return json.loads(file.read_text()) if file.is_file() else None


def _log_results(trainer: L.Trainer, results: dict[str, Any], wrong: list[Prediction]) -> None:
    """Fill TensorBoard's HPARAMS tab, and show some `wrong` answers to the test questions."""
    config = results["config"]
    keys = ("mode", "lr", "rank", "seed", "mask_prompt")  # five: more are hidden at first
    parameters = {key: config[key] for key in keys if config[key] is not None}
    metrics = {
        "test/exact_match": results["test"]["exact_match"],
        "test/f1": results["test"]["f1"],
        "test/f1_before": results["before"]["f1"],
        "best/validation_loss": min(epoch["validation_loss"] for epoch in results["epochs"]),
        "cost/train_seconds": results["cost"]["train_seconds"],
        "cost/peak_memory_MB": max(results["cost"]["peak_memory_bytes"].values()) / 1e6,
        "parameters/trainable": results["parameters"]["trainable"],
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(parameters, metrics)
            logger.experiment.add_text("test failures", answers_table(wrong), trainer.global_step)
            logger.finalize("success")


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
