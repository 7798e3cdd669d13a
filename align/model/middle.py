"""LoRAs of which a small middle trains between outer factors that are computed once, W + B M A, or B behind a fixed A.

In the layer stands PEFT's own LoRA, whose B is a module that multiplies the outer factor by the middle: fused layers,
packed rows and merging see a LoRA, and what is exported is one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align.errors import UserError
from align.model.forward import evaluating, score_tokens
from align.model.sharding import whole
from align.types import ListBatch, TokenStats

Factors = tuple[Float[Tensor, "O r"], Tensor, Float[Tensor, "r I"]]
"""B, M and A; M is a matrix, or the diagonal of one."""
Loss = Callable[[TokenStats, ListBatch], Float[Tensor, " B"]]
BLOCK_TOLERANCE = 1e-3
"""Singular values of Nystroem's block below this share of the largest count as zero: their inverses would be noise."""


class Fixed(nn.Module):
    """A frozen linear map in the place of a LoRA's A."""

    weight: Tensor

    def __init__(self, weight: Float[Tensor, "r I"]) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Product(nn.Module):
    """B M in the place of a LoRA's B."""

    outer: Tensor

    def __init__(self, outer: Float[Tensor, "O r"], middle: Tensor, *, outer_trains: bool) -> None:
        super().__init__()
        self.middle = nn.Parameter(middle.contiguous())
        if outer_trains:
            self.outer = nn.Parameter(outer.contiguous())
        else:
            self.register_buffer("outer", outer.contiguous())

    @property
    def weight(self) -> Float[Tensor, "O r"]:
        return product(self.outer, self.middle)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def product(outer: Float[Tensor, "O r"], middle: Tensor) -> Float[Tensor, "O r"]:
    """B M, where M may be given by its diagonal."""
    return outer * middle if middle.dim() == 1 else outer @ middle


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors as those of a plain LoRA, or of offsets."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(".middle")]:
        stem = name.removesuffix(".middle")
        folded_in = product(whole(found.pop(f"{stem}.outer")), whole(found.pop(name)))
        if stem.endswith(".lora_B"):
            found[f"{stem}.weight"] = folded_in
        else:  # an offset, which PEFT holds as a row
            found[stem] = folded_in.T.contiguous()
    return found


def singular(weight: Float[Tensor, "O I"], rank: int) -> Factors:
    """The leading singular triplets."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def nystroem(weight: Float[Tensor, "O I"], rank: int) -> Factors:
    """W[:, :r] W[:r, :r]^+ W[:r, :], without a decomposition of the whole."""
    return weight[:, :rank], torch.linalg.pinv(weight[:rank, :rank], rtol=BLOCK_TOLERANCE), weight[:rank]


def lower_diagonal_upper(weight: Float[Tensor, "O I"], rank: int) -> Factors:
    """The first columns of P L, entries of D and rows of U, of W = P L D U with ones on both diagonals."""
    p, lower, upper = torch.linalg.lu(weight)
    diagonal = upper.diagonal()[:rank]
    return (p @ lower)[:, :rank], diagonal, upper[:rank] / diagonal.where(diagonal != 0, 1)[:, None]


DECOMPOSITIONS = {one.__name__: one for one in (singular, nystroem, lower_diagonal_upper)}


@torch.no_grad()
def start(wrapped: PeftModel, adapter: Any, *, batches: list[ListBatch] | None, loss: Loss | None, **_: Any) -> None:
    """Put the factors in, and take what they give at first out of the base where the adapter does so.

    Raises:
        UserError: the rank is more than a weight has directions, or a gradient is needed and there is no loss.
    """
    layers = {name: module for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    found: dict[str, Tensor] = {}
    if adapter.from_rows and batches is not None:
        bases: dict[str, Any] = {name: layer.get_base_layer() for name, layer in layers.items()}
        found = gradients(wrapped, bases, batches, loss)
    for name, layer in layers.items():
        (own,) = layer.lora_A
        weight = _matrix(layer)
        if adapter.rank > min(weight.shape):
            raise UserError(
                f"policy.adapter.rank: {adapter.rank} is more than {name.removeprefix('base_model.model.')} has "
                f"directions; give at most {min(weight.shape)}"
            )
        if adapter.from_rows:  # without batches the factors are loaded afterwards
            outer, s, inner = singular(-found[name].sign() if name in found else weight, adapter.rank)
            middle = (adapter.step * s).diag()
        else:
            outer, middle, inner = DECOMPOSITIONS[adapter.decomposition](weight, adapter.rank)
        layer.lora_B[own] = Product(outer, middle, outer_trains=adapter.outer_trains)
        if adapter.outer_trains:
            layer.lora_A[own].weight.data = inner.contiguous()
        else:
            layer.lora_A[own] = Fixed(inner)
        if adapter.mutates_base:
            base: Any = layer.get_base_layer()
            left = weight - product(outer, middle) @ inner
            base.weight.copy_(left.T if isinstance(base, Conv1D) else left)
    config: Any = next(iter(wrapped.peft_config.values()))
    config.orth_reg_weight = getattr(adapter, "orthonormality", 0.0)
    if adapter.mutates_base:
        config.init_lora_weights = adapter.name


@torch.no_grad()
def columns(wrapped: PeftModel, adapter: Any, **_: Any) -> None:
    """Let every A pick columns of its weight: of whole heads, drawn at random, or single ones.

    Raises:
        UserError: there are fewer.
    """
    text = wrapped.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    config: Any = next(iter(wrapped.peft_config.values()))
    config.rank_pattern = {}
    layers: dict[str, Any] = {name: module for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        (own,) = layer.lora_A
        where = name.removeprefix("base_model.model.")
        of_heads = where.endswith(adapter.targets[0])
        count, size, key = (adapter.heads, width, "heads") if of_heads else (adapter.channels, 1, "channels")
        outputs, inputs = _matrix(layer).shape
        if count > inputs // size:
            raise UserError(f"policy.adapter.{key}: {where} has {inputs // size}; give at most as many")
        first = torch.randperm(inputs // size)[:count].sort().values * size
        picked = (first[:, None] + torch.arange(size)).flatten()
        device = layer.get_base_layer().weight.device
        layer.lora_A[own] = Fixed(F.one_hot(picked, inputs).float().to(device))
        layer.lora_B[own] = nn.Linear(len(picked), outputs, bias=False, device=device)
        nn.init.zeros_(layer.lora_B[own].weight)
        layer.r[own], layer.lora_alpha[own], layer.scaling[own] = len(picked), len(picked), 1.0
        config.rank_pattern[where] = len(picked)


def _matrix(layer: Any) -> Float[Tensor, "O I"]:
    """A layer's weight in float32, a copy: factors may be cut out of it."""
    base = layer.get_base_layer()
    return (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().float().clone()


def gradients(
    model: nn.Module, layers: Mapping[str, Any], batches: Iterable[ListBatch], loss: Loss | None
) -> dict[str, Float[Tensor, "O I"]]:
    """The gradient of the loss, summed over the lists, by every layer's weight.

    Raises:
        UserError: there is no loss.
    """
    if loss is None:
        raise UserError(
            "policy.adapter: it needs the gradient of a policy's loss; a reward model takes lora, or ranks by variance"
        )
    weights = {name: layer.weight for name, layer in layers.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                batch = batch.to(next(model.parameters()).device)
                loss(score_tokens(model, batch), batch).sum().backward()
        conv = {name for name, layer in layers.items() if isinstance(layer, Conv1D)}
        return {n: (w.grad.T if n in conv else w.grad).float() for n, w in weights.items()}
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
