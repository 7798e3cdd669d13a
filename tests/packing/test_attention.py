"""Attention over a packed row against attention over every sequence alone."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from align.packing import capped
from align.packing.attention import Tree, tree_eager, tree_sdpa
from align.packing.banded import bands
from align.types import Branch

# Two lists, a trie that forks in what turns off from it, with leaves of equal length, and a sequence alone.
BRANCHES = tuple(
    Branch(*pair)
    for pair in (
        *((4, -1), (9, 0), (5, 0)),
        *((1, -1), (3, 3), (3, 3), (1, 3)),
        *((7, -1), (6, 7), (4, 8), (2, 8), (2, 8), (5, 7), (3, 12), (2, 13), (2, 13), (2, 12), (1, 7)),
        (7, -1),
    )
)
TOKENS = sum(branch.size for branch in BRANCHES)


def sequences():
    """Rows of the tokens of every path from a tree's beginning to a leaf."""
    rows = []
    start = 0
    for size, parent in BRANCHES:
        rows.append([*(rows[parent] if parent >= 0 else []), *range(start, start + size)])
        start += size
    parents = {parent for _, parent in BRANCHES}
    return [torch.tensor(own) for number, own in enumerate(rows) if number not in parents]


def alone(q, k, v, *, scaling, window=None, softcap=None):
    """softmax(scaling q k' + causal mask) v of every sequence by itself; what several share once."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
    for rows in sequences():
        distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
        sees = (distance >= 0) & (distance < (window or 10**6))
        heads = q.shape[1] // k.shape[1]
        keys, values = (x[:, :, rows].repeat_interleave(heads, 1) for x in (k, v))
        logits = q[:, :, rows] @ keys.mT * scaling
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        own = logits.masked_fill(~sees, -torch.inf).softmax(-1) @ values
        out = out.index_put((torch.tensor([0])[:, None], rows), own.transpose(1, 2))
    return out


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def tensors(request):
    shapes = [(1, 6, TOKENS, 10), (1, 2, TOKENS, 10), (1, 2, TOKENS, 10)]  # three query heads to a key head
    return [torch.randn(shape).to(request.param).requires_grad_() for shape in shapes]


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]


def compare(tensors, attention, told, expected_from):
    out, _ = attention(nn.Module(), *tensors, None, tree=Tree(BRANCHES), **told)
    double = [x.detach().double().requires_grad_() for x in tensors]
    expected = expected_from(*double)
    atol = tolerance(tensors[0].dtype)
    assert_close(out.double(), expected, atol=atol, rtol=atol)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((out.double() * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights).sum(), double)
    for gradient, want in zip(ours, wanted, strict=True):
        assert_close(gradient.double(), want, atol=5 * atol, rtol=5 * atol)


@pytest.mark.parametrize("scaling", [0.3, None])
def test_flash_parts_make_up_the_whole(tensors, scaling):
    compare(tensors, tree_sdpa, {"scaling": scaling}, lambda *x: alone(*x, scaling=scaling or 10**-0.5))


@pytest.mark.parametrize("window", [1, 2, 3, 6, 13, 19])
def test_a_window_is_kept(tensors, window):
    told = {"scaling": 0.3, "sliding_window": window}
    compare(tensors, tree_sdpa, told, lambda *x: alone(*x, scaling=0.3, window=window))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 30])
def test_every_pair_within_a_window_is_computed_once_and_no_other(window):
    wanted, seen = torch.zeros(2, TOKENS, TOKENS, dtype=torch.int)
    for rows in sequences():
        distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
        wanted[rows[:, None], rows] = ((distance >= 0) & (distance < window)).int()
    for band in bands(BRANCHES, window, torch.device("cpu")):
        for queries, keys in zip(band.queries, band.keys, strict=True):
            pairs = torch.ones(len(queries), len(keys), dtype=torch.int)
            seen[queries[:, None], keys] += pairs.tril() if band.causal else pairs
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize("rows", [1, 3, capped.ROWS])
@pytest.mark.parametrize(("window", "scaling"), [(None, None), (None, 0.9), (1, 0.9), (2, 0.9), (5, None), (13, 0.9)])
def test_plain_operations_keep_window_and_soft_cap(tensors, window, scaling, rows, monkeypatch):
    monkeypatch.setattr(capped, "ROWS", rows)
    told = {"scaling": scaling, "sliding_window": window, "softcap": 0.7}
    expected = partial(alone, scaling=scaling or 10**-0.5, window=window, softcap=0.7)
    compare(tensors, tree_eager, told, expected)


def test_a_soft_cap_with_a_head_size_of_values_of_its_own(tensors):
    tensors[2] = tensors[2].detach()[..., :7].requires_grad_()
    compare(tensors, tree_eager, {"scaling": 0.9, "softcap": 0.7}, partial(alone, scaling=0.9, softcap=0.7))


def test_a_head_size_of_values_of_its_own(tensors):
    tensors[2] = tensors[2].detach()[..., :7].requires_grad_()
    compare(tensors, tree_sdpa, {"scaling": 0.3}, lambda *x: alone(*x, scaling=0.3))


def test_dropout_takes_effect():
    q, k, v = (torch.randn(1, 2, TOKENS, 8) for _ in range(3))
    for attention in (tree_sdpa, tree_eager, partial(tree_eager, softcap=0.7)):
        first, second = (attention(nn.Module(), q, k, v, None, dropout=0.5, tree=Tree(BRANCHES))[0] for _ in range(2))
        assert not torch.equal(first, second)


def test_autocast_brings_everything_to_its_dtype():
    q, k, v = (torch.randn(1, 2, TOKENS, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = tree_sdpa(nn.Module(), q, k, v.bfloat16(), None, tree=Tree(BRANCHES))
        soft, _ = tree_eager(nn.Module(), q, k, v.bfloat16(), None, tree=Tree(BRANCHES), softcap=0.7)
    assert out.dtype == F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == soft.dtype
    assert_close(out.float(), alone(q, k, v, scaling=8**-0.5), atol=3e-2, rtol=3e-2)
    assert_close(soft.float(), alone(q, k, v, scaling=8**-0.5, softcap=0.7), atol=3e-2, rtol=3e-2)
