"""The recipe's engine in every actor of a cluster: prompts go out in windows, to the completions of one engine."""

import socket
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from align.cluster.connect import Cluster
from align.cluster.pool import Shared
from align.errors import UserError
from align.evaluate.sampling import Sampled
from align.recipe import Recipe
from align.rollout.config import Vllm, VllmServer
from align.rollout.engine import Contexts, Engine, Prompts, Sampling, Weights
from align.rollout.engines import open_engine

WINDOW = 256
"""Prompts at most: enough for an engine that runs many at once, few enough to lose with an actor."""
Drawn = list[tuple[int, list[Sampled]]]


@dataclass(frozen=True)
class Window:
    """Some prompts of a call of `sample`, by their places among all of them."""

    asked: Shared
    """(prompts, sampling, contexts) of the call; what is computed with a prompt moves last digits, so each has all."""
    places: Sequence[int]
    weights: Weights | None


class ClusterEngine:
    """As every engine. Its weights, in the run's folder, are read by all machines under the same path."""

    def __init__(self, recipe: Recipe, folder: Path, cluster: Cluster) -> None:
        """Args:
        folder: where each machine's engine writes what it prints.

        Raises:
            UserError: the recipe's engine is of several machines by itself.
        """
        engine = recipe.rollout.engine
        if isinstance(engine, VllmServer):
            raise UserError(
                "rollout.engine: vllm-server sends prompts to all its `urls` by itself; leave --ray out, or take `vllm`"
            )
        devices = int(engine.options.get("tensor_parallel_size", 1)) if isinstance(engine, Vllm) else 1
        self.cluster, self.weights = cluster, None
        self.pool = cluster.pool(partial(ActorEngine, recipe, folder.resolve()), devices=devices)

    weights: Weights | None

    def sample(
        self, prompts: Prompts, sampling: Sampling, contexts: Contexts | None = None, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """As every engine; the longest prompts go out first, as an engine alone takes them."""
        left = sorted((k for k in range(len(prompts)) if k not in done), key=lambda place: -len(prompts[place]))
        size = min(WINDOW, -(-len(left) // (4 * self.pool.count)) or 1)
        asked = self.pool.share((prompts, sampling, contexts))
        windows = (Window(asked, left[k : k + size], self.weights) for k in range(0, len(left), size))
        for _, drawn in self.pool.map(windows):
            yield from drawn

    def load(self, weights: Weights) -> None:
        """As every engine; an actor loads them with its next window."""
        self.weights = weights

    def rest(self, *, stop: bool) -> None:
        """The actors end, and start again when they are needed."""
        self.close()

    def close(self) -> None:
        """As every engine."""
        self.pool.close()


class ActorEngine:
    """One actor's engine, which is opened here, where its GPU is."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.engine: Engine = open_engine(recipe, folder / f"engine-{socket.gethostname()}")
        self.weights: Weights | None = None

    def __call__(self, window: Window) -> Drawn:
        """The completions of a window's prompts, which are those that one engine gives for all prompts."""
        if window.weights and window.weights != self.weights:
            if not Path(window.weights.folder).is_dir():
                raise UserError(
                    f"--ray: {socket.gethostname()} has no folder {window.weights.folder}, where the policy's weights "
                    "are; put `output` on a disk that all machines of the cluster share"
                )
            self.engine.load(window.weights)
            self.weights = window.weights
        prompts, sampling, contexts = window.asked.get()
        return list(self.engine.sample(prompts, sampling, contexts, _AllBut(window.places)))


class _AllBut:
    """Every place but some."""

    def __init__(self, places: Sequence[int]) -> None:
        self.places = frozenset(places)

    def __contains__(self, place: object) -> bool:
        return place not in self.places
