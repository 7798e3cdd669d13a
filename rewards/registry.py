"""The scorers there are, and how a specification becomes one."""

import difflib
import importlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from align.bounds import load_yaml
from align.consent import check_code, say_code
from align.section import Strict
from rewards.config import SCORER, ScorerConfig
from rewards.types import ScorerError

SCORERS: dict[type[Strict], str] = {SCORER.classes[name]: place for name, place in SCORER.table("scorer").items()}
"""Configuration class -> module and name of the scorer."""


def load_scorer(spec: ScorerConfig | dict[str, Any] | str, *, allow_code: bool = False) -> Any:
    """The scorer that a specification describes, with its model loaded.

    Args:
        spec: A configuration; the same as a dict; a YAML file that holds one; YAML text such as
            `{name: length, max: 200}`; or the folder or hub name of a sequence classifier.
        allow_code: consent to a function that a file names although it may be a stranger's; see docs/security.md.

    Returns:
        A `Scorer` on the GPU where there is one; a `ReferenceScorer` where the configuration has an `answer_column`.

    Raises:
        ScorerError: The specification has an unknown or ill-typed key or is no YAML, or its model cannot be loaded.

    Source: ours
    """
    try:
        config: ScorerConfig = TypeAdapter(ScorerConfig).validate_python(read_tree(spec))
    except ValidationError as error:
        raise ScorerError(f"reward specification {spec!r}: {faults(error)}") from None
    check_function(config, spec, allow_code=allow_code)
    fields = {name: value for name, value in config if name != "name"}
    module, name = SCORERS[type(config)].split(":")
    return getattr(importlib.import_module(f"rewards.{module}"), name)(**fields)


def check_function(config: Any, spec: Any, *, allow_code: bool) -> None:
    """Say which function a specification has imported, and refuse one that a stranger's file names.

    Raises:
        UserError: the file is in a run directory or others may have written it.
    """
    named = {"function": config.function} if getattr(config, "name", None) == "python" else {}
    if _is_file(spec):
        check_code(named, Path(spec), allowed=allow_code)
    elif isinstance(spec, str):
        say_code(named, "the specification")


def read_tree(spec: Any) -> Any:
    """What a specification holds: text that is YAML, or names a YAML file, is read; anything else stays as it is.

    Raises:
        ScorerError: no such file, or no YAML in it.
    """
    inline = isinstance(spec, str) and spec.lstrip().startswith("{")
    if not inline and not _is_file(spec):
        return spec
    try:
        return load_yaml(spec if inline else Path(spec).read_text(encoding="utf-8"))
    except OSError as error:
        raise ScorerError(f"{spec}: cannot read the reward specification ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ScorerError(f"reward specification {spec}: not valid YAML: {' '.join(str(error).split())}") from None


def _is_file(spec: Any) -> bool:
    return isinstance(spec, str) and not spec.lstrip().startswith("{") and spec.endswith((".yaml", ".yml"))


def faults(error: ValidationError) -> str:
    """What is wrong with a specification, by dotted key; the kind of scorer, which pydantic puts in, is left out."""
    kinds = {config.model_fields["name"].default for config in SCORERS}
    places = [".".join(str(part) for part in fault["loc"] if part not in kinds) for fault in error.errors()]
    return "; ".join(
        f"{place}: {_fault(fault)}" if place else _fault(fault)
        for place, fault in zip(places, error.errors(), strict=True)
    )


def _fault(fault: Any) -> str:
    """One of pydantic's errors in words, with the nearest known key or name."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if fault["type"] == "missing":
        return "missing"
    if fault["type"] == "extra_forbidden":
        known = sorted({name for config in SCORERS for name in config.model_fields} | {"transforms", "weight", "part"})
        return f"unknown key{_nearest(str(fault['loc'][-1]), known)}"
    if fault["type"] == "union_tag_invalid":
        tag, names = fault["ctx"]["tag"], fault["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"there is no `{tag}`{_nearest(tag, names) or '; take ' + ', '.join(names)}"
    return f"{fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else ""
