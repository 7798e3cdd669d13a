"""The scorers there are, and how a specification becomes one."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from rewards import rules
from rewards.density_ratio import DensityRatio, DensityRatioScorer
from rewards.implicit import Implicit, ImplicitScorer
from rewards.judge import Judge, JudgeScorer
from rewards.relevance import Relevance, RelevanceScorer
from rewards.sequence_classifier import SequenceClassifier, SequenceClassifierScorer
from rewards.served import Served, ServedScorer
from rewards.types import ScorerError, Strict

SCORERS: dict[type[Strict], Callable[..., Any]] = {
    SequenceClassifier: SequenceClassifierScorer,
    Implicit: ImplicitScorer,
    DensityRatio: DensityRatioScorer,
    Judge: JudgeScorer,
    Relevance: RelevanceScorer,
    Served: ServedScorer,
    rules.Length: rules.length_scorer,
    rules.Format: rules.format_scorer,
    rules.Pattern: rules.pattern_scorer,
    rules.Answer: rules.answer_scorer,
    rules.Function: rules.function_scorer,
}
"""Configuration class -> scorer, which takes the configuration's fields as keywords."""


def _named(value: Any) -> Any:
    """A string names a sequence classifier, and so does a mapping without a name."""
    value = {"model": value} if isinstance(value, str) else value
    return {"name": "sequence_classifier", **value} if isinstance(value, dict) else value


ScorerConfig = Annotated[
    SequenceClassifier
    | Implicit
    | DensityRatio
    | Judge
    | Relevance
    | Served
    | rules.Length
    | rules.Format
    | rules.Pattern
    | rules.Answer
    | rules.Function,
    Field(discriminator="name"),
    BeforeValidator(_named),
]
"""Any scorer's configuration, for use as a pydantic field; a string names a sequence classifier's folder."""


def load_scorer(spec: ScorerConfig | dict[str, Any] | str) -> Any:
    """The scorer that a specification describes, with its model loaded.

    Args:
        spec: A configuration; the same as a dict; a YAML file that holds one; YAML text such as
            `{name: length, max: 200}`; or the folder or hub name of a sequence classifier.

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
    fields = {name: value for name, value in config if name != "name"}
    return SCORERS[type(config)](**fields)


def read_tree(spec: Any) -> Any:
    """What a specification holds: text that is YAML, or names a YAML file, is read; anything else stays as it is.

    Raises:
        ScorerError: no such file, or no YAML in it.
    """
    inline = isinstance(spec, str) and spec.lstrip().startswith("{")
    if not inline and not (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        return spec
    try:
        return yaml.safe_load(spec if inline else Path(spec).read_text(encoding="utf-8"))
    except OSError as error:
        raise ScorerError(f"{spec}: cannot read the reward specification ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ScorerError(f"reward specification {spec}: not valid YAML: {' '.join(str(error).split())}") from None


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
