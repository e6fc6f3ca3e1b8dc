"""Trained models that answer questions: finished runs, and other PEFT adapters and models."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from lora_or_full.config import compose
from lora_or_full.config.schema import Config
from lora_or_full.data import tokenized
from lora_or_full.data.fingerprints import weights_fingerprint
from lora_or_full.data.hub import folder_of
from lora_or_full.data.prompt import Prompt, PromptTokens, encode
from lora_or_full.data.sampler import evaluation_batches
from lora_or_full.data.squad import Question
from lora_or_full.data.tokenized import TokenizedQuestion
from lora_or_full.errors import UserError
from lora_or_full.evaluation.predictions import Answer
from lora_or_full.evaluation.spans import Span, spans
from lora_or_full.generation.context_session import ContextSession
from lora_or_full.generation.decoding import greedy, stop_ids
from lora_or_full.generation.kv_cache import Model
from lora_or_full.generation.sharing import shares_context
from lora_or_full.modeling.architecture import hidden_size, max_positions
from lora_or_full.modeling.loading import (
    load_adapter,
    load_model,
    load_tokenizer,
)
from lora_or_full.modeling.precision import (
    STORED,
    autocast_for,
    device_of,
    frozen_dtype,
    resolve_precision,
    store_weights,
)
from lora_or_full.runs import store
from lora_or_full.runs.reader import not_a_run, read_record, weights_folder
from lora_or_full.runs.schema import RunRecord

BASE = "--model=FOLDER (or a hub id) names its base model."


class Reply(NamedTuple):
    """An answer about a context.

    Attributes:
        text: Empty if the model generates no text.
        probability: Product of the probabilities of its tokens, the end included.
        ended: Whether it ended by itself.
        spans: Where the text is in the context.
    """

    text: str
    probability: float
    ended: bool
    spans: list[Span]


@dataclass(frozen=True)
class Predictor:
    """A model in eval mode that answers as it did in its run.

    Attributes:
        label: Name that tells it from others.
        model: The model, with or without an adapter.
        tokenizer: Its tokenizer.
        config: Configuration of its run; the defaults of conf/ if it is not of a run.
        positions: Tokens that the model can read at once.
        record: Record of its run; None if it is not of a run.
        examples: Token ids of answered examples, which `answers` puts before each prompt.
    """

    label: str
    model: Model
    tokenizer: PreTrainedTokenizerBase
    config: Config
    positions: int
    record: RunRecord | None
    examples: Sequence[int] = ()

    @property
    def max_prompt_length(self) -> int:
        """Largest number of tokens of a prompt, without the examples."""
        room = self.positions - self.config.max_new_tokens - len(self.examples)
        return min(self.config.max_length, room)

    def with_examples(self, questions: Sequence[Question]) -> "Predictor":
        """Give the same model, to be asked after examples with their first gold answers.

        Raises:
            UserError: The examples leave no room for a question.
        """
        texts = [
            f"{self.prompt.text(q.context, q.question)}"
            f"{self.prompt.template.lead}{q.answers[0].strip()}\n"
            for q in questions
        ]
        [ids] = encode(self.tokenizer, ["".join(texts)], self.prompt.special)
        found = replace(self, examples=ids)
        if found.max_prompt_length < 1:
            raise UserError(
                f"--shots={len(questions)}: the examples have {len(ids):,} tokens, and the model "
                f"reads {self.positions:,}. Fewer of them leave room for a question."
            )
        return found

    def _after_examples(self, asked: PromptTokens) -> PromptTokens:
        start = len(self.prompt.start)
        prefix = [*asked.prefix[:start], *self.examples, *asked.prefix[start:]]
        return asked._replace(prefix=prefix)

    @cached_property
    def prompt(self) -> Prompt:
        """Makes its prompts."""
        return Prompt(self.tokenizer, self.config.prompt)

    @cached_property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_ids(self.tokenizer, self.prompt.end)

    @cached_property
    def _packed_length(self) -> int | None:
        """None if the model can't share a context, which the record of a run says."""
        if self.record is not None:
            shares = self.record.model.shares_context
        else:
            shares = shares_context(self.model, self.max_prompt_length + self.config.max_new_tokens)
        return self.config.packed_length + len(self.examples) if shares else None

    def read(self, context: str) -> ContextSession:
        """Read a context, for questions by `ask`.

        Raises:
            UserError: It is empty.
        """
        if not context.strip():
            raise UserError("The context is empty.")
        with autocast_for(self.config.trainer.precision, self.model.device):
            return ContextSession(self.model, self.prompt, context, self.max_prompt_length)

    def ask(self, session: ContextSession, question: str, alternatives: int) -> list[Reply]:
        """Answer a question greedily, followed by alternatives.

        Args:
            session: A context that was read.
            question: The question.
            alternatives: Largest number of alternatives (`ContextSession.ask`).

        Raises:
            UserError: The question is empty or too long.
        """
        with autocast_for(self.config.trainer.precision, self.model.device):
            answers = session.ask(question, self.stops, self.config.max_new_tokens, alternatives)
        return [
            Reply(
                answer.text,
                math.exp(answer.log_probability),
                answer.ended,
                spans(answer.text, session.context),
            )
            for answer in answers
        ]

    def answers(
        self, questions: Sequence[Question]
    ) -> list[tuple[TokenizedQuestion, Answer | None]]:
        """Answer questions greedily, in the same batches as a run's own test.

        Returns:
            The row of each question (`tokenized.make`), and its answer; None if the question alone
            is too long.
        """
        limit = self.max_prompt_length
        rows = tokenized.make(questions, self.prompt, limit, training=False)
        batches = evaluation_batches(rows, self.config.eval_batch_size)
        found: dict[int, Answer] = {}
        console = Console(stderr=True)
        hidden = not console.is_terminal
        for batch in track(batches, self.label, console=console, transient=True, disable=hidden):
            fit = {n: row for n in batch if (row := rows[n])["prompt_tokens"] <= limit}
            prompts = list(map(tokenized.prompt_of, fit.values()))
            with autocast_for(self.config.trainer.precision, self.model.device):
                answers = greedy(
                    self.model, self.tokenizer, list(map(self._after_examples, prompts)),
                    self.stops, self.config.max_new_tokens, self._packed_length,
                    cuda_graphs=self.config.cuda_graphs,
                )  # fmt: skip
            found |= zip(fit, answers, strict=True)
        return [(rows[n], found.get(n)) for n in range(len(rows))]


def load(folder: Path, base: str | None, config: Config | None = None) -> Predictor:
    """Load a finished run, an adapter or a model.

    Args:
        folder: Folder of a finished run, of an adapter in PEFT's format, or of a model.
        base: Hub id or folder of the base model; None if `folder` names it.
        config: Configuration of a model that is of no run; None for the defaults of conf/.

    Raises:
        UserError: The folder holds none of these, is damaged, or has another base model.
    """
    quiet_transformers()
    if (folder / store.RESULTS).is_file():
        return _load_run(folder, base)
    if (folder / "adapter_config.json").is_file():
        return _load_adapter_folder(folder, base, config)
    if (folder / "config.json").is_file():
        return _ready(folder, load_model(folder, str(folder), {}), folder, folder, config, None)
    raise not_a_run(folder, "results.json, adapter_config.json or config.json")


def quiet_transformers() -> None:
    """Silence messages and progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def base_folder(folder: Path, record: RunRecord, base: str | None) -> Path:
    """Folder of a run's base model.

    Args:
        folder: The run's folder.
        record: Its record.
        base: Hub id or folder of the same model; None for the one that the run names.

    Raises:
        UserError: The model is not available, or is another one.
    """
    own = record.config.model.name
    found = _model_folder(base or own, Path(record.config.cache_dir))
    if (fingerprint := weights_fingerprint(found)) != record.model.fingerprint:
        raise UserError(
            f"{base or own} is another base model (weights {fingerprint}) than {folder} was "
            f"trained on: {own}, weights {record.model.fingerprint}. {BASE}"
        )
    return found


def _load_run(folder: Path, base: str | None) -> Predictor:
    record = read_record(folder, RunRecord)
    weights = weights_folder(folder, record)
    if record.exported == "adapter":
        source = base_folder(folder, record, base)
        settings = record.config.model
        model: Model = load_adapter(load_model(source, settings.name, settings.config), weights)
    else:
        source, model = weights, load_model(weights, str(weights), {})
    return _ready(folder, model, source, weights, record.config, record)


def _load_adapter_folder(folder: Path, base: str | None, config: Config | None) -> Predictor:
    file = folder / "adapter_config.json"
    try:
        name = base or json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}: {error}).") from None
    if not isinstance(name, str) or not name:
        raise UserError(f"The adapter in {folder} does not name its base model. {BASE}")
    source = _model_folder(name, Path(compose.defaults().cache_dir))
    model = load_adapter(load_model(source, name, {}), folder)
    own = (folder / "tokenizer_config.json").is_file()
    return _ready(folder, model, source, folder if own else source, config, None)


def _ready(
    folder: Path,
    model: Model,
    source: Path,
    tokenizer: Path,
    config: Config | None,
    record: RunRecord | None,
) -> Predictor:
    if config is None:
        config = compose.defaults()
        config = config.with_precision(resolve_precision(config.trainer, hidden_size(model.config)))
    store_weights(model.requires_grad_(False), frozen_dtype(config))
    torch.set_float32_matmul_precision(config.matmul_precision)
    dtype = STORED.get(config.trainer.precision)
    torch.nn.Module.to(model, device_of(config.trainer.accelerator), dtype)
    label, positions = folder.resolve().name, max_positions(model.config)
    return Predictor(label, model.eval(), load_tokenizer(tokenizer), config, positions, record)


def _model_folder(name: str, cache: Path) -> Path:
    try:
        return folder_of(name, "model", cache)
    except UserError as error:
        raise UserError(f"The base model is not available: {BASE} ({error})") from None
