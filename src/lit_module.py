"""A causal language model with an adapter or fully trainable: loss, answers, scores, checkpoint."""

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodule import EvaluationBatch
from lora_or_full.config.schema import AUTO, Config
from lora_or_full.data.fingerprints import weights_fingerprint
from lora_or_full.data.prompt import IGNORED, Prompt
from lora_or_full.errors import UserError
from lora_or_full.evaluation import base_model_cache
from lora_or_full.evaluation.predictions import Answer, Prediction, prediction, values
from lora_or_full.generation.decoding import greedy, stop_ids
from lora_or_full.generation.sharing import shares_context
from lora_or_full.modeling import trained_weights
from lora_or_full.modeling.adapter_weights import set_adapter_weights
from lora_or_full.modeling.architecture import (
    attention_projections,
    given_values,
    settings_of,
    sliding_window,
)
from lora_or_full.modeling.cuda_graphs import GraphedLoss, Recorder
from lora_or_full.modeling.kernels import checkpoint_activations, speed_up_full
from lora_or_full.modeling.loading import add_adapter, check_adapter, load_model
from lora_or_full.modeling.packed_rows import Sequences
from lora_or_full.modeling.precision import device_of, frozen_dtype, store_weights
from lora_or_full.training import plugins
from lora_or_full.training.distributed import gathered

# Losses in a row that may overflow under a gradient scaler: it halves its scale, 65,536, each time.
OVERFLOWS = 16


class LitQuestionAnswering(L.LightningModule):
    """A causal language model that learns to answer questions about a context.

    Args:
        config: The run's configuration, its precision resolved. With `adapter` only the adapter's
            weights are trained; without, every weight is.
        folder: Local folder of the base model.
        tokenizer: The base model's tokenizer.
        total_steps: Optimizer steps of the whole training.
        first: Folder of the weights that training starts from; None for those of the base model and
            a new adapter.

    Attributes:
        config: The configuration, with the layers that `auto` stands for and the model's dropouts.
        base: The `prompt` as a template, and whether it holds `special_tokens`; `type` and
            `sliding_window` of the base model (tokens that some of its layers see), `fingerprint`
            and `dtype` of its weights in their file.
        packed_length: Tokens of a context with its questions; None if `packing` is off or the model
            can't share a context.
        size: Number of `trainable` and `total` weights, and the `percent` of the first.
        epochs: One dict per finished epoch: train_loss and validation_loss (means over label
            tokens, nats), and the metrics (percent, on the validation split).
        on_prediction: Called with the predictions of each test batch as soon as it is answered.

    With several devices all of this is the same in each process.

    Raises:
        UserError: The model can't be loaded, or the loss is not finite.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        total_steps: int,
        first: Path | None = None,
    ) -> None:
        super().__init__()
        prompt = Prompt(tokenizer, config.prompt)
        self.tokenizer, self.stops = tokenizer, stop_ids(tokenizer, prompt.end)
        # Lightning could count the steps too, but it would build the loader too early to resume it.
        self.total_steps = total_steps
        source = first if first is not None and config.adapter is None else folder
        settings = given_values(settings_of(folder), config.model.config)
        model = load_model(source, config.model.name, settings)
        config = self.config = config.with_layers(attention_projections(model) or AUTO, settings)
        fingerprint = weights_fingerprint(folder)
        self.base = {
            "type": model.config.model_type,
            "fingerprint": fingerprint,
            "prompt": prompt.template.shown(),
            "special_tokens": prompt.special,
            "dtype": str(model.dtype).removeprefix("torch."),
            "sliding_window": sliding_window(model.config),
        }
        longest = config.max_length + config.max_new_tokens
        packing = config.packing and prompt.template.context_first
        shared = packing and base_model_cache.shares_context(
            config, fingerprint, partial(shares_context, model, longest)
        )
        self.packed_length = config.packed_length if shared else None
        self.model: PreTrainedModel | PeftModel = model
        kept_dtype = frozen_dtype(config)
        if kept_dtype == torch.float32:
            model.float()  # before there is an adapter: DoRA's begins with the norms of its weights
        if config.adapter is not None:
            torch.manual_seed(config.seed)  # the adapter's initial weights are drawn here
            self.model = add_adapter(model, config.adapter)
            check_adapter(self.model, config.adapter)
            if first is not None:
                set_adapter_weights(self.model, first)
        elif device_of(config.trainer.accelerator).type == "cpu":
            speed_up_full(model)
        if config.model.gradient_checkpointing:
            checkpoint_activations(model)
        # from_pretrained leaves a model in eval mode, and Lightning keeps what it finds.
        self.model.train()
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        self.size = {"trainable": trainable, "total": total, "percent": 100 * trainable / total}
        store_weights(self.model, kept_dtype)
        self.epochs: list[dict[str, float]] = []
        self.graphed: GraphedLoss | None = None
        # Of this epoch, over all devices: loss and labels; of this moment: losses in a row that
        # were not finite. On the device, since to read them there each step would make it wait.
        self.train_sums, self.failed = torch.zeros(2), torch.zeros(())
        # Of this validation: the loss of each gold answer with its tokens; the predictions.
        self.losses: list[tuple[float, int]] = []
        self.samples: list[Prediction] = []
        self.on_prediction: Callable[[list[Prediction]], None] = lambda predictions: None
        # A checkpoint holds the trained weights only; `on_load_checkpoint` checks that it has them.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        """Lightning's hook: use dense embedding gradients where devices sum them."""
        if self.trainer.world_size > 1:
            for layer in self.model.modules():
                if isinstance(layer, torch.nn.Embedding):
                    layer.sparse = False

    def on_fit_start(self) -> None:
        """Lightning's hook: move sums to the device, and prepare CUDA graphs for one device."""
        self.train_sums, self.failed = (
            value.to(self.device) for value in (self.train_sums, self.failed)
        )
        if self.can_record and self.device.type == "cuda" and self.trainer.world_size == 1:
            weights = list(self.trainable_parameters().values())
            self.graphed = GraphedLoss(self.loss_sum, weights, Recorder())

    def on_fit_end(self) -> None:
        """Lightning's hook: free the graphs; the model leaves the device."""
        self.graphed = None
        self.zero_grad()

    @property
    def can_record(self) -> bool:
        """Whether the steps of one GPU are recorded as CUDA graphs."""
        packed = self.packed_length is not None and self.config.mask_prompt
        # Checkpointing reads the state of random numbers, which a recording must not.
        return packed and self.config.cuda_graphs and not self.config.model.gradient_checkpointing

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Weights that training changes, by name; tied ones once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def loss_sum(self, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross entropy over all labels.

        Args:
            sequences: Token ids and labels, packed or padded.

        Returns:
            The sum (nats), and the number of labels that count.
        """
        needed, targets = sequences.wanted  # (N), (N)
        logits = self.model(**sequences.model_inputs(needed), use_cache=False).logits  # (1, N, V)
        loss = cross_entropy(logits[0].float(), targets, ignore_index=IGNORED, reduction="sum")
        return loss, (targets != IGNORED).sum()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout by the batch, so that a resumed run continues with the same masks."""
        moment = f"{self.config.seed} {self.current_epoch} {batch_idx} {self.global_rank}"
        torch.manual_seed(random.Random(moment).getrandbits(63))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """Give the loss of a micro-batch, weighted by label tokens.

        Raises:
            UserError: The loss is not finite.
        """
        loss, count = (self.graphed or self.loss_sum)(batch["sequences"])
        # Over all devices: a fault of one stops all of them, and the logged loss is of all.
        sums = self.trainer.strategy.reduce(
            torch.stack([loss.detach(), count.to(loss)]), reduce_op="sum"
        )
        finite = sums[0].isfinite()
        self.failed = torch.where(finite, 0, self.failed + 1)
        self.train_sums += torch.where(finite, sums, 0)
        # To look makes a GPU wait for its results, so only now and then there.
        if self.device.type == "cpu" or batch_idx % self.config.trainer.log_every_n_steps == 0:
            self._check_loss(sums[0])
        self.log("train/loss", sums[0] / sums[1].clamp(min=1), prog_bar=True)
        # Lightning divides by the micro-batches and averages over devices. This undoes both, since
        # a token weighs the same in whichever micro-batch it is.
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return loss * share / batch["step_labels"]

    def _check_loss(self, loss: torch.Tensor) -> None:
        """Stop at a loss that is not finite; a scaler of gradients may skip some."""
        if self.failed > (OVERFLOWS if self.trainer.scaler else 0):
            raise UserError(
                f"The loss is {loss.item()} at step {self.global_step} of epoch "
                f"{self.current_epoch + 1}. The last good checkpoint is kept. A smaller lr, "
                "more scheduler.num_warmup_steps or trainer.precision=32-true may help."
            )

    def on_train_epoch_end(self) -> None:
        """Record the epoch's mean training loss."""
        loss, labels = self.train_sums.tolist()
        self.epochs[-1]["train_loss"] = loss / labels if labels else math.nan
        self.train_sums.zero_()
        self.log("train/epoch_loss", self.epochs[-1]["train_loss"], sync_dist=True)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Answer a batch, and keep the losses of its gold answers."""
        answers = self.answers(batch, with_references=True)
        self.losses += [
            (-answer.reference_log_probability, len(gold))
            for answer, gold in zip(answers, batch.references, strict=True)
            if answer and answer.reference_log_probability is not None and gold
        ]
        self.samples += self._scored(batch, answers)

    def on_validation_epoch_end(self) -> None:
        """Record the validation loss and scores of the epoch.

        Raises:
            UserError: The loss is not finite.
        """
        shares = gathered((self.losses, self.samples))
        losses = [loss for own, _ in shares for loss in own]
        self.losses, self.samples = [], [sample for _, own in shares for sample in own]
        # Sums that are rounded once do not depend on which device had which batch.
        tokens = sum(count for _, count in losses)
        loss = math.fsum(total for total, _ in losses) / tokens if tokens else math.nan
        scores = {
            "validation_loss": loss,
            **{name: statistics.fmean(values(self.samples, name)) for name in self.config.metrics},
        }
        if not math.isfinite(loss):
            raise UserError(
                f"The validation loss is {loss} in epoch {self.current_epoch + 1}. The last good "
                "checkpoint is kept. A smaller lr may help."
            )
        self.epochs.append({"epoch": self.current_epoch + 1, **scores})
        for name, value in scores.items():
            name = f"validation/{name.removeprefix('validation_')}"
            self.log(name, value, prog_bar=True, sync_dist=True)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Answer a batch and pass the predictions on."""
        for predictions in gathered(self._scored(batch, self.answers(batch))):
            if predictions:
                self.on_prediction(predictions)

    def answers(self, batch: EvaluationBatch, with_references: bool = False) -> list[Answer | None]:
        """Answer each question of a batch greedily.

        Args:
            batch: Questions with their prompts.
            with_references: Whether to also give the log-probability of each gold answer.

        Returns:
            One answer per row; None where the prompt is too long.
        """
        prompts = [prompt for prompt in batch.prompts if prompt is not None]
        references = [
            gold for gold, p in zip(batch.references, batch.prompts, strict=True) if p is not None
        ]
        found = iter(
            greedy(
                self.model, self.tokenizer, prompts, self.stops, self.config.max_new_tokens,
                self.packed_length, references if with_references else None,
                self.config.cuda_graphs,
            )
        )  # fmt: skip
        return [None if prompt is None else next(found) for prompt in batch.prompts]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Set up the optimizer and its schedule, which advances at every step."""
        weights, scaled = self.trainable_parameters().values(), self.trainer.scaler is not None
        optimizer = plugins.optimizer(self.config, weights, scaled)
        schedule = plugins.schedule(self.config, optimizer, self.total_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients by `trainer.gradient_clip_val`."""
        # The base class's: mixed precision's own refuses a fused optimizer because of its scaler.
        plugin = self.trainer.precision_plugin
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the trained weights only, and the epochs so far.

        Raises:
            UserError: A weight is not finite.
        """
        trained = self.trainable_parameters()
        if bad := [name for name, weight in trained.items() if not torch.isfinite(weight).all()]:
            raise UserError(
                f"{len(bad)} weights are not finite at step {self.global_step}, the first: "
                f"{bad[0]}. The checkpoint before is kept. A smaller lr may help."
            )
        checkpoint["state_dict"] = {name: weight.detach() for name, weight in trained.items()}
        checkpoint["epochs"] = self.epochs
        checkpoint["train_sums"] = self.train_sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored.

        Raises:
            UserError: The checkpoint has other weights than this model.
        """
        self._check_names(checkpoint["state_dict"].keys(), "The checkpoint")
        self.epochs = checkpoint["epochs"]
        self.train_sums = checkpoint["train_sums"].to(self.device)

    def save_trained(self, file: Path) -> None:
        """Write the trained weights after the last epoch as safetensors, atomically."""
        trained_weights.save(self.trainable_parameters(), int(self.epochs[-1]["epoch"]), file)

    @torch.no_grad()
    def load_trained(self, file: Path, epoch: float) -> None:
        """Load the trained weights after an epoch from a file of `save_trained`.

        Raises:
            UserError: The file is damaged, or of another epoch or model.
        """
        saved, trained = trained_weights.saved(file), self.trainable_parameters()
        if saved is None or saved.epoch != epoch:
            raise UserError(f"{file} is damaged. To train it again: resume={file.parents[1]}")
        self._check_names(saved.weights.keys(), str(file))
        for name, weight in trained.items():
            weight.copy_(saved.weights[name])

    def export(self, folder: Path) -> Path:
        """Write the adapter (PEFT's format) or the whole model, and the tokenizer.

        Returns:
            The folder inside `folder`.
        """
        if isinstance(self.model, PeftModel):
            path = folder / "adapter"
            # By default PEFT asks the hub whether the base model's embedding was resized.
            self.model.save_pretrained(str(path), save_embedding_layers=False)
        else:
            path = folder / "model"
            self.model.save_pretrained(str(path))
        self.tokenizer.save_pretrained(str(path))
        return path

    def _scored(self, batch: EvaluationBatch, answers: Sequence[Answer | None]) -> list[Prediction]:
        pairs = zip(batch.rows, answers, strict=True)
        return [prediction(row, answer, self.config) for row, answer in pairs]

    def _check_names(self, names: Iterable[str], source: str) -> None:
        expected, found = set(self.trainable_parameters()), set(names)
        if expected != found:
            missing, surplus = len(expected - found), len(found - expected)
            raise UserError(
                f"{source} is of another model: it lacks {missing} trained weights, and has "
                f"{surplus} that this model does not have."
            )
