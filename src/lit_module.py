"""GPT-2 with LoRA or for full fine-tuning: loss, answers, scores, optimizer, checkpoint."""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from datamodule import EvaluationBatch
from lora_or_full.data.prompt import IGNORED
from lora_or_full.errors import UserError
from lora_or_full.evaluation.predictions import Prediction, prediction
from lora_or_full.generation.decoding import Answer, greedy, stop_ids
from lora_or_full.generation.kv_cache import shares_context
from lora_or_full.modeling import trained_weights
from lora_or_full.modeling.kernels import speed_up_full
from lora_or_full.modeling.loading import add_lora, load_model, store_frozen
from lora_or_full.modeling.prefix_packing import Sequences
from lora_or_full.training.distributed import gathered


class LitQuestionAnswering(L.LightningModule):
    """A causal language model that learns to answer questions over a context.

    `lora` holds the arguments of PEFT's LoraConfig; None fine-tunes every weight. `config` replaces
    values of the model's own configuration. Frozen weights of matrix products are kept in
    `frozen_dtype`. After `total_steps` the learning rate is zero. All other arguments are as in
    conf/.

    `packed_length` is None, whatever was asked for, if the model can't share a context.

    `epochs` holds a dict for each epoch that ended: train_loss and validation_loss (means over
    label tokens, nats), exact_match and f1 (percent, on the validation split). Each prediction of
    the test goes to `on_prediction` as soon as its batch is answered. All of this is the same in
    the process of each device.

    Raises:
        UserError: the model can't be loaded, or the loss is not finite.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        lora: Mapping[str, Any] | None,
        frozen_dtype: torch.dtype,
        tokenizer: PreTrainedTokenizerBase,
        learning_rate: float,
        weight_decay: float,
        betas: Sequence[float],
        eps: float,
        warmup_steps: int,
        total_steps: int,
        max_length: int,
        max_new_tokens: int,
        packed_length: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        model = load_model(folder, name, config)
        longest = max_length + max_new_tokens
        if packed_length is not None and not shares_context(model.eval(), longest):
            packed_length = None
        self.packed_length = packed_length
        self.model: PreTrainedModel | PeftModel = model
        if lora is None:
            speed_up_full(model)
        else:
            torch.manual_seed(seed)  # LoRA's first matrices are drawn here
            self.model = add_lora(model, lora)
        # from_pretrained leaves a model in eval mode, and Lightning keeps what it finds.
        self.model.train()
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        # `trainable` and `total` weights, and the `percent` that the first are of the second
        self.size = {"trainable": trainable, "total": total, "percent": 100 * trainable / total}
        if isinstance(self.model, PeftModel) and frozen_dtype != torch.float32:
            store_frozen(self.model, frozen_dtype)
        self.tokenizer, self.stops = tokenizer, stop_ids(tokenizer)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.betas, self.eps, self.warmup_steps = (betas[0], betas[1]), eps, warmup_steps
        # Lightning could tell this too, but by building the loader too early to resume it.
        self.total_steps = total_steps
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.epochs: list[dict[str, float]] = []
        self.train_loss = MeanMetric(sync_on_compute=False)  # it counts all devices at each step
        # of this validation: the loss on each gold answer with its tokens; the answers
        self.losses: list[tuple[float, int]] = []
        self.samples: list[Prediction] = []
        self.on_prediction: Callable[[list[Prediction]], None] = lambda predictions: None
        # A checkpoint holds the trained weights only; `on_load_checkpoint` checks that it has them.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:  # whose gradients are summed whole
            for layer in self.model.modules():
                if isinstance(layer, torch.nn.Embedding):
                    layer.sparse = False

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The weights that training changes, by name; tied ones once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def best_epoch(self) -> dict[str, float]:
        """Of the epochs that ended the one to score and to keep: that of the highest validation F1,
        of equals that of the lowest validation loss, of equals the first."""
        return max(self.epochs, key=lambda epoch: (epoch["f1"], -epoch["validation_loss"]))

    def loss_sum(self, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed cross entropy (nats) over the labels that count, and their number."""
        targets = sequences.labels[:, 1:]  # (B, T-1): a token's label is predicted one before it
        columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)  # (K,)
        # (B, K, V): only of the columns that hold a label in some row
        logits = self.model(**sequences.model_inputs(columns), use_cache=False).logits
        chosen = targets[:, columns]  # (B, K)
        loss = cross_entropy(
            logits.float().flatten(0, 1), chosen.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return loss, (chosen != IGNORED).sum()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a function of the moment: a resumed run goes on with the same one.
        moment = f"{self.seed} {self.current_epoch} {batch_idx} {self.global_rank}"
        torch.manual_seed(random.Random(moment).getrandbits(63))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss, count = self.loss_sum(batch["sequences"])
        # of all devices: what is wrong with one stops all of them, and what is told is of all
        total, tokens = self.trainer.strategy.reduce(
            torch.stack([loss.detach(), count.to(loss)]), reduce_op="sum"
        )
        if not torch.isfinite(total):
            raise UserError(
                f"The loss is {total.item()} at step {self.global_step} of epoch "
                f"{self.current_epoch + 1}. The last good checkpoint is kept. A smaller lr, "
                "more optimizer.warmup_steps or trainer.precision=32-true may help."
            )
        if tokens > 0:
            self.train_loss.update(total / tokens, weight=tokens)
            self.log("train/loss", total / tokens, prog_bar=True)
        # Lightning divides by the parts of a step and averages over devices: undone here, since
        # a token weighs the same in whichever part it is.
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return loss * share / batch["step_labels"]

    def on_train_epoch_end(self) -> None:
        self.epochs[-1]["train_loss"] = self.train_loss.compute().item()
        self.train_loss.reset()
        self.log("train/epoch_loss", self.epochs[-1]["train_loss"], sync_dist=True)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        answers = self.answers(batch, with_golds=True)
        self.losses += [
            (-answer.gold_log_probability, len(gold))
            for answer, gold in zip(answers, batch.golds, strict=True)
            if answer and answer.gold_log_probability is not None and gold
        ]
        self.samples += list(map(prediction, batch.rows, answers))

    def on_validation_epoch_end(self) -> None:
        shares = gathered((self.losses, self.samples))
        losses = [loss for own, _ in shares for loss in own]
        self.losses, self.samples = [], [sample for _, own in shares for sample in own]
        # Sums that are rounded once do not depend on which device had which batch.
        tokens = sum(count for _, count in losses)
        loss = math.fsum(total for total, _ in losses) / tokens if tokens else math.nan
        scores = {
            "validation_loss": loss,
            "exact_match": statistics.fmean(sample["exact_match"] for sample in self.samples),
            "f1": statistics.fmean(sample["f1"] for sample in self.samples),
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
        for predictions in gathered(list(map(prediction, batch.rows, self.answers(batch)))):
            if predictions:
                self.on_prediction(predictions)

    def answers(self, batch: EvaluationBatch, with_golds: bool = False) -> list[Answer | None]:
        """The answer to each row of the batch, with the log-probability of its gold one if wanted;
        None where the prompt is too long."""
        asked = [prompt for prompt in batch.prompts if prompt is not None]
        golds = [gold for gold, p in zip(batch.golds, batch.prompts, strict=True) if p is not None]
        found = iter(
            greedy(
                self.model, self.tokenizer, asked, self.stops, self.max_new_tokens,
                self.packed_length, golds if with_golds else None,
            )
        )  # fmt: skip
        return [None if prompt is None else next(found) for prompt in batch.prompts]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.trainable_parameters().values(),
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=self.trainer.scaler is None,  # else Lightning can't clip: it unscales first
        )
        schedule = get_linear_schedule_with_warmup(optimizer, self.warmup_steps, self.total_steps)
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
        # Of the base class: that of mixed precision refuses a fused optimizer, for a scaler's sake.
        plugin = self.trainer.precision_plugin
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self.trainable_parameters()
        if bad := [name for name, weight in trained.items() if not torch.isfinite(weight).all()]:
            raise UserError(
                f"{len(bad)} weights are not finite at step {self.global_step}, the first: "
                f"{bad[0]}. The checkpoint before is kept. A smaller lr may help."
            )
        checkpoint["state_dict"] = {name: weight.detach() for name, weight in trained.items()}
        checkpoint["epochs"] = self.epochs
        checkpoint["train_loss"] = [self.train_loss.mean_value, self.train_loss.weight]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_names(checkpoint["state_dict"].keys(), "The checkpoint")
        self.epochs = checkpoint["epochs"]
        self.train_loss.mean_value, self.train_loss.weight = (
            value.to(self.device) for value in checkpoint["train_loss"]
        )

    def save_trained(self, file: Path) -> None:
        """Write the trained weights as safetensors, whole or not at all."""
        trained_weights.save(self.trainable_parameters(), file)

    @torch.no_grad()
    def load_trained(self, file: Path) -> None:
        """Take the trained weights from a file of `save_trained`.

        Raises:
            UserError: it is damaged, or of another model.
        """
        saved, trained = trained_weights.saved(file), self.trainable_parameters()
        if saved is None:
            raise UserError(f"{file} is damaged. To train it again: resume={file.parents[1]}")
        self._check_names(saved.keys(), str(file))
        for name, weight in trained.items():
            weight.copy_(saved[name])

    def export(self, folder: Path) -> Path:
        """Write the adapter (PEFT's format) or the whole model, and the tokenizer; say where."""
        if isinstance(self.model, PeftModel):
            place = folder / "adapter"
            # By default PEFT asks the hub whether the base model's embedding was resized.
            self.model.save_pretrained(str(place), save_embedding_layers=False)
        else:
            place = folder / "model"
            self.model.save_pretrained(str(place))
        self.tokenizer.save_pretrained(str(place))
        return place

    def _check_names(self, names: Any, source: str) -> None:
        expected = set(self.trainable_parameters())
        if expected != set(names):
            missing, surplus = len(expected - set(names)), len(set(names) - expected)
            raise UserError(
                f"{source} is of another model: {missing} trained weights are missing in it, "
                f"{surplus} have no place here."
            )
