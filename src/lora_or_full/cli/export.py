"""Export the trained weights of a run, with a model card: lora-or-full export RUN

Writes the adapter or the model into a folder that plain peft and transformers load. --merge folds
the adapter into its base model, which then needs no peft. A whole model gets the dtype of its base
model's file, to which its weights are rounded.
"""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lora_or_full.cli.arguments import add_base_model, existing_folder
from lora_or_full.cli.model_card import card, hub_id
from lora_or_full.data.hub import reachable
from lora_or_full.errors import UserError, first_line
from lora_or_full.runs import store
from lora_or_full.runs.reader import finished_record, weights_folder
from lora_or_full.runs.schema import RunRecord

if TYPE_CHECKING:  # torch takes seconds, which a wrong command line need not wait for
    import torch
    from peft import PeftModel

SAME = 1e-3  # largest difference of a merged model's logits, in their standard deviations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", type=existing_folder, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(RUN/export)")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into its base model")
    add_base_model(parser)
    parser.add_argument(
        "--push", metavar="USER/NAME",
        help="also upload the folder to the hub; a new repository is private",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Export, upload if requested, and print the folder and the address on the hub."""
    output = args.output or args.run / "export"
    if args.push is not None:
        _check_pushable(args.run, args.merge, args.push)
    export(args.run, output, args.merge, args.model, args.push or str(output))
    print(output)
    if args.push is not None:
        print(_push(output, args.push))


def export(folder: Path, output: Path, merge: bool, base: str | None, name: str) -> None:
    """Write the trained weights and the model card, atomically.

    Args:
        folder: The run's folder.
        output: A new or empty folder.
        merge: Whether to fold the adapter into its base model.
        base: Hub id or folder of the base model; None for the one that the run names.
        name: Folder or hub id that the card's code loads.

    Raises:
        UserError: The run is not finished or damaged, has no adapter to merge, or `output` is not
            empty or can't be written.
    """
    record = finished_record(folder)
    source = weights_folder(folder, record)
    if merge and record.exported == "model":
        raise UserError(f"{folder} trained the whole model: there is no adapter to merge.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} holds something already: choose another folder.")
    text = card(folder, name, record, merge)
    partial = output.with_name(f"{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if merge:
            _save_merged(folder, record, base, partial)
        elif record.exported == "model" and record.model.dtype != "float32":
            _save_in_base_dtype(source, record, partial)
        else:
            shutil.copytree(source, partial, ignore=shutil.ignore_patterns("README.md"))
        store.write_text(partial / "README.md", text)
        partial.replace(output)
    except OSError as error:
        raise UserError(f"--output={output} can't be written: {error.strerror}.") from None


def _check_pushable(folder: Path, merge: bool, repo_id: str) -> None:
    """Refuse, before any work, what could not be uploaded or used from the hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if repo_id.count("/") != 1:
        raise UserError("--push takes USER/NAME: letters, digits, '-', '_' and '.'.")
    record = finished_record(folder)
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


def _push(folder: Path, repo_id: str) -> str:
    """Upload a folder to the hub, and give its address there."""
    api, message = HfApi(), "Upload by lora-or-full"
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
    except Exception as error:  # the hub's client and its HTTP client raise many types
        raise UserError(
            f"{folder} is written, but was not pushed to {repo_id}: {first_line(error)} "
            f"(`hf auth login` logs in; `hf upload {repo_id} {folder}` tries again.)"
        ) from None


def _save_merged(folder: Path, record: RunRecord, base: str | None, output: Path) -> None:
    from lora_or_full.generation.predictor import base_folder, quiet_transformers
    from lora_or_full.modeling.loading import load_adapter, load_model, load_tokenizer

    quiet_transformers()
    source = folder / record.exported
    base_model = base_folder(folder, record, base)
    # With the base model's own configuration: the dropouts of this run are not exported.
    loaded = load_model(base_model, base_model.name, {})
    dtype = loaded.dtype
    adapted = load_adapter(loaded.float(), source)
    before = _logits(adapted)
    model = merged(adapted, source)
    if (_logits(model) - before).abs().max() > SAME * before.std():
        raise UserError(
            f"The adapter in {source} can't be merged: the model would answer differently (the "
            "adapter changes weights that are shared with others). Export it without --merge."
        )
    model.to(dtype).save_pretrained(str(output))
    load_tokenizer(source).save_pretrained(str(output))


def merged(adapted: "PeftModel", source: Path) -> Any:
    """Fold the adapter of `source` into its base model.

    Raises:
        UserError: PEFT has no merging for this type of adapter.
    """
    try:
        return adapted.merge_and_unload()
    except (ValueError, NotImplementedError) as error:  # of BEFT and of Lily, for example
        raise UserError(
            f"PEFT can't merge the adapter in {source}: {first_line(error)} Export it without "
            "--merge."
        ) from None


def _save_in_base_dtype(source: Path, record: RunRecord, output: Path) -> None:
    """Save a model that was trained in float32 in the dtype of its base model."""
    import torch

    from lora_or_full.generation.predictor import quiet_transformers
    from lora_or_full.modeling.loading import load_model, load_tokenizer

    quiet_transformers()
    model = load_model(source, source.name, {})
    model.to(getattr(torch, record.model.dtype)).save_pretrained(str(output))
    load_tokenizer(source).save_pretrained(str(output))


def _logits(model: Any) -> "torch.Tensor":
    """Logits (1, 32, vocabulary) of random token ids, always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, 32), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids).logits.clone()
