"""What every engine does: sample completions of token ids, and take a newer policy's weights."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from align.evaluate.sampling import Sampled

Prompts = Sequence[list[int]]
Contexts = Sequence[Any]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    completions: int
    """Of each prompt."""
    max_tokens: int
    """Of a completion at most, the token that ends it included."""
    seed: int
    """With a prompt's tokens it decides all of the prompt's completions."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only this many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that reach this probability together."""
    min_p: float = 0.0
    """Only tokens at least this likely relative to the likeliest; 0 for all."""
    adaptive_temperature: bool = False
    """Divides by less where the policy is uncertain; of TransformersEngine alone."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion, the policy's own end tokens among them."""


@dataclass(frozen=True)
class Weights:
    """A policy on disk, for an engine to load."""

    kind: Literal["adapter", "merged"]
    """A PEFT adapter for the engine's base model, or a whole model."""
    folder: str
    """Never written again once it is there: engines cache by path."""
    version: int
    """Optimizer steps that made the policy."""
    name: str
    """As unique as the folder."""
    against: str | None = None
    """An adapter that a contrast holds the policy against; its name is unique too."""


class Engine(Protocol):
    """Samples from one policy at a time. Not to be subclassed: a class with these methods is an engine."""

    def sample(
        self, prompts: Prompts, sampling: Sampling, contexts: Contexts | None = None, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """Completions of each prompt, as prompts finish.

        Args:
            prompts: token ids, start token included; no two alike.
            sampling: for all of them.
            contexts: what the engine's decoding needs to know of each prompt; None to sample without it.
            done: indices of prompts that are not wanted; the others' completions are the same with and without them.

        Returns:
            (index of the prompt, its completions in the order of their seeds). Equal arguments give equal completions
            on the same machine and versions, whatever the order and number of the prompts.
        """
        ...

    def load(self, weights: Weights) -> None:
        """Sample from this policy from now on; nothing computed with the old weights is used again."""
        ...

    def rest(self, *, stop: bool) -> None:
        """Give memory back until the next `sample` or `load`, which wakes the engine; `stop`: all of it."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
