"""Hand on what a run has trained, with a model card: lora-or-full export RUN

Writes the adapter or the model into a folder that plain peft and transformers read; with --merge
the adapter is folded into its base model, which then needs no peft.
"""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lora_or_full.cli.model_card import card, hub_id
from lora_or_full.data.hub import reachable
from lora_or_full.errors import UserError, first_line
from lora_or_full.runs import store
from lora_or_full.runs.reader import read_answers, read_record
from lora_or_full.runs.schema import EvaluationRecord, RunRecord

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SAME = 1e-3  # logits of a merged model may differ so much, in standard deviations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="RUN/export if left out")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into its base model")
    parser.add_argument(
        "--model", help="folder or hub id of the base model, where it is not the one that RUN names"
    )
    parser.add_argument(
        "--push", metavar="USER/NAME",
        help="also upload the folder to the hub, into a private repository if there is none yet",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Export, and print the folder and, if pushed, the address.

    Raises:
        UserError: The run can't be exported or pushed.
    """
    output = args.output or args.run / "export"
    if args.push is not None:
        check_pushable(args.run, args.merge, args.push)
    export(args.run, output, args.merge, args.model, args.push or str(output))
    print(output)
    if args.push is not None:
        print(push(output, args.push))


def export(run_folder: Path, output: Path, merge: bool, base: str | None, name: str) -> None:
    """Write what a run has trained, and its card, atomically.

    Args:
        run_folder: The run's folder.
        output: A new or empty folder.
        merge: Whether to fold the adapter into its base model.
        base: The base model, where the run does not name it.
        name: Name in the card's code: a folder or hub id.

    Raises:
        UserError: The run is not finished or damaged, there is nothing to merge, or `output` is not
            empty.
    """
    from lora_or_full.generation.predictor import finished_record, weights_folder  # seconds

    record = finished_record(run_folder)
    source = weights_folder(run_folder, record)
    if merge and record.exported == "model":
        raise UserError(f"{run_folder} trained the whole model: there is no adapter to merge.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} holds something already: choose another folder.")
    text = _card(run_folder, name, record, merge)
    made = output.with_name(f"{output.name}.partial")
    try:
        shutil.rmtree(made, ignore_errors=True)
        if merge:
            _save_merged(run_folder, record, base, made)
        else:
            shutil.copytree(source, made, ignore=shutil.ignore_patterns("README.md"))
        store.write_text(made / "README.md", text)
        made.replace(output)
    except OSError as error:
        raise UserError(f"--output={output} can't be written: {error.strerror}.") from None


def check_pushable(run_folder: Path, merge: bool, repo_id: str) -> None:
    """Refuse what could not be pushed, or be used from the hub.

    Args:
        run_folder: The run's folder.
        merge: Whether the adapter will be folded into its base model.
        repo_id: USER/NAME.

    Raises:
        UserError: The name is invalid, the adapter's base model is on this machine only, nobody is
            logged in, or the hub is out of reach.
    """
    from lora_or_full.generation.predictor import finished_record

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if repo_id.count("/") != 1:
        raise UserError("--push takes USER/NAME: letters, digits, '-', '_' and '.'.")
    record = finished_record(run_folder)
    name = record.config.model.name
    if record.exported == "adapter" and not merge and not hub_id(name):
        raise UserError(
            f"An adapter of {name}, which is on this machine only, is of no use on the hub: add "
            "--merge."
        )
    if get_token() is None:
        raise UserError("--push needs a login to the hub: `hf auth login`, or HF_TOKEN.")
    if not reachable():
        why = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise UserError(f"--push: {constants.ENDPOINT} can't be reached{why}. Nothing was done.")


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder to the hub.

    Args:
        folder: The folder.
        repo_id: USER/NAME.

    Returns:
        Its address there.

    Raises:
        UserError: The hub does not accept it.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id, private=True, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload by lora-or-full"
            )
        )
    except Exception as error:  # whatever the hub's client and its HTTP client of the day raise
        raise UserError(
            f"{folder} is written, but was not pushed to {repo_id}: {first_line(error)} "
            f"(`hf auth login` logs in; `hf upload {repo_id} {folder}` tries again.)"
        ) from None


def _card(run_folder: Path, name: str, record: RunRecord, merge: bool) -> str:
    evaluations = [
        read_record(file.parent, EvaluationRecord)
        for file in sorted(run_folder.glob("evaluations/*/results.json"))
    ]
    return card(
        run_folder.resolve().name, name, record, read_answers(run_folder), evaluations, merge
    )


def _save_merged(run_folder: Path, record: RunRecord, base: str | None, folder: Path) -> None:
    from lora_or_full.generation.predictor import base_folder, quiet_transformers
    from lora_or_full.modeling.loading import load_adapter, load_model, load_tokenizer

    quiet_transformers()
    source = run_folder / record.exported
    base_model = base_folder(run_folder, record, base)
    # With the base model's own configuration, not with the dropouts of this run.
    adapted = load_adapter(load_model(base_model, base_model.name, {}), source)
    before = _logits(adapted)
    model: PreTrainedModel = adapted.merge_and_unload()
    if (_logits(model) - before).abs().max() > SAME * before.std():
        raise UserError(
            f"The adapter in {source} can't be merged: the model would answer differently (the "
            "adapter changes weights that are shared with others). Export it without --merge."
        )
    model.save_pretrained(str(folder))
    load_tokenizer(source).save_pretrained(str(folder))


def _logits(model: Any) -> "torch.Tensor":
    """Logits (1, 32, vocabulary) of some token ids."""
    import torch

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=draw)
    with torch.no_grad():
        return model(input_ids=ids).logits.clone()
