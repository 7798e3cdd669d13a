"""Tries of token sequences: every sequence is in the row, what is shared stands once, and who sees whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.data.steps import packed_size
from align.packing import packed_collate
from align.packing.flash import parts
from align.packing.trie import PAYS, grow

tokens = st.integers(0, 1)
lists = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1)),
    min_size=1,
    max_size=3,
)


def told(lists):
    """Sequences and their groups."""
    return [[*prompt, *own] for prompt, all_own in lists for own in all_own], [
        number for number, (_, all_own) in enumerate(lists) for _ in all_own
    ]


@given(lists, st.integers(1, 8))
def test_every_sequence_is_in_the_row_and_sees_itself_alone(lists, pays):
    sequences, groups = told(lists)
    trie = grow(sequences, groups, pays=pays)
    wanted = torch.zeros(len(trie.tokens), len(trie.tokens), dtype=torch.int)
    for ids, rows in zip(sequences, trie.rows, strict=True):
        assert [trie.tokens[row] for row in rows] == ids
        assert trie.positions[rows].tolist() == list(range(len(ids)))
        wanted[rows[:, None], rows] = torch.ones(len(ids), len(ids), dtype=torch.int).tril()
    # Every pair of tokens is computed by one part, and no other pair is.
    seen = torch.zeros_like(wanted)
    for part in parts(trie.branches):
        for queries, keys in zip(blocks(part.queries, part.blocks), blocks(part.keys, part.blocks), strict=True):
            pairs = torch.ones(len(queries), len(keys), dtype=torch.int)
            seen[queries[:, None], keys] += pairs.tril() if part.causal else pairs
    assert torch.equal(seen, wanted)


def blocks(rows, count):
    return torch.arange(rows.start, rows.stop).unflatten(0, (count, -1))


@given(lists)
def test_where_every_fork_pays_the_row_is_all_distinct_beginnings(lists):
    sequences, groups = told(lists)
    beginnings = {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}
    assert len(grow(sequences, groups, pays=1).tokens) == len(beginnings)


@given(lists, st.integers(1, 8))
def test_a_row_has_no_more_than_prompts_once_and_completions(lists, pays):
    trie = grow(*told(lists), pays=pays)
    assert len(trie.tokens) <= sum(len(prompt) + sum(map(len, own)) for prompt, own in lists)


@pytest.mark.parametrize("shared", [PAYS - 1, PAYS])
def test_completions_fork_where_it_pays(shared):
    common = list(range(10, 10 + shared))
    example = {
        "prompt_ids": [1, 2],
        "completion_ids": [[*common, 5, 6], [*common, 7], [8]],
        "grades": [2.0, 1.0, 0.0],
    }
    saved = shared if shared >= PAYS else 0
    assert packed_collate([example]).input_ids.numel() == packed_size(example) - saved


def test_lists_share_what_their_prompts_begin_with():
    system = list(range(10, 10 + PAYS))
    lists = [{"prompt_ids": [*system, n], "completion_ids": [[5], [6, 7]], "grades": [1.0, 0.0]} for n in range(3)]
    assert packed_collate(lists).input_ids.numel() == sum(map(packed_size, lists)) - 2 * PAYS
