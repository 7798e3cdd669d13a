"""Functions over time in layers with a state, on packed rows: what they carry is forked where sequences part.

transformers' modules call them by these names, and everything else in them takes each token by itself, so that it runs
over a packed row as it is. Inside `forking` the functions below run in their places; outside nothing changes.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from align.packing.attention import Tree
from align.packing.trie import leaves
from align.types import Branches

_TREE: ContextVar[Tree | None] = ContextVar("forking", default=None)
CHUNK = 64
"""Tokens that the delta rule takes at once."""


@contextmanager
def forking(tree: Tree) -> Iterator[None]:
    """Inside, the functions that `fork` has reached run over this tree's row."""
    token = _TREE.set(tree)
    try:
        yield
    finally:
        _TREE.reset(token)


def fork(module: nn.Module) -> bool:
    """Let the functions over time of a module know trees, if they are all known; whether they are."""
    kinds = [own for ending, own in KINDS.items() if type(module).__name__.endswith(ending)]
    code = inspect.unwrap(type(module).forward).__code__
    if not kinds or not set(kinds[0]) <= set(code.co_names):
        return False
    home = vars(sys.modules[type(module).__module__])
    for name, form in FORMS.items():
        if name in code.co_names and not hasattr(home[name], "knows_trees"):
            home[name] = _knowing(home[name], form)
    return True


def _knowing(own: Callable[..., Any], form: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def either(*args: Any, **kwargs: Any) -> Any:
        tree = _TREE.get()
        return own(*args, **kwargs) if tree is None else form(own, tree, *args, **kwargs)

    either.knows_trees = True  # type: ignore[attr-defined]
    return either


class Spread(NamedTuple):
    """A row as a batch of its sequences."""

    rows: Int[Tensor, "N L"]
    """Where their tokens stand in the row, padded on the right."""
    back: Int[Tensor, " T"]
    """Of every token of the row, where it stands in the batch, flat; of one in several sequences, in the first."""


def spread(branches: Branches, device: torch.device) -> Spread:
    """The sequences from a tree's beginning to a leaf."""
    own = leaves(branches)
    rows = nn.utils.rnn.pad_sequence(own, batch_first=True)
    back = torch.empty(sum(branch.size for branch in branches), dtype=torch.long)
    for number in reversed(range(len(own))):
        back[own[number]] = torch.arange(len(own[number])) + number * rows.shape[1]
    return Spread(rows.to(device), back.to(device))


class Level(NamedTuple):
    """Branches as far from the beginnings of their trees, counted in branches."""

    rows: Int[Tensor, "n L"]
    """Where their tokens stand in the row; one beyond its end is padding, on the right."""
    parents: Int[Tensor, " n"]
    """Places in the level before of those that they go on from."""


class Levels(NamedTuple):
    """A row, level by level."""

    levels: list[Level]
    back: Int[Tensor, " T"]
    """Of every token of the row, where it stands in all levels, flat and behind one another."""


def by_level(branches: Branches, device: torch.device) -> Levels:
    """All branches of each level at once."""
    depths: list[int] = []
    for _, parent in branches:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    tokens = sum(branch.size for branch in branches)
    own = torch.arange(tokens).split([branch.size for branch in branches])
    back, levels, before, places = torch.empty(tokens, dtype=torch.long), [], 0, dict[int, int]()
    for depth in range(max(depths) + 1):
        members = [number for number, found in enumerate(depths) if found == depth]
        rows = nn.utils.rnn.pad_sequence([own[n] for n in members], batch_first=True, padding_value=tokens)
        for place, number in enumerate(members):
            back[own[number]] = torch.arange(len(own[number])) + (before + place * rows.shape[1])
        parents = torch.tensor([places.get(branches[number].parent, 0) for number in members])
        levels.append(Level(rows.to(device), parents.to(device)))
        places = {number: place for place, number in enumerate(members)}
        before += rows.numel()
    return Levels(levels, back.to(device))


class Window(NamedTuple):
    """A row in which every branch that does not stand behind what it goes on from has a copy of its last tokens."""

    rows: Int[Tensor, " E"]
    """Where they stand in the row; one beyond its end where nothing comes before."""
    kept: Int[Tensor, " T"]
    """Where in that row the tokens themselves stand."""


def window(branches: Branches, before: int, device: torch.device) -> Window:
    """A row whose tokens all have their `before` last ones before them."""
    tokens = sum(branch.size for branch in branches)
    ends: list[Tensor] = []
    rows, kept, start, length = list[Tensor](), list[Tensor](), 0, 0
    for number, (size, parent) in enumerate(branches):
        path = ends[parent] if parent >= 0 else torch.full((before,), tokens)
        own = torch.arange(start, start + size)
        if parent < 0 or parent != number - 1:
            rows.append(path)
            length += before
        rows.append(own)
        kept.append(torch.arange(length, length + size))
        ends.append(torch.cat([path, own])[size:])
        start, length = start + size, length + size
    return Window(torch.cat(rows).to(device), torch.cat(kept).to(device))


def convolution(
    own: Callable[..., Tensor],
    tree: Tree,
    /,
    hidden_states: Float[Tensor, "1 D T"],
    weight: Tensor,
    *args: Any,
    **given: Any,
) -> Float[Tensor, "1 D T"]:
    found = tree.once(window, weight.shape[-1] - 1, hidden_states.device)
    row = F.pad(hidden_states, (0, 1)).index_select(-1, found.rows)
    return own(row, weight, *args, **given).index_select(-1, found.kept)


def _delta_rule(
    own: Callable[..., Any],
    tree: Tree,
    /,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    **given: Any,
) -> tuple[Tensor, None]:
    given |= {"output_final_state": True}
    chunk_size = given.pop("chunk_size", CHUNK)

    def call(state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor) -> Any:
        chunk = min(chunk_size, q.shape[1])  # values are the same, and torch's own form pads to it
        return own(q, k, v, g=decay, beta=rate, **given | {"initial_state": state, "chunk_size": chunk})

    return along(tree, call, {"q": query, "k": key, "v": value, "decay": g, "rate": beta}), None


def _chunk_scan(
    own: Callable[..., Any], tree: Tree, /, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **given: Any
) -> Tensor:
    """With time steps made here, of which 0 leaves a state as it is, whatever bounds those of tokens have."""
    dt = F.softplus(dt.float() + given["dt_bias"].float()).clamp(*given["dt_limit"])
    steps = {"dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, torch.inf), "return_final_states": True}

    def call(state: Tensor | None, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Any:
        chunk = min(given["chunk_size"], x.shape[1])
        return own(x, dt, A, b, c, **given | steps | {"initial_states": state, "chunk_size": chunk})

    return along(tree, call, {"x": x, "dt": dt, "b": B, "c": C})


def along(
    tree: Tree, call: Callable[..., Any], tensors: dict[str, Tensor], **padding: float
) -> Float[Tensor, "1 T ..."]:
    """A function over time with a state, called once for each level from its parents' last states on.

    Args:
        call: of a state and tensors [n, L, ...] -> (what becomes of each token, the last state).
        tensors: [1, T, ...] by its names.
        padding: of which value, where it is not 0.
    """
    found = tree.once(by_level, next(iter(tensors.values())).device)
    beyond = {n: torch.cat([x[0], x.new_full((1, *x.shape[2:]), padding.get(n, 0.0))]) for n, x in tensors.items()}
    outputs, state = list[Tensor](), None
    for level in found.levels:
        start: Tensor | None = None if state is None else state.index_select(0, level.parents)
        values = {n: x.index_select(0, level.rows.flatten()).unflatten(0, level.rows.shape) for n, x in beyond.items()}
        output, state = call(start, **values)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, found.back)[None]


def _selective_scan(
    own: Callable[..., Tensor],
    tree: Tree,
    /,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    **given: Any,
) -> Float[Tensor, "1 D T"]:
    """By sequence, since these functions take no state to begin with, and CUDA's gives no gradient of its last one."""
    found = tree.once(spread, x.device)

    def alone(x: Float[Tensor, "1 D T"]) -> Float[Tensor, "N D L"]:
        return x[0].index_select(-1, found.rows.flatten()).unflatten(-1, found.rows.shape).transpose(0, 1)

    x, dt, B, C, z = (alone(part) for part in (x, dt, B, C, z))
    output = own(x, dt, A, B, C, z=z, **given)
    return output.transpose(0, 1).flatten(1).index_select(-1, found.back)[None]


def _absent(own: Callable[..., Any], tree: Tree, /, *args: Any, **given: Any) -> None:
    """A kernel for a whole layer, as it is where there is none."""


FORMS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba_selective_scan": _selective_scan,
    "mamba_inner_fn": _absent,
    "mamba2_split_conv1d_scan_combined": _absent,
}
"""What runs in the place of a function, which it gets as its first argument."""
_SHORT, _DELTA, _SCAN, _FIRST_SCAN = (
    ("causal_conv1d_fn", *others)
    for others in ((), ("torch_chunk_gated_delta_rule",), ("mamba2_chunk_scan",), ("mamba_selective_scan",))
)
KINDS: dict[str, tuple[str, ...]] = {
    "ShortConv": _SHORT,
    "GatedDeltaNet": _DELTA,
    "KimiLinearDeltaAttention": ("causal_conv1d_fn", "chunk_kimi_delta_attention"),
    "Mamba2Mixer": _SCAN,
    "Zamba2MambaMixer": _SCAN,
    "MambaMixer": _FIRST_SCAN,
    "BambaMixer": _SCAN,
    "FalconH1Mixer": _SCAN,
    "MambaLayer": _SCAN,
}
"""How the names of modules end whose functions over time are known -> all of these functions, by name."""
