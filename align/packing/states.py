"""Layers with a state over packed rows: recurrent ones and short convolutions, which read a row from left to right.

No mask reaches them. Of the kinds that `forks` knows everything is computed once: what they carry is forked where
sequences part. Of others the forward is made to run over every sequence of the row as a row of its own, however they
work inside: what sequences share is computed for each of them in these layers, and once in all others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree
from transformers.modeling_layers import GradientCheckpointingLayer

from align.packing.attention import Tree
from align.packing.forks import fork, forking, spread

_TREE: ContextVar[Tree | None] = ContextVar("tree", default=None)
"""Of the pass that runs; layers with a state are not told by keyword, since few models hand keywords on to them."""

SHIFTS = (nn.Conv1d, nn.ZeroPad2d)
"""What a module with a state holds: a convolution over its sequence, or RWKV's shift by one token."""
OTHERS = ("LightningAttention", "xLSTMBlock")
"""Endings of the names of modules with a state that hold neither."""


def with_state(decoder: nn.Module) -> list[nn.Module]:
    """A decoder's modules that carry something from token to token otherwise than by attention, the outermost ones."""
    found: dict[str, nn.Module] = {}
    for name, module in decoder.named_modules():
        own = type(module).__name__.endswith(OTHERS) or any(isinstance(child, SHIFTS) for child in module.children())
        if own and not name.startswith(tuple(f"{outer}." for outer in found)):
            found[name] = module
    return [*found.values()]


def take_trees(decoder: nn.Module) -> None:
    """Let modules with a state run by sequence inside `telling`; outside nothing changes."""
    for module in with_state(decoder):
        module.forward = MethodType(_forked if fork(module) else _by_sequence, module)  # type: ignore[method-assign]


def leave_trees(decoder: nn.Module) -> None:
    """Undo take_trees."""
    for module in with_state(decoder):
        vars(module).pop("forward", None)


@contextmanager
def telling(decoder: nn.Module, tree: Tree | None) -> Iterator[None]:
    """Inside, a decoder's modules with a state know how the row is built, and so they do when they compute it again."""
    for layer in decoder.modules() if tree is not None else ():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            again: Any = layer
            if not isinstance(again._gradient_checkpointing_func, _Checkpoint):
                again._gradient_checkpointing_func = _Checkpoint(again._gradient_checkpointing_func)
    token = _TREE.set(tree)
    try:
        yield
    finally:
        _TREE.reset(token)


class _Checkpoint(NamedTuple):
    """A layer's checkpointing function; what it runs in the backward pass has the tree of the forward pass."""

    function: Any

    def __call__(self, layer: Any, *args: Any) -> Any:
        tree = _TREE.get()

        def told(*given: Any) -> Any:
            token = _TREE.set(tree)
            try:
                return layer(*given)
            finally:
                _TREE.reset(token)

        return self.function(told, *args)


def _forked(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's own forward, whose functions over time know the tree."""
    own, tree = type(self).forward, _TREE.get()
    if tree is None:
        return own(self, *args, **kwargs)
    with forking(tree):
        return own(self, *args, **_noted(self, tree, kwargs))


def _by_sequence(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's own forward on every sequence by itself; of what several begin with, the first one's result."""
    own, tree = type(self).forward, _TREE.get()
    if tree is None:
        return own(self, *args, **kwargs)
    kwargs = _noted(self, tree, kwargs)
    tokens = sum(branch.size for branch in tree.branches)

    def alone(x: Any) -> Any:
        return x[0, rows] if isinstance(x, Tensor) and x.shape[:2] == (1, tokens) else x

    def together(x: Any) -> Any:
        return x.flatten(0, 1)[back][None] if isinstance(x, Tensor) and x.shape[:2] == rows.shape else x

    device = next(x.device for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    rows, back = tree.once(spread, device)
    with telling(self, None):
        args, kwargs = _pytree.tree_map(alone, (args, kwargs))
        return _pytree.tree_map(together, own(self, *args, **kwargs))


def _noted(module: nn.Module, tree: Tree, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's keywords without a mask, which hides padding, and there is none that counts."""
    tree.carried.append(module)
    return kwargs | {name: None for name in ("attention_mask",) if name in kwargs}
