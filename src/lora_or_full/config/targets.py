"""What the configuration names by `_target_`, built Hydra's way."""

import inspect
from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate

from lora_or_full.errors import UserError

INSTALL = (
    "A package has to be installed (pip install -c constraints.txt -e '.[wandb]' or '.[mlflow]'); "
    "for a file of yours put PYTHONPATH=<its folder> before the command."
)


def build(key: str, settings: Mapping[str, Any], kind: type | None, **given: Any) -> Any:
    """Build what `_target_` names. This runs code that the configuration chooses.

    Args:
        key: Key of the settings, for messages.
        settings: `_target_` and its arguments.
        kind: Class that it has to be a subclass of; None for any function or class that takes the
            first of the arguments that are `given`.
        given: Arguments that are passed if it takes them and `settings` do not have them.

    Raises:
        UserError: There is no such name, it is of another kind, or it refuses its arguments.
    """
    name = settings["_target_"]
    try:
        found = instantiate({"_target_": name}, _partial_=True).func
        if kind is not None and not (inspect.isclass(found) and issubclass(found, kind)):
            raise UserError(f"{key}._target_={name}: must be a kind of {kind.__name__}.")
        accepted = inspect.signature(found).parameters
        if kind is None and next(iter(given)) not in accepted:
            raise UserError(f"{key}._target_={name}: must take {next(iter(given))}.")
        any_word = any(one.kind is one.VAR_KEYWORD for one in accepted.values())
        unknown = [word for word in settings if word not in accepted and not word.startswith("_")]
        if unknown and not any_word:
            leave_out = " ".join(f"'~{key}.{word}'" for word in unknown)
            raise UserError(
                f"{key}: {name} has no argument {', '.join(unknown)} (it has "
                f"{', '.join(accepted)}). To leave it out: {leave_out}"
            )
        more = {w: value for w, value in given.items() if w in accepted and w not in settings}
        return instantiate(settings, _partial_=True, _convert_="all")(**more)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor raises
        reason = error.__cause__ or error
        words = " ".join(str(reason).split()) or type(reason).__name__
        if isinstance(reason, ImportError):  # its own advice may bring another version
            words = f"{words.partition(' HINT:')[0].rstrip('.')}. {INSTALL}"
        raise UserError(f"{key}: {name} can't be built: {words}") from None
