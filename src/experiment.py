"""One run: build data, model and trainer; score, fine-tune, score; record."""

import inspect
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar

from datamodule import SquadDataModule
from lit_module import LitQuestionAnswering
from lora_or_full.config.near_misses import unknown
from lora_or_full.config.schema import RESERVED, Config
from lora_or_full.data.fingerprints import first_weights, weights_fingerprint
from lora_or_full.data.hub import folder_of
from lora_or_full.errors import UserError, first_line
from lora_or_full.evaluation import base_model_cache
from lora_or_full.evaluation.predictions import Prediction, scores
from lora_or_full.evaluation.scoring import warn_of_script
from lora_or_full.modeling.architecture import (
    hidden_size,
    max_positions,
    settings_of,
)
from lora_or_full.modeling.kernels import onednn_is_faster
from lora_or_full.modeling.loading import load_tokenizer
from lora_or_full.modeling.precision import (
    device_name,
    device_of,
    resolve_precision,
    warn_of_unused_gpu,
)
from lora_or_full.processes import is_first_process, stop_signals_to
from lora_or_full.runs import provenance, store
from lora_or_full.training import checkpoint, console, plugins
from lora_or_full.training.distributed import check_alike, connected, gathered
from lora_or_full.training.loggers import (
    SHOWN,
    CalmProgressBar,
    MetricsFile,
    SampleAnswers,
    log_configuration,
    log_results,
)
from lora_or_full.training.memory import FreeMemory
from lora_or_full.training.memory_estimate import check_memory, memory_explained
from lora_or_full.training.profiling import CostMonitor, estimate_duration, profile_step


def run(config: Config, folder: Path, earlier: float = 0.0) -> dict[str, Any]:
    """Fine-tune and score, or resume where the run in `folder` was interrupted.

    With several devices, each has a process that calls this. All but the first write nothing.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        earlier: Seconds that starts before this one took, as far as they are known.

    Returns:
        What results.json holds; nothing in all processes but the first.

    Raises:
        UserError: The run is not possible; raised before training where it can be known.
        Interrupted: A stop signal came; the same call resumes.
    """
    _quiet_libraries()
    config = with_precision(config)
    torch.set_float32_matmul_precision(config.matmul_precision)
    if config.trainer.accelerator == "auto":
        warn_of_unused_gpu()
    if is_first_process():
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        store.write_text(folder / "config.yaml", text)
    cost = CostMonitor(earlier)
    checkpoints, answered = folder / "checkpoints", folder / "predictions.partial.jsonl"
    # What the first process finds holds for all: files may change between their looks.
    last, step = checkpoint.resume_point(checkpoints) if is_first_process() else (None, 0)
    saver = checkpoint.RunCheckpoint(checkpoints, 60 * config.checkpoint_minutes)
    state_share = plugins.state_share(config)
    trainer = build_trainer(config, folder, step, [saver, cost])
    data, module, model_facts = build(config)
    config = module.config  # with the layers that `auto` stands for
    plugins.optimizer(config, module.trainable_parameters().values())  # refused now, if it is
    exported_weights = module.size["total" if config.adapter is None else "trainable"]
    if is_first_process():
        if data.tokenizer.chat_template and not data.prompt.special:
            print(
                f"Warning: {config.model.name} has a chat template, which this prompt leaves out: "
                "before training it may score too low. prompt=chat uses it.",
                file=sys.stderr,
            )
        golds = (text for texts in data.test.column("answers") for text in texts)
        warn_of_script(golds, config.scoring)
    checkpoint.check_room(folder, int(module.size["trainable"]), int(exported_weights), state_share)
    commit = provenance.commit()  # now: the files may change during the run
    with stop_signals_to(saver.request_stop), connected(trainer), memory_explained(config):
        check_alike(folder, config.trainer.precision)
        data.deal(trainer.world_size, trainer.global_rank)
        test_set = data.facts["test"]["fingerprint"]
        weights = "+".join(filter(None, map(model_facts.get, ("fingerprint", "first_weights"))))
        device = device_name(trainer.strategy.root_device)
        cached = base_model_cache.scores_folder(config, test_set, weights, device)
        before, last, step = trainer.strategy.broadcast((base_model_cache.load(cached), last, step))
        memory = check_memory(module, data, trainer)
        seconds = estimate_duration(module, data, trainer, tests=1 if before else 2)
        if trainer.is_global_zero:
            console.print_rows(
                "Will run" if last is None else "Resumes", "will_run",
                config=config, folder=folder, data=data.facts, model=model_facts,
                parameters=module.size, trainer=trainer, seconds=seconds, memory=memory,
                swept={key: config.flat().get(key) for key in store.swept_keys(folder)},
            )  # fmt: skip
        log_configuration(trainer, config)
        if before is None:
            predictions = _test(trainer, module, data, folder / "before.partial.jsonl")
            if trainer.is_global_zero:
                before = scores(predictions, config.metrics)
                base_model_cache.save(before, cached)
        trainer.fit(module, data, ckpt_path=last, weights_only=True)
        if trainer.global_step > step and trainer.is_global_zero:
            answered.unlink(missing_ok=True)  # answers of earlier weights
        if not module.epochs:
            raise UserError("No epoch was completed: there is nothing to score. Check trainer.*")
        profile = profile_step(module, data, trainer)
        best = checkpoint.best_epoch(module.epochs)["epoch"]
        module.load_trained(saver.best, best)
        predictions = _test(trainer, module, data, answered)
        costs = cost.summary()
        counts = Counter(gathered(device)).items()
        devices = " + ".join(name if n == 1 else f"{n} x {name}" for name, n in counts)
    if not trainer.is_global_zero:
        return {}
    predictions.sort(key=lambda prediction: prediction["id"])
    exported = module.export(folder)
    results = {
        "config": config.to_dict(),
        "data": data.facts,
        "model": model_facts,
        "parameters": module.size,
        "shapes": {n: list(weight.shape) for n, weight in module.trainable_parameters().items()},
        "epochs": module.epochs,
        "best_epoch": best,
        "before": before,
        "test": scores(predictions, config.metrics),
        "cost": {
            **costs,
            "step": profile,
            "exported_bytes": sum(file.stat().st_size for file in exported.glob("*.safetensors")),
            "session_seconds": cost.whole_seconds,
        },
        "exported": exported.name,
        "environment": provenance.environment(devices, commit),
    }
    wrong = [p for p in predictions if not p["exact_match"]][:SHOWN]
    log_results(trainer, config, results, wrong, store.swept_keys(folder))
    _write(folder, results, predictions, data.test.contexts["context"])
    partial = folder / "before.partial.jsonl"
    before_last = [checkpoints / name for name in (checkpoint.BEFORE, checkpoint.BEST_BEFORE)]
    for file in (answered, partial, *before_last):
        file.unlink(missing_ok=True)
    return results


def with_precision(config: Config) -> Config:
    """Give the configuration with the precision that this hardware and the model's width decide.

    Raises:
        UserError: The model is not available.
    """
    folder = folder_of(config.model.name, "model", Path(config.cache_dir))
    return config.with_precision(
        resolve_precision(config.trainer, hidden_size(settings_of(folder)))
    )


def build(config: Config) -> tuple[SquadDataModule, LitQuestionAnswering, dict[str, Any]]:
    """Build the data and the model, and give facts about the model before training.

    Raises:
        UserError: One of them is not available, or they do not fit together.
    """
    folder = folder_of(config.model.name, "model", Path(config.cache_dir))
    tokenizer, positions = load_tokenizer(folder), max_positions(settings_of(folder))
    if config.max_length > positions or config.max_new_tokens >= positions:
        raise UserError(
            f"max_length={config.max_length}, max_new_tokens={config.max_new_tokens}: "
            f"{config.model.name} reads at most {positions} tokens."
        )
    data = SquadDataModule(config, tokenizer, positions)
    data.setup()
    steps = config.trainer.max_epochs * data.steps
    first = config.init_from and first_weights(config, weights_fingerprint(folder))
    module = LitQuestionAnswering(config, folder, tokenizer, steps, first or None)
    data.packed_length = module.packed_length
    data.in_rows = device_of(config.trainer.accelerator).type == "cuda"
    facts = {
        "name": config.model.name,
        **module.base,
        **({"first_weights": weights_fingerprint(first)} if first else {}),
        "shares_context": module.packed_length is not None,
        "onednn_products": onednn_is_faster(),
    }
    return data, module, facts


def build_trainer(
    config: Config, folder: Path, step: int, callbacks: list[L.Callback]
) -> L.Trainer:
    """Build Lightning's trainer with its loggers and callbacks, to resume from an optimizer step.

    Raises:
        UserError: Lightning does not accept an argument in trainer.*, or a logger or callback can't
            be built.
    """
    arguments = config.trainer.model_dump()
    accepted = inspect.signature(L.Trainer).parameters
    if surplus := [key for key in arguments if key not in accepted]:
        raise unknown(
            f"trainer.{surplus[0]}",
            [f"trainer.{name}" for name in accepted if name not in RESERVED],
        )
    rate = f"lr-{config.optimizer.target.rpartition('.')[2]}"  # LearningRateMonitor's name
    metrics = MetricsFile(folder / "metrics.csv", step, [rate, *plugins.logged(config)])
    watchers: list[L.Callback] = [SampleAnswers(), LearningRateMonitor("step"), FreeMemory()]
    watchers += plugins.callbacks(config, folder)
    if config.trainer.enable_progress_bar and not any(isinstance(w, ProgressBar) for w in watchers):
        watchers.append(CalmProgressBar(config.trainer.log_every_n_steps))
    try:
        trainer = L.Trainer(
            **arguments,
            default_root_dir=folder,
            logger=[*plugins.loggers(config, folder, step), metrics],
            callbacks=[*callbacks, *watchers],
            plugins=[checkpoint.CheckedCheckpointIO()],
            num_sanity_val_steps=0,  # scoring before training has tried all of it
            enable_model_summary=False,
            use_distributed_sampler=False,  # the sampler deals its steps itself
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"Lightning refuses trainer.*: {first_line(error)}") from None
    shares = trainer.world_size * trainer.accumulate_grad_batches
    if shares > config.batch_size:
        given = config.trainer
        raise UserError(
            f"trainer.devices={given.devices}, trainer.num_nodes={given.num_nodes}, "
            f"trainer.accumulate_grad_batches={given.accumulate_grad_batches}: a step of "
            f"batch_size={config.batch_size} questions can't be dealt to {shares}."
        )
    return trainer


def _test(
    trainer: L.Trainer, module: LitQuestionAnswering, data: SquadDataModule, file: Path
) -> list[Prediction]:
    """Answer all test questions but those that `file` holds already.

    Only the first device's process keeps the predictions.
    """
    journal = checkpoint.Journal(file) if trainer.is_global_zero else None
    if journal is not None:
        module.on_prediction = journal.add
    answered = trainer.strategy.broadcast(len(journal.batches) if journal else 0)
    loader = data.test_dataloader(answered)
    if len(loader):
        trainer.test(module, loader, verbose=False)
    return journal.predictions if journal else []


def _write(
    folder: Path, results: dict[str, Any], predictions: list[Prediction], contexts: list[str]
) -> None:
    """Write the record of a finished run, results.json last."""
    texts = {str(number): text for number, text in enumerate(contexts)}
    store.write_json(folder / "contexts.json", texts)
    store.write_lines(folder / "predictions.jsonl", predictions)
    weights = [f for f in sorted((folder / results["exported"]).rglob("*")) if f.is_file()]
    files = [folder / "predictions.jsonl", folder / "contexts.json", *weights]
    store.write_results(folder, results, files)


def _quiet_libraries() -> None:
    """Silence messages of libraries that a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # Libraries that use what another library has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    # Batches consist of questions that are tokenized already: workers would only cost memory.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
