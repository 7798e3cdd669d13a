"""Reward models: `load_scorer(spec).score(prompts, completions)`; usable without the trainer."""

from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from rewards.sequence_classifier import SequenceClassifier, SequenceClassifierScorer
from rewards.types import Scorer, ScorerError

SCORERS = {SequenceClassifier: SequenceClassifierScorer}
"""Configuration class -> scorer, which takes the configuration's fields as keywords."""


def _from_path(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


ScorerConfig = Annotated[SequenceClassifier, BeforeValidator(_from_path)]
"""Any scorer's configuration, for use as a pydantic field; a string names a sequence classifier's folder."""


def load_scorer(spec: ScorerConfig | dict[str, Any] | str) -> Scorer:
    """The scorer that a specification describes, with its model loaded.

    Args:
        spec: A configuration, the same as a dict, or the folder or hub name of a sequence classifier.

    Returns:
        A scorer on the GPU where there is one.

    Raises:
        ScorerError: The specification has an unknown or ill-typed key, or its model cannot be loaded or used.

    Source: ours
    """
    try:
        config = TypeAdapter(ScorerConfig).validate_python(spec)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ScorerError(f"reward specification {spec!r}: {faults}") from None
    fields = {name: value for name, value in config if name != "name"}
    return SCORERS[type(config)](**fields)


__all__ = ["SCORERS", "Scorer", "ScorerConfig", "ScorerError", "load_scorer"]
