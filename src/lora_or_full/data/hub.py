"""Finds the folder of a model or data set: local, or downloaded from the Hugging Face hub."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from lora_or_full.config.compose import PROJECT
from lora_or_full.errors import UserError, first_line
from lora_or_full.runs import store

TIMEOUT = 5  # seconds until the hub counts as unreachable
WANTED = {
    "model": ["*.json", "*.txt", "*.model"],
    "dataset": ["*.parquet", "*.json", "*.jsonl", "*.csv", "*.tsv", "README.md"],
}
INDEX = "model.safetensors.index.json"  # names the files of a model that has several
LOCAL = {"model": "a local folder", "dataset": "local files in SQuAD's format"}


def folder_of(name: str, repo_type: str, cache_dir: Path) -> Path:
    """Find the folder of a model or data set, and download it if need be.

    A complete download is noted in `cache_dir` and not requested again: the hub's own cache does
    not tell a complete download from an interrupted one.

    Args:
        name: A local folder or a hub id.
        repo_type: 'model' or 'dataset'.
        cache_dir: Folder of the notes.

    Raises:
        UserError: The name is neither, the hub has no such id, or it is unreachable.
    """
    # Not by Path, which raises on names that are too long.
    if os.path.isdir(found := local(name)):
        return Path(found).resolve()
    key = "model.name" if repo_type == "model" else "data.path"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}={name}: there is no such folder.")
    digest = hashlib.sha256(f"{repo_type} {name}".encode()).hexdigest()
    note = cache_dir / "hub" / f"{digest[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        noted = Path(json.loads(note.read_text(encoding="utf-8"))["folder"])
        if noted.is_dir():
            return noted
    try:
        if not reachable():
            return _from_hub_cache(name, repo_type, key)
        folder = _downloaded(name, repo_type, WANTED[repo_type])
        if repo_type == "model":
            folder = _downloaded(name, repo_type, _weights(folder))
    except GatedRepoError:  # before RepositoryNotFoundError, of which it is one
        problem = (
            f" asks for consent: accept its terms on its page at {constants.ENDPOINT}, "
            "then `hf auth login`."
        )
    except (RepositoryNotFoundError, HFValidationError):
        problem = (
            f": neither a local folder nor a {repo_type} on {constants.ENDPOINT} "
            "(or one that needs a login: `hf auth login`)."
        )
    except (HfHubHTTPError, OSError) as error:
        problem = f" could not be fetched from {constants.ENDPOINT}: {first_line(error)}"
    else:
        store.write_json(note, {"name": name, "type": repo_type, "folder": str(folder)})
        return folder
    raise UserError(f"{key}={name}{problem}")


def local(name: str) -> str:
    """Give the path of a local name: ~ is the home folder, ./ this folder or else the project's.

    So the files of the project's own presets (assets/) have the same name on every machine.
    """
    path = os.path.expanduser(name)  # Path's own raises if there is no such home
    own = os.path.join(PROJECT, path)
    return (
        own if path.startswith("./") and not os.path.exists(path) and os.path.exists(own) else path
    )


def reachable() -> bool:
    """Tell whether the hub answers and may be used.

    Without this check the client retries an unreachable hub for half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # whatever the HTTP client of the day raises: it is logged below
        huggingface_hub.logging.get_logger(__name__).info(f"hub out of reach: {error!r}")
        return False
    return True


def _downloaded(name: str, repo_type: str, wanted: list[str]) -> Path:
    subfolders = ["*/*"] if repo_type == "model" else None
    folder = snapshot_download(
        name, repo_type=repo_type, allow_patterns=wanted, ignore_patterns=subfolders
    )
    return Path(folder)


def _weights(folder: Path) -> list[str]:
    """The files of a model's weights: those of its index, since others may hold them once more."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return ["*.safetensors"]


def _from_hub_cache(name: str, repo_type: str, key: str) -> Path:
    try:
        return Path(snapshot_download(name, repo_type=repo_type, local_files_only=True))
    except LocalEntryNotFoundError:
        raise UserError(
            f"{key}={name} is neither a local folder nor in the hub's local cache, and "
            f"{constants.ENDPOINT} can't be reached. Connect, or set {key} to {LOCAL[repo_type]}; "
            "what works without a network: python src/run.py experiment=demo"
        ) from None
