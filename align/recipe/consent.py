"""Which code a recipe names, and whether the call that reads it consents to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.consent import TRUST, check_code, say_code
from align.errors import UserError
from align.own_code import is_object
from align.rollout.config import PLAIN_OPTIONS, Vllm


def with_consent(
    recipe: Any,
    file: Path,
    given: Sequence[str] = (),
    *,
    trust_remote_code: bool = False,
    allow_code: bool | None = False,
) -> Any:
    """A recipe that may run what this call consents to.

    Args:
        file: where it was read; consent that is written there is none.
        given: keys that were given in the call itself.
        allow_code: None where the functions that it names are not called.

    Raises:
        UserError: it names code that nobody has consented to.
    """
    named = {key: value for key, value in code_of(recipe).items() if not _is_given(key, given)}
    typed = {key: value for key, value in code_of(recipe).items() if key not in named}
    trusted = trust_remote_code or recipe.policy.trust_remote_code and _is_given("policy.trust_remote_code", given)
    if recipe.policy.trust_remote_code and not trusted:
        raise UserError(
            f"{file}: policy.trust_remote_code asks to run the code that {recipe.policy.model} comes with, and a file "
            f"is no consent; read that code, then give {TRUST}, or set the key to false"
        )
    if "/" in (recipe.policy.attention or "") and not trusted:
        raise UserError(
            f"policy.attention: {recipe.policy.attention} is compiled code of the hub; give {TRUST} if it may run, or "
            "an implementation such as sdpa"
        )
    if allow_code is not None:
        check_code(named, file, allowed=allow_code)
        say_code(typed, "the command line")
    return recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"trust_remote_code": trusted})})


def code_of(section: Any, path: str = "") -> dict[str, str]:
    """What a recipe names that will be imported: dotted key -> its value."""
    if isinstance(section, tuple | list):
        places = [path] if len(section) == 1 else [f"{path}.{k}" for k in range(len(section))]
        return {k: v for place, one in zip(places, section, strict=True) for k, v in code_of(one, place).items()}
    if isinstance(section, Vllm):  # an argument that is no number may name a class, a plugin or a file to load
        spoken = {k: v for k, v in section.options.items() if not isinstance(v, bool | int | float | None)}
        return {f"{path}.options.{name}": f"{value}" for name, value in spoken.items() if name not in PLAIN_OPTIONS}
    if not isinstance(section, BaseModel):
        return {}
    found = {}
    if getattr(section, "name", None) == "python" and not is_object(str(getattr(section, "function", ""))):
        found[f"{path}.function"] = str(getattr(section, "function", ""))
    found |= {f"{path}.callbacks.{k}": place for k, place in enumerate(getattr(section, "callbacks", ()))}
    for name in type(section).model_fields:
        found |= code_of(getattr(section, name), f"{path}.{name}".lstrip("."))
    return found


def _is_given(key: str, given: Sequence[str]) -> bool:
    """Whether a key, or one above it, is among those that were given; places in lists aside."""
    wanted, *above = ([part for part in own.split(".") if not part.isdecimal()] for own in (key, *given))
    return any(wanted[: len(own)] == own for own in above)
