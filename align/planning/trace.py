"""One training pass of a model without weights: what it keeps, what it needs at most, and how many products it takes.

The pass runs the code that training runs, on fake tensors, which have shapes and no memory.
"""

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils

from align.fused import asked_rows
from align.kernels import linear_logprobs
from align.model.checkpointing import checkpoint_layers
from align.model.classifier import reads_last_token
from align.model.forward import base_model, head_of
from align.model.fusing import fused_methods
from align.packing import Tree, packed_collate
from align.packing.batch import Example, collate
from align.packing.states import telling
from align.types import ListBatch
from rewards.logits import decoder_of


class Pass(NamedTuple):
    """What one forward and backward pass needs, in bytes beside weights and their gradients."""

    kept: int
    """Activations: everything that lives between the two."""
    peak: int
    """At most, `kept` and what is made on the way."""
    forward: int
    """Floating-point operations of the layers' products on the way there, without the LM head and attention."""
    flops: int
    """Likewise of both ways."""
    tokens: int
    """Cells that the layers read, padding included."""


class _Live(TorchDispatchMode):
    """Counts the bytes of storages from the operation that made them until nothing holds them, and operations.

    torch's FlopCounterMode is not used: its hooks on modules hold what checkpointed layers compute again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.flops = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        if formula := flop_registry.get(function.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=made)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return made

    def leave_out(self, tensors: Iterator[Tensor]) -> None:
        """Storages that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = storage

    def _see(self, storage: Any) -> None:
        place = storage._cdata
        if place in self.known:
            return
        size = storage.nbytes()
        self.known[place] = weakref.ref(storage, partial(self._gone, place, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, place: int, size: int, _: Any) -> None:
        self.known.pop(place, None)
        self.now -= size


def trace(
    model: nn.Module,
    lists: Sequence[Example],
    *,
    packed: bool,
    precision: torch.dtype,
    checkpointed: int | None,
    again: bool = False,
    reward: bool = False,
) -> Pass:
    """A training pass over some lists.

    Args:
        model: on the meta device; it is changed, and of no further use.
        packed: whether the lists are one row.
        precision: of autocast.
        checkpointed: layers that compute again in the backward pass; None for none.
        again: another pass came before in the same step, so that gradients are there already.
        reward: it is a reward model.
    """
    batch = packed_collate(lists) if packed else collate(lists, pad_id=0)
    for module, method in fused_methods(_with_norms(model)).items():
        module.forward = method.__get__(module)
    if checkpointed:
        checkpoint_layers(model, checkpointed)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _fill(model, gradients=again)
    asked = _asked(batch, mode.from_tensor, reward=reward)
    live = _Live()
    owned = [*model.parameters(), *model.buffers()]
    live.leave_out(iter(owned + [p.grad for p in owned if p.grad is not None]))
    half = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    model.train()
    with mode, _no_mask(), live:
        with half:
            values = _values(model, asked, reward=reward)
        kept, forward = live.now, live.flops
        values.sum().backward()
    gradients = 0 if again else sum(p.grad.untyped_storage().nbytes() for p in owned if p.grad is not None)
    return Pass(kept, max(kept, live.most - gradients), forward, live.flops, batch.input_ids.numel())


def _no_mask() -> Any:
    """transformers cannot look whether fake positions are those of one sequence a row, as a padded batch's are."""
    return patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


class _Asked(NamedTuple):
    """A batch as fake tensors: what the layers read, where something is read of them, and what is looked up there."""

    input_ids: Tensor
    places: Tensor
    distinct: Tensor
    targets: Tensor
    options: dict[str, Any]


def _asked(batch: ListBatch, fake: Any, *, reward: bool) -> _Asked:
    mask = batch.completion_mask
    places = batch.ends_at if reward else batch.predict_at[mask]
    assert places is not None, "the collators give it"
    options: dict[str, Any] = {}
    if batch.branches is not None:
        unread = fake(torch.ones(1, 1, 1, 1, dtype=torch.bool))
        options = {"position_ids": fake(batch.position_ids), "attention_mask": unread, "tree": Tree(batch.branches)}
    tensors = batch.input_ids, places, places.unique(), batch.targets[mask]
    input_ids, places, distinct, targets = (fake(tensor) for tensor in tensors)
    return _Asked(input_ids, places, distinct, targets, options)


def _values(model: nn.Module, asked: _Asked, *, reward: bool) -> Tensor:
    """Every target's log-probability, or every completion's reward."""
    base = base_model(model)
    if reward and not reads_last_token(base):
        return base(input_ids=asked.input_ids, attention_mask=torch.ones_like(asked.input_ids)).logits
    decoder = decoder_of(base)
    with asked_rows(asked.distinct), telling(decoder, asked.options.get("tree")):
        output = decoder(input_ids=asked.input_ids, use_cache=False, **asked.options)
    rows = output.last_hidden_state.flatten(0, 1)[asked.places]
    if reward:
        last: Any = base.score
        return last(rows).float()
    head = head_of(base)
    frozen = head["lora"] is None and not head["weight"].requires_grad
    grad: Any = "direction" if frozen and rows.requires_grad else "auto"
    return linear_logprobs(rows, targets=asked.targets, outputs=("logprob", "entropy"), grad=grad, **head).logprob


def _with_norms(model: nn.Module) -> nn.Module:
    """The same with weights of ones in its norms: which of them have a fused form is seen by their values."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("RMSNorm") and weight is not None:
            ones = torch.ones(weight.shape, dtype=weight.dtype)
            module.weight = nn.Parameter(ones, requires_grad=weight.requires_grad)
    return model


def _fill(model: nn.Module, *, gradients: bool) -> None:
    """Fake tensors of a CPU in the places of the meta device's, shared where these are; with gradients, if asked."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                new.grad = torch.empty_like(new) if gradients and old.requires_grad else None
                made[id(old)] = (new, old)  # the old one is held, so that its id is not another's
            module._parameters[name] = made[id(old)][0]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
