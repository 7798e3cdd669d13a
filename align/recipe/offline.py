"""A hub name that cannot be fetched is said before torch is loaded, not when the model is."""

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from align.errors import UserError
from align.files import is_there


def check_recipe(given: dict[str, Any]) -> None:
    """The models that a command's recipe names.

    Raises:
        UserError: see `check_name`.
    """
    recipe = given["recipe"]
    check_name(recipe.policy.model, "policy.model")
    _check_scorers(recipe)


def check_rewards(given: dict[str, Any]) -> None:
    """The models that a command's `--reward` names; what is wrong with a specification otherwise, the command says.

    Raises:
        UserError: see `check_name`.
    """
    from rewards.combine import Reward, keys_of

    for spec in given.get("rewards") or filter(None, [given.get("reward")]):
        try:
            _check_scorers(Reward.model_validate(keys_of(spec)))
        except ValidationError:
            return


def _check_scorers(section: BaseModel) -> None:
    from rewards.types import Running

    for key, own in _sections(section):
        if isinstance(own, Running) and hasattr(own, "model"):
            check_name(own.model, f"{key}.model")


def check_model(given: dict[str, Any]) -> None:
    """A command's own `model`."""
    check_name(given["model"])


def check_name(model: str, key: str = "") -> None:
    """Whether a model is here, or may be fetched.

    Raises:
        UserError: it is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) and not is_there(Path(model))
    cached = Path(constants.HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    if constants.HF_HUB_OFFLINE and is_name and not is_there(cached):
        raise UserError(
            f"{key and f'{key}: '}{model} is neither a folder here nor in the hub's cache, and HF_HUB_OFFLINE is set, "
            "so that it cannot be fetched; give a folder, or unset HF_HUB_OFFLINE"
        )


def _sections(section: BaseModel, path: str = "") -> list[tuple[str, BaseModel]]:
    """A section with all below it, by dotted key."""
    found = [(path, section)]
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            found += _sections(value, f"{path}.{key}".lstrip("."))
    return found
