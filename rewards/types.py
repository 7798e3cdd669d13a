"""What a scorer is: the protocol, the words for its inputs, and the base of its configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypedDict

from pydantic import PositiveInt

from align.registry import Registry
from align.section import Free, Strict

SCORER: Registry[Strict] = Registry("scorer")
"""Every class names its `scorer`: module and name, which takes the fields as keywords. Most need torch, so a scorer is
imported when it is used."""

Messages = list[dict[str, Any]]
"""A conversation: `{"role": ..., "content": ...}` each, with the keys of calls and reasoning in `docs/rows.md`."""


class Asked(Messages):
    """A prompt's messages, with what else a chat template is given for them: `tools`, and options by name."""

    def __init__(self, messages: Messages, given: Mapping[str, Any]) -> None:
        super().__init__(messages)
        self.given = dict(given)

    @staticmethod
    def of(prompt: "Text", given: Mapping[str, Any]) -> "Text":
        """A prompt with what it gives; as it is where that is nothing, or where it is text."""
        return Asked(prompt, given) if given and not isinstance(prompt, str) else prompt


Text = str | Messages
"""A prompt or a completion, as plain text or as messages; a completion is one message of the assistant's or several."""
Dtype = Literal["float32", "bfloat16", "float16"]


class Running(Strict):
    """How a scorer's model is run; the base of every configuration that has one."""

    dtype: Dtype = "float32"
    """What the weights are held in and the model is run in; only float32 gives the same reward in every batch."""
    max_length: PositiveInt | None = None
    """Tokens read at most, by default the model's context; a longer text loses its beginning, save the first token."""
    tokens_per_batch: Annotated[PositiveInt, Free()] = 8192
    """Tokens of one forward pass at most, padding included; changes speed and memory, not the rewards."""
    exact: bool = False
    """One text per forward pass: a reward is then the same to the last bit in any batch and order, and slower."""
    device: str | None = None
    """Torch device; by default a GPU where there is one."""


class RunningOptions(TypedDict):
    """The fields of `Running` as keywords."""

    dtype: Dtype
    max_length: int | None
    tokens_per_batch: int
    exact: bool
    device: str | None


class AskingOptions(TypedDict):
    """What a judge is asked, as keywords: the fields of `rewards.config.Asking`."""

    mode: str
    question: str | None
    verdicts: tuple[str, ...] | None
    log_odds: bool
    reasoning: int
    checklists: str | None
    checks: int
    anchors: str | None


class ScorerError(ValueError):
    """A scorer cannot be made or used as asked; the message names what is wrong and how to mend it."""


class RowError(ScorerError):
    """One prompt and completion cannot be scored; others of the same call could be."""


@dataclass
class Tally:
    """What a scorer has done so far."""

    completions: int = 0
    tokens: int = 0
    """Tokens read by its model, a shared prompt counted for each of its completions; 0 where there is no model."""
    truncated: int = 0
    """Texts cut to the model's length."""

    def read(self, whole: Sequence[list[int]], kept: Sequence[list[int]]) -> int:
        """Count the token ids that a model reads of some texts; returns how many of them are cut."""
        cut = sum(len(own) > len(ids) for own, ids in zip(whole, kept, strict=True))
        self.tokens += sum(map(len, kept))
        self.truncated += cut
        return cut


class Scorer(Protocol):
    """Gives completions a reward. Not to be subclassed: a class with these members is a scorer."""

    tally: Tally

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """One reward per completion, larger is better, in the scorer's own unit.

        Args:
            prompts: The prompt of each completion; a prompt is repeated for each of its completions. Messages with
                tools or with options of a chat template are `Asked`.
            completions: As many as prompts, in any order.

        Returns:
            Rewards in the order of the completions; a reward depends on its own prompt and completion alone.

        Raises:
            RowError: A text cannot be scored.
        """
        ...


class ReferenceScorer(Protocol):
    """A scorer that compares with a reference answer; its configuration has an `answer_column`."""

    tally: Tally

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], answers: Sequence[Any]) -> list[float]:
        """As Scorer.score, with the reference answer of each completion's prompt."""
        ...
