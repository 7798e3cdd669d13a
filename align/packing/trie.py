"""Token sequences as a compressed trie in one row: what several of them begin with stands once."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from align.types import Branch, Branches

PAYS = 16
"""Tokens that a fork has to save, since it costs every layer two calls more."""


class Trie(NamedTuple):
    """Sequences in one row."""

    tokens: list[int]
    positions: Int[Tensor, " T"]
    """Each token's place in the sequences that it belongs to."""
    branches: Branches
    rows: list[Int[Tensor, " L"]]
    """Of every sequence, where its tokens stand."""


def grow(sequences: Sequence[Sequence[int]], groups: Sequence[Hashable], *, pays: int = PAYS) -> Trie:
    """A trie of sequences, forked where that saves at least `pays` tokens, and where a group's common beginning ends.

    A branch's first child has the most tokens below it. The row is a function of the arguments alone.

    Args:
        sequences: none of them empty.
        groups: sequences with an equal one share what they begin with, however short it is.

    Source: ours
    """
    order = sorted(range(len(sequences)), key=lambda i: (list(sequences[i]), i))
    ids = [np.asarray(sequence) for sequence in sequences]
    roots = _children(_Grown(ids, groups, Counter(groups), pays), order, 0, 0, within=False)
    laid = _Laid([], [], [], [None] * len(ids))
    for fork in sorted(roots, key=lambda fork: min(fork.members)):
        _lay(laid, ids, fork, 0, -1, [])
    found = [rows for rows in laid.rows if rows is not None]
    return Trie(laid.tokens, torch.cat(laid.positions), tuple(laid.branches), found)


class _Fork(NamedTuple):
    """Sequences that agree up to `end`, and how they go on from there; `size` is of all tokens from its beginning."""

    members: list[int]
    end: int
    children: "list[_Fork]"
    size: int


class _Grown(NamedTuple):
    ids: list[np.ndarray]
    groups: Sequence[Hashable]
    sizes: Counter
    """Sequences of each group."""
    pays: int

    def is_one_group(self, members: list[int]) -> bool:
        """Whether these are all sequences of one group, and no others."""
        return len({self.groups[i] for i in members}) == 1 and len(members) == self.sizes[self.groups[members[0]]]


def _children(of: _Grown, members: list[int], at: int, agreed: int, *, within: bool) -> list[_Fork]:
    """How sequences in the order of their tokens, which agree up to `agreed`, go on from `at` on.

    Args:
        within: what they go on from belongs to one group alone.
    """
    first, last = of.ids[members[0]], of.ids[members[-1]]
    end = agreed + agree(first[agreed:], last[agreed:])
    if len(members) == 1 or end == len(last):
        return [_Fork(members, end, [], end - at)] if end > at else []
    one = of.is_one_group(members)
    if end == at or within or not one:
        apart = _apart(of, members, at, end)
        alone = [fork for own in apart for fork in _children(of, own, at, end, within=within)]
        if (len(alone) - 1) * (end - at) < of.pays or end == at:
            return alone
    within = within or one
    children = [f for own in _apart(of, members, end, end) for f in _children(of, own, end, end, within=within)]
    children.sort(key=lambda fork: (-fork.size, min(fork.members)))
    return [_Fork(members, end, children, end - at + sum(child.size for child in children))]


def _apart(of: _Grown, members: list[int], at: int, end: int) -> list[list[int]]:
    """Sequences that agree up to `end`, by their next token; at a tree's beginning by group, if that parted a group."""
    own = [list(part) for _, part in groupby(members, key=lambda i: of.ids[i][end] if end < len(of.ids[i]) else -1)]
    groups: dict[Hashable, list[int]] = {of.groups[i]: [] for i in members}
    if at or len(groups) == 1 or sum(len({of.groups[i] for i in part}) for part in own) == len(groups):
        return own
    for i in members:
        groups[of.groups[i]].append(i)
    return list(groups.values())


def agree(one: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    short = min(len(one), len(other))
    differ = np.asarray(one[:short]) != np.asarray(other[:short])
    return int(differ.argmax()) if differ.any() else short


class _Laid(NamedTuple):
    tokens: list[int]
    positions: list[Tensor]
    branches: list[Branch]
    rows: list[Tensor | None]


def _lay(laid: _Laid, ids: list[np.ndarray], fork: _Fork, at: int, parent: int, path: list[Tensor]) -> None:
    """A fork's own tokens, and behind them those of its children."""
    start = len(laid.tokens)
    laid.tokens.extend(ids[fork.members[0]][at : fork.end].tolist())
    laid.positions.append(torch.arange(at, fork.end))
    laid.branches.append(Branch(fork.end - at, parent))
    path = [*path, torch.arange(start, len(laid.tokens))]
    number = len(laid.branches) - 1
    below = {member for child in fork.children for member in child.members}
    for member in fork.members:
        if member not in below:
            laid.rows[member] = torch.cat(path)
    for child in fork.children:
        _lay(laid, ids, child, fork.end, number, path)


class Path(NamedTuple):
    """A branch with its first child, that one's, and so on: a run of the row that is one sequence.

    What else goes on from its branches are its `turns`: where a turn's tokens stand, and up to where they see the path.
    """

    start: int
    stop: int
    depth: int
    """How many paths are before it."""
    turns: list[tuple[slice, int]]


def paths(branches: Branches) -> Iterator[Path]:
    """The paths that make up a row, in its order, each behind those that it goes on from."""
    stops = list(accumulate(branch.size for branch in branches))
    below = stops.copy()
    for number in range(len(branches) - 1, 0, -1):
        parent = branches[number].parent
        if parent >= 0:
            below[parent] = max(below[parent], below[number])
    depths: list[int] = []
    number = 0
    while number < len(branches):
        head, parent = number, branches[number].parent
        while number + 1 < len(branches) and branches[number + 1].parent == number:
            number += 1
        depth = 0 if parent < 0 else depths[parent] + 1
        depths += [depth] * (number + 1 - head)
        turned = [(slice(below[n + 1], below[n]), stops[n]) for n in range(head, number) if below[n + 1] < below[n]]
        yield Path(stops[head] - branches[head].size, stops[number], depth, turned)
        number += 1


def trees(branches: Branches) -> list[Branches]:
    """The trees that follow one another in a row, each with parents counted from its own first branch."""
    starts = [number for number, branch in enumerate(branches) if branch.parent < 0]
    return [
        tuple(Branch(size, max(-1, parent - start)) for size, parent in branches[start:stop])
        for start, stop in zip(starts, [*starts[1:], len(branches)], strict=True)
    ]


def leaves(branches: Branches) -> list[Int[Tensor, " L"]]:
    """Where the tokens of every sequence stand that ends where nothing goes on from."""
    ends = [0, *accumulate(branch.size for branch in branches)]
    paths: list[Tensor] = []
    for number, (_, parent) in enumerate(branches):
        own = torch.arange(ends[number], ends[number + 1])
        paths.append(own if parent < 0 else torch.cat([paths[parent], own]))
    inner = {parent for _, parent in branches}
    return [path for number, path in enumerate(paths) if number not in inner]


def longest_sequence(branches: Branches) -> int:
    """Tokens of the longest sequence of a row."""
    ends: list[int] = []
    for size, parent in branches:
        ends.append(size + (ends[parent] if parent >= 0 else 0))
    return max(ends)
