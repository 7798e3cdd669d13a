"""Functions over time on a packed row against the same functions on every sequence by itself."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from align.packing import forks
from align.packing.attention import Tree
from align.types import Branch

PAIRS = {
    "two lists, a deep tree and a sequence alone": (
        *((4, -1), (9, 0), (5, 0), (1, -1), (3, 3), (3, 3), (1, 3)),
        *((7, -1), (6, 7), (4, 8), (2, 8), (2, 8), (5, 7), (3, 12), (2, 13), (2, 13), (2, 12), (1, 7)),
        (7, -1),
    ),
    "branches shorter than a window": ((1, -1), (1, 0), (2, 1), (1, 1), (1, 0), (1, 4), (1, 4)),
}
ROWS = {name: tuple(Branch(*pair) for pair in pairs) for name, pairs in PAIRS.items()}


def sequences(branches):
    """Rows of the tokens of every path from a tree's beginning to a leaf."""
    rows, start = [], 0
    for size, parent in branches:
        rows.append([*(rows[parent] if parent >= 0 else []), *range(start, start + size)])
        start += size
    inner = {parent for _, parent in branches}
    return [torch.tensor(own) for number, own in enumerate(rows) if number not in inner]


def compare(branches, ours, alone, given):
    """Values at every token, and gradients of a sum over all of them, each token counted once."""
    tokens = sum(branch.size for branch in branches)
    found = ours(Tree(branches), *given)
    wanted = torch.zeros_like(found)
    for rows in reversed(sequences(branches)):
        wanted = wanted.index_copy(1, rows, alone(*(x[:, rows] for x in given)))
    assert found.shape[:2] == (1, tokens)
    assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(wanted)
    gradients = (torch.autograd.grad((weights * x).sum(), given) for x in (found, wanted))
    for own, want in zip(*gradients, strict=True):
        assert_close(own, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("branches", ROWS.values(), ids=ROWS)
def test_a_recurrence_goes_on_from_where_sequences_part(branches):
    """s_t = a_t s_(t-1) + x_t, y_t = s_t^2."""

    def scan(state, a, x):
        state = torch.zeros_like(x[:, 0]) if state is None else state
        outputs = []
        for t in range(x.shape[1]):
            state = a[:, t] * state + x[:, t]
            outputs.append(state**2)
        return torch.stack(outputs, dim=1), state

    tokens = sum(branch.size for branch in branches)
    calls = []

    def counted(state, a, x):
        calls.append(x.shape[0])
        return scan(state, a, x)

    given = [torch.randn(1, tokens, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    compare(
        branches,
        lambda tree, a, x: forks.along(tree, counted, {"a": a, "x": x}, a=1.0),
        lambda a, x: scan(None, a, x)[0],
        given,
    )
    assert sum(calls) == len(branches)  # every branch once


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("branches", ROWS.values(), ids=ROWS)
def test_a_convolution_reads_a_sequences_own_past(branches, width):
    tokens = sum(branch.size for branch in branches)
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((1, tokens, 5), (5, width)))
    lengths = []

    def own(x, weight):
        lengths.append(x.shape[-1])
        return F.conv1d(x, weight[:, None], padding=width - 1, groups=5)[..., : x.shape[-1]]

    compare(
        branches,
        lambda tree, x: forks.convolution(own, tree, x.mT, weight).mT,
        lambda x: own(x.mT, weight).mT,
        [x],
    )
    turns = sum(parent != number - 1 or parent < 0 for number, (_, parent) in enumerate(branches))
    assert lengths[0] == tokens + turns * (width - 1)
