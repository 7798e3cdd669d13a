"""Rotary embeddings whose frequencies follow the longest sequence of a pass: here every sequence gets its own.

transformers' `dynamic` (NTK) and `longrope` embeddings look at the largest position of a forward pass, so that a text's
log-probabilities depend on what else is in the batch, and dynamic ones on earlier batches too. A pass of ours has one
regime of frequencies, that of a sequence alone: a batch with several is run once for each, and of every pass the
sequences of its regime are read.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.errors import UserError

_LENGTH: ContextVar[int | None] = ContextVar("sequence_length", default=None)
LONGEST_PROBE = 2**18
"""Positions that the load check looks at, at most."""

log = logging.getLogger(__name__)


def fix_frequencies(base: PreTrainedModel, *, name: str) -> None:
    """Let a model's rotary embeddings follow `sequence_length`, and see that then nothing else moves them.

    Raises:
        UserError: they depend on the other sequences of a pass in a way that is not known.
    """
    bounds = dict(_bounds(base))
    if not bounds:
        _check_others(base, name)
        return
    found: Any = base
    found.frequency_bounds = sorted({bound for own in bounds.values() for bound in own})
    for module in bounds:
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
    _check_others(base, name)
    log.warning(
        "%s: its rotary frequencies change beyond %d tokens; longer sequences are computed in passes of their own, and "
        "what is sampled beyond that length comes from frequencies that change on the way",
        name,
        found.frequency_bounds[0][0],
    )


@contextmanager
def sequence_length(length: int) -> Iterator[None]:
    """Inside, frequencies are those of a sequence of so many tokens, whatever is in the pass."""
    token = _LENGTH.set(length)
    try:
        yield
    finally:
        _LENGTH.reset(token)


def regimes(base: PreTrainedModel, lengths: Int[Tensor, " N"]) -> list[tuple[int, Int[Tensor, " n"]]]:
    """Sequences of one frequency regime each: the length that stands for it, and their numbers.

    Args:
        lengths: of every sequence, in tokens.

    Returns:
        Nothing for a model with fixed frequencies.
    """
    bounds = getattr(base, "frequency_bounds", None)
    if not bounds:
        return []
    groups: dict[tuple[int, ...], list[int]] = {}
    own = lengths.tolist()
    for number, length in enumerate(own):
        groups.setdefault(_regime(length, bounds), []).append(number)
    device = lengths.device
    return [(max(own[n] for n in numbers), torch.tensor(numbers, device=device)) for numbers in groups.values()]


def _regime(length: int, bounds: Sequence[tuple[int, bool]]) -> tuple[int, ...]:
    """Dynamic frequencies are those of each length; longrope has one set on either side of its bound."""
    return tuple(length if dynamic and length > bound else int(length > bound) for bound, dynamic in bounds)


def _bounds(base: PreTrainedModel) -> Iterator[tuple[Any, set[tuple[int, bool]]]]:
    """Every rotary embedding that moves, and beyond which lengths; whether it then does so with each token."""
    for module in base.modules():
        kinds: Any = getattr(module, "rope_type", None)
        per_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        own = {(_bound(module, layer), "dynamic" in kind) for layer, kind in per_layer.items() if _moves(kind)}
        if own:
            yield module, own


def _moves(kind: Any) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def _bound(module: Any, layer: str | None) -> int:
    parameters = module.config.rope_parameters
    parameters = parameters[layer] if layer is not None else parameters
    if parameters["rope_type"] == "longrope":
        return int(parameters["original_max_position_embeddings"])
    return int(module.original_max_seq_len)


def _forward(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The class's own, made to see `sequence_length` as the largest position, after it has forgotten earlier passes.

    Positions beyond are of sequences that are not read in this pass.
    """
    own, length = type(self).forward, _LENGTH.get()
    if length is None:
        return own(self, x, position_ids, *args, **kwargs)
    first = position_ids.new_zeros(*position_ids.shape[:-1], 1)
    own(self, x, first, *args, **kwargs)
    seen = torch.cat([position_ids.clamp(max=length - 1), first + (length - 1)], dim=-1)
    found = own(self, x, seen, *args, **kwargs)
    return tuple(part[..., :-1, :] for part in found) if isinstance(found, tuple) else found[..., :-1, :]


@torch.no_grad()
def _check_others(base: PreTrainedModel, name: str) -> None:
    """A few positions by themselves and beside far ones must be embedded alike."""
    far = min(LONGEST_PROBE, 4 * (getattr(base.config.get_text_config(), "max_position_embeddings", None) or 2**12))
    for module in base.modules():
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        alone = _embedded(module, base.device, [0, 1, 2, 3])
        with sequence_length(4):
            beside = _embedded(module, base.device, [0, 1, 2, 3, far])
            again = _embedded(module, base.device, [0, 1, 2, 3])
        if alone is None or beside is None or again is None:
            continue
        if not all(torch.equal(alone, other[..., :4, :]) for other in (beside, again)):
            raise UserError(
                f"{name} ({base.config.model_type}): its rotary embedding depends on the other sequences of a pass in "
                "a way that is not supported, so that log-probabilities would too; another model is needed"
            )


def _embedded(module: nn.Module, device: torch.device, positions: Sequence[int]) -> Tensor | None:
    """What a rotary embedding makes of positions; None where it is called otherwise than transformers' are."""
    try:
        found = module(torch.zeros(1, 1, 1, device=device), torch.tensor([list(positions)], device=device))
    except Exception:  # whatever a model's own code makes of it
        return None
    found = found[0] if isinstance(found, tuple) else found
    return found if isinstance(found, Tensor) and found.ndim >= 2 and found.shape[-2] == len(positions) else None
