"""What a scorer is: the protocol, the words for its inputs, and the base of its configuration."""

from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict

Messages = list[dict[str, str]]
"""A conversation: `{"role": ..., "content": ...}` each."""
Text = str | Messages
"""A prompt or a completion, as plain text or as messages."""


class Strict(BaseModel):
    """Base of every scorer's configuration: frozen, refuses unknown keys, attribute docstrings describe the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ScorerError(ValueError):
    """A scorer cannot be made or used as asked; the message names what is wrong and how to mend it."""


class Scorer(Protocol):
    """Gives completions a reward. Not to be subclassed: a class with this method is a scorer."""

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """One reward per completion, larger is better, in the scorer's own unit.

        Args:
            prompts: The prompt of each completion; a prompt is repeated for each of its completions.
            completions: As many as prompts, in any order.

        Returns:
            Rewards in the order of the completions; a reward depends on its own prompt and completion alone.
        """
        ...
