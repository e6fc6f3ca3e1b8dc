"""Hydra composes the files of conf/ and the words of a command line into one configuration."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_or_full.config.schema import Config, as_now, validate
from lora_or_full.errors import UserError, first_line

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parents[1]
# A wheel has the files of conf/ inside the package.
CONF = next(path for path in (PACKAGE / "conf", PROJECT / "conf") if path.is_dir())

SEARCHPATH, FILE = "hydra.searchpath", "file://"


def compose(words: Sequence[str] = ()) -> dict[str, Any]:
    """Compose overrides, as they are typed, to nested values with every reference resolved.

    Raises:
        UserError: Hydra can't compose them.
    """
    try:
        return to_dict(_composed(words))
    # ValueError of mode=null, AssertionError of +=1
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise UserError(str(error)) from None


def defaults() -> Config:
    """The configuration of `python src/run.py` without any override."""
    return validate(compose())


def saved(folder: Path) -> Config:
    """Read the configuration of the run in `folder`.

    Raises:
        UserError: config.yaml can't be read or is not as a run writes it.
    """
    file = folder / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no configuration.")
    try:
        return validate(as_now({str(key): value for key, value in content.items()}))
    except (UserError, ValueError) as error:  # ValueError: a number of too many digits
        raise UserError(f"{file} is not as a run writes it: {error}") from None


def to_dict(config: DictConfig) -> dict[str, Any]:
    """Plain nested values with every reference resolved."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def hydra_path(words: Sequence[str], key: str) -> Path:
    """The folder that one of Hydra's own keys names."""
    try:
        config = _composed(words, return_hydra_config=True)
        return Path(OmegaConf.select(config, key, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {first_line(error)}.") from None


def path_override(key: str, path: Path) -> str:
    """A path on Hydra's command line, whatever characters it has."""
    text = re.sub(r"(\\*)('|$)", r"\1\1\2", str(path)).replace("'", "\\'")
    return f"{key}='{text}'"


def search(folder: str) -> str:
    """Hydra's override that looks for presets in a folder of the user's too."""
    key, text = path_override(SEARCHPATH, Path(folder).absolute()).split("=", 1)
    return f"{key}=[{text[0]}{FILE}{text[1:]}]"


def presets(group: str, words: Sequence[str] = ()) -> dict[str, Path]:
    """The presets of a group by name, those in folders that `words` have by `search` among them."""
    folders = [CONF]
    for word in words:
        if word.startswith(f"{SEARCHPATH}="):
            found = OverridesParser.create().parse_override(word).value()
            named = found if isinstance(found, list) else []  # Hydra refuses anything else
            folders += [Path(str(one).removeprefix(FILE)) for one in named]
    files = (file for top in reversed(folders) for file in (top / group).glob("*.yaml"))
    return dict(sorted((file.stem, file) for file in files))


def _composed(words: Sequence[str], **wanted: bool) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", list(words), **wanted)
