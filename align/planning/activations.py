"""What a pass of the whole model needs, from passes of its first layers: layers of a kind need alike."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import PretrainedConfig

from align.packing.batch import Example
from align.planning.empty import Unplanned, empty_model, period
from align.planning.trace import Pass, trace
from align.recipe import Recipe


class Activations(NamedTuple):
    """Of the largest pass."""

    kept: int
    """Bytes that live between the forward and the backward pass."""
    more: int
    """Bytes that are made on the way, beyond `kept`."""
    forward: int
    """Floating-point operations of the layers' products of the forward pass."""
    flops: int
    """Likewise of both ways, with what is computed again."""
    tokens: int
    checkpointed: int
    """Layers that compute again."""
    layers: int


class Measure:
    """Passes over some lists, by how many layers compute again."""

    def __init__(
        self, recipe: Recipe, config: PretrainedConfig, lists: Sequence[Example], *, steps: int, again: bool
    ) -> None:
        """Args:
        lists: of the largest pass.
        steps: of the run.
        again: a step has several passes.
        """
        self.recipe, self.config, self.lists, self.steps = recipe, config, lists, steps
        self.options: dict[str, Any] = {
            "packed": recipe.train.packing,
            "precision": getattr(torch, recipe.train.precision),
            "again": again,
            "reward": recipe.task == "reward",
        }
        self.layers = int(config.get_text_config().num_hidden_layers)
        self.period = period(config)

    def passes(self, checkpointed: int) -> Activations:
        """What a pass needs with so many layers that compute again, at most all but the last."""
        few = self.period + 1
        more = few + self.period
        if more >= self.layers:
            found = self._traced(self.layers, checkpointed)
            return Activations(
                found.kept, found.peak - found.kept, found.forward, found.flops, found.tokens, checkpointed, self.layers
            )
        plain = self._grown(self._traced(few, 0), self._traced(more, 0), self.layers - few)
        if not checkpointed:
            return Activations(
                plain.kept, plain.peak - plain.kept, plain.forward, plain.flops, plain.tokens, 0, self.layers
            )
        own = self._traced(few, few - 1), self._traced(more, more - 1)
        whole = self._grown(*own, self.layers - few)
        share = checkpointed / (self.layers - 1)
        kept = round(share * whole.kept + (1 - share) * plain.kept)
        # By the time that the layers compute again, those above them, which do not, have given back what they kept.
        peak = max(round(share * whole.kept) + own[1].peak - own[1].kept, kept + plain.peak - plain.kept)
        flops = round(share * whole.flops + (1 - share) * plain.flops)
        return Activations(kept, peak - kept, whole.forward, flops, whole.tokens, checkpointed, self.layers)

    def _traced(self, layers: int, checkpointed: int) -> Pass:
        whole = None if layers == self.layers else layers
        model = empty_model(self.recipe, self.config, total_steps=self.steps, layers=whole)
        try:
            return trace(model, self.lists, checkpointed=checkpointed, **self.options)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            adapter = self.recipe.policy.adapter
            name = getattr(adapter, "type", adapter.name)
            raise Unplanned(f"policy.adapter: no plan can be made of {name}, whose pass looks at values") from error

    def _grown(self, few: Pass, more: Pass, layers: int) -> Pass:
        """A pass with so many more layers than `few` has."""
        times = layers / self.period
        grown = [round(a + (b - a) * times) for a, b in zip(few, more, strict=True)]
        return Pass(*grown)._replace(tokens=few.tokens)
