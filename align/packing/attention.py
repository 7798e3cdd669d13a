"""Attention over packed rows, under names that transformers' models find it by."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from align.packing.banded import banded_tree_attention, bands
from align.packing.capped import Capped
from align.packing.flash import FLASH, Kernel, flash_tree_attention
from align.packing.trie import longest_sequence, trees
from align.packing.varlen import DTYPES, MAX_HEAD_WIDTH, layout, varlen_tree_attention
from align.types import Branches

ATTENTION = {"sdpa": "tree_sdpa", "eager": "tree_eager"}
"""transformers' attention implementation -> ours, which is the same on rows that are not packed."""

Made = TypeVar("Made")


class Tree:
    """How a packed row is built, told to every layer's attention by the keyword `tree`."""

    def __init__(self, branches: Branches) -> None:
        """Args:
        branches: of the row.
        """
        self.branches = branches
        self.longest = longest_sequence(branches)
        self.passes = 0
        """Forward passes of the model with this row, where they are counted."""
        self.told: list[tuple[nn.Module, int | None]] = []
        """Every attention call so far, by whom and with which sliding window: what a model does with its layers."""
        self.carried: list[nn.Module] = []
        """Every call so far of a module with a state."""
        self._made: dict[tuple, Any] = {}

    def once(self, make: Callable[..., Made], *given: Any) -> Made:
        """What a function makes of the row's branches, made for the first layer and kept for the others."""
        key = make, *given
        if key not in self._made:
            self._made[key] = make(self.branches, *given)
        return self._made[key]


def masks(branches: Branches, window: int | None, device: torch.device) -> list[Bool[Tensor, "T T"]]:
    """Who sees whom in each tree of a row: itself and what precedes it in its own sequence, within a window."""
    made = {tree: _mask(tree, window, device) for tree in dict.fromkeys(trees(branches))}
    return [made[tree] for tree in trees(branches)]


def _mask(tree: Branches, window: int | None, device: torch.device) -> Bool[Tensor, "T T"]:
    sees = torch.eye(len(tree), dtype=torch.bool)
    starts = [0] * len(tree)
    for number, (_, parent) in enumerate(tree):
        if parent >= 0:
            sees[number] |= sees[parent]
            starts[number] = starts[parent] + tree[parent].size
    sizes = torch.tensor([branch.size for branch in tree])
    branch = torch.repeat_interleave(torch.arange(len(tree)), sizes).to(device)
    places = [torch.arange(start, start + size) for start, (size, _) in zip(starts, tree, strict=True)]
    position = torch.cat(places).to(device)
    distance = position[:, None] - position
    seen = (distance >= 0) & sees.to(device)[branch[:, None], branch]
    return seen if window is None else seen & (distance < window)


def unread_layers(tree: Tree, decoder: nn.Module, states: list[nn.Module]) -> str:
    """What a forward pass with `tree` has shown of layers that it did not reach; empty where it reached all.

    Layers that do not attend through us, or whose window we are not told: a short text's results cannot show that.

    Args:
        states: the decoder's modules with a state.
    """
    model: Any = decoder
    text = model.config.get_text_config()
    passes = max(tree.passes, 1)
    if states:  # a layer may then have both or neither
        attending = [m for m in decoder.modules() if type(m).__name__.endswith("Attention") and m not in states]
        unread = {*attending, *states} != {*(module for module, _ in tree.told), *tree.carried}
    else:
        unread = len(tree.told) != passes * text.num_hidden_layers
    if unread:
        return "not all of its layers use transformers' attention interface"
    if sum(window is not None for _, window in tree.told) != passes * sum(DynamicCache(config=text).is_sliding):
        return "its layers do not tell attention their window"
    return ""


def tree_sdpa(
    module: nn.Module,
    query: Float[Tensor, "R Hq T D"],
    key: Float[Tensor, "R Hk T D"],
    value: Float[Tensor, "R Hk T E"],
    attention_mask: Tensor | None,
    tree: Tree | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, or over a packed row the same values without computing what is masked.

    Like sdpa in transformers it takes no notice of a soft-cap of the attention's logits; `tree_eager` does.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    dropout, scaling, window = options.get("dropout", 0.0), options.get("scaling"), options.get("sliding_window")
    tree.told.append((module, window))
    query, key, value = _autocast(query, key, value)
    if _takes_parts(query, value, dropout):
        return _by_parts(FLASH, tree, window, scaling, query, key, value), None
    whole = window is None or window >= tree.longest
    alike = query.device.type != "cpu" and query.shape[-1] == value.shape[-1] and query.dtype in DTYPES
    if whole and alike and not dropout and query.shape[-1] <= MAX_HEAD_WIDTH:
        return varlen_tree_attention(query, key, value, tree.once(layout, query.device), scaling), None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)

    key, value = (_repeat(x, query.shape[1]) for x in (key, value))
    return _by_tree(attend, tree, window, query, key, value), None


def tree_eager(
    module: nn.Module,
    query: Float[Tensor, "R Hq T D"],
    key: Float[Tensor, "R Hk T D"],
    value: Float[Tensor, "R Hk T E"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree: Tree | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in plain operations, softmax in float32, with a soft-cap of its logits where a model has one."""
    if tree is not None and softcap is not None and _takes_parts(query, value, dropout):
        tree.told.append((module, sliding_window))
        return _by_parts(Capped(softcap), tree, sliding_window, scaling, *_autocast(query, key, value)), None
    key, value = (_repeat(x, query.shape[1]) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        logits = q @ k.transpose(-1, -2) * scale
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
        return F.dropout(weights, dropout) @ v

    if tree is None:
        return attend(query, key, value, attention_mask).transpose(1, 2).contiguous(), None
    tree.told.append((module, sliding_window))
    return _by_tree(attend, tree, sliding_window, query, key, value), None


def _takes_parts(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether kernels of parts take these: on a CPU, heads of one width, nothing dropped."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and not dropout


def _by_parts(
    kernel: Kernel, tree: Tree, window: int | None, scaling: float | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attention by the parts of the row, or of the window's band in it, without computing what is masked."""
    if window is None or window >= tree.longest:
        return flash_tree_attention(query, key, value, tree.branches, scaling, kernel)
    return banded_tree_attention(query, key, value, tree.once(bands, window, query.device), scaling, kernel)


def _by_tree(attend: Callable[..., Tensor], tree: Tree, window: int | None, *tensors: Tensor) -> Tensor:
    """Attention within each tree's share of the row, under its mask."""
    own = trees(tree.branches)
    shares = (x.split([sum(branch.size for branch in one) for one in own], dim=2) for x in tensors)
    seen = tree.once(masks, window, tensors[0].device)
    return torch.cat([attend(*share) for share in zip(*shares, seen, strict=True)], dim=2).transpose(1, 2).contiguous()


def _repeat(x: Float[Tensor, "R Hk T D"], heads: int) -> Float[Tensor, "R Hq T D"]:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """In autocast's dtype where that is on: rotary embeddings leave queries and keys in another than values."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]


AttentionInterface.register("tree_sdpa", tree_sdpa)
AttentionInterface.register("tree_eager", tree_eager)
AttentionMaskInterface.register("tree_sdpa", sdpa_mask)
AttentionMaskInterface.register("tree_eager", eager_mask)
