"""Variable-length tree attention, with torch's GPU kernels replaced by what they are documented to compute."""

import pytest
import torch
from torch.testing import assert_close

from align.packing import attention, varlen
from align.packing.attention import Tree, masks
from align.packing.trie import trees
from align.packing.varlen import layout, varlen_tree_attention
from align.types import Branch

LISTS = tuple(Branch(*pair) for pair in ((3, -1), (4, 0), (2, 0), (2, 0), (6, -1), (1, 4), (1, 4), (3, 4), (1, 4)))
DEEP = (
    *LISTS,
    *(Branch(*pair) for pair in ((2, -1), (3, 9), (4, 10), (2, 10), (1, 9), (2, 13), (2, 13), (1, 9), (6, -1))),
)


def scores(q, k, cu_q, cu_k, causal, scale):
    """Attention logits of packed sequences: -inf between sequences and, if causal, ahead (aligned at the end)."""
    groups = q.shape[1] // k.shape[1]
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, dim=1)) * scale
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        block = torch.ones(b - a, d - c, dtype=torch.bool)
        seen[a:b, c:d] = block.tril(diagonal=(d - c) - (b - a)) if causal else block
    return logits.masked_fill(~seen, -torch.inf), groups


def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
    assert dropout == 0 and not debug and cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    logits, groups = scores(q, k, cu_q, cu_k, causal, scale)
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.repeat_interleave(groups, dim=1))
    return out, logits.logsumexp(-1), None, None, None


def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale):
    """Dao 2023, algorithm 2: P = exp(S - lse), D = rowsum(dO * O), dS = P * (dO V' - D)."""
    assert lse.is_contiguous() and grad.is_contiguous()
    logits, groups = scores(q, k, cu_q, cu_k, causal, scale)
    p = (logits - lse[..., None]).exp()
    wide_k, wide_v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    ds = p * (torch.einsum("qhd,khd->hqk", grad, wide_v) - (grad * out).sum(-1).T[..., None])
    dq = torch.einsum("hqk,khd->qhd", ds, wide_k) * scale
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q) * scale, torch.einsum("hqk,qhd->khd", p, grad)
    return dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(varlen, "FORWARD", forward)
    monkeypatch.setattr(varlen, "BACKWARD", backward)


def inputs(heads, key_heads, branches):
    total = sum(branch.size for branch in branches)
    sizes = ((heads, 4), (key_heads, 4), (key_heads, 4))
    return [torch.randn(1, h, total, d, dtype=torch.float64, requires_grad=True) for h, d in sizes]


def masked(query, key, value, scaling, branches):
    """The same by a mask over each tree, in plain operations."""
    groups = query.shape[1] // key.shape[1]
    totals, results = [sum(branch.size for branch in own) for own in trees(branches)], []
    seen = Tree(branches).once(masks, None, query.device)
    for mask, q, k, v in zip(seen, *(x.split(totals, dim=2) for x in (query, key, value)), strict=True):
        logits = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        logits = logits.masked_fill(~mask, -torch.inf)
        results.append(logits.softmax(-1) @ v.repeat_interleave(groups, 1))
    return torch.cat(results, dim=2).transpose(1, 2)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("branches", [LISTS, DEEP], ids=["lists", "deep"])
def test_values_and_gradients_are_those_of_a_masked_row(kernels, heads, key_heads, scaling, branches):
    tensors = inputs(heads, key_heads, branches)
    ours = varlen_tree_attention(*tensors, layout(branches, torch.device("cpu")), scaling)
    expected = masked(*tensors, 0.5 if scaling is None else scaling, branches)
    assert_close(ours, expected)
    weights = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((weights * y).sum(), tensors) for y in (ours, expected))
    assert_close(found, wanted)


@pytest.mark.parametrize(("branches", "count"), [(LISTS, 2), (DEEP, 3), (DEEP[-1:], 1)])
def test_as_many_calls_as_the_trees_are_deep(kernels, monkeypatch, branches, count):
    calls = []
    monkeypatch.setattr(varlen, "FORWARD", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    varlen_tree_attention(*inputs(2, 2, branches), layout(branches, torch.device("cpu")))
    assert len(calls) == count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("branches", [LISTS, DEEP], ids=["lists", "deep"])
def test_the_gpus_kernels_give_the_same(heads, key_heads, branches):
    total = sum(branch.size for branch in branches)
    shapes = ((heads, 64), (key_heads, 64), (key_heads, 64))
    half = [torch.randn(1, h, total, d, device="cuda").bfloat16().requires_grad_() for h, d in shapes]
    exact = [x.detach().double().cpu().requires_grad_() for x in half]
    module = torch.nn.Module()
    module.is_causal = True
    ours, _ = attention.tree_sdpa(module, *half, None, tree=Tree(branches))
    expected = masked(*exact, 64**-0.5, branches)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((weights.to(ours) * ours).sum(), half)
    wanted = torch.autograd.grad((weights * expected).sum(), exact)
    for value, want in zip((ours, *found), (expected, *wanted), strict=True):
        assert (value.double().cpu() - want).norm() <= 0.01 * want.norm()
