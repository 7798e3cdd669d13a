"""What is held out, and which completions stay."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from align.data.schema import Row
from align.data.select import hold_out as held_out
from align.data.select import prompt_digest, reduce_row


def make(prompt, grades=(1.0, 0.0), id="x"):
    completions = tuple(f"c{k}" for k in range(len(grades)))
    return Row(id, prompt, completions, tuple(grades), None, {}, "rows.jsonl", 1)


def hold_out(rows, fraction, seed):
    digests = np.array([prompt_digest(row.prompt, seed) for row in rows], dtype="S16")
    held = held_out(digests, fraction)
    return [row for row, own in zip(rows, held, strict=True) if not own], [
        row for row, own in zip(rows, held, strict=True) if own
    ]


ROWS = [make(f"p{n % 20}", id=str(n)) for n in range(60)]


def test_no_prompt_is_on_both_sides_and_no_row_is_lost():
    train, held = hold_out(ROWS, 0.25, seed=3)
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    assert len({row.prompt for row in held}) == 5  # 0.25 of 20 prompts
    assert sorted(row.id for row in train + held) == sorted(row.id for row in ROWS)


def test_same_messages_in_another_key_order_are_the_same_prompt():
    one = make([{"role": "user", "content": "a"}], id="1")
    other = make([{"content": "a", "role": "user"}], id="2")
    for seed in range(8):
        train, held = hold_out([one, other, make("b"), make("c")], 0.5, seed)
        assert (one in train) == (other in train) and (one in held) == (other in held)


def test_held_out_prompts_follow_from_the_seed_alone():
    held = {row.prompt for row in hold_out(ROWS, 0.25, seed=3)[1]}
    assert {row.prompt for row in hold_out(ROWS[::-1], 0.25, seed=3)[1]} == held
    assert any({row.prompt for row in hold_out(ROWS, 0.25, seed)[1]} != held for seed in (4, 5))


@pytest.mark.parametrize(("fraction", "prompts"), [(0.0, 0), (0.001, 1), (0.999, 19)])
def test_extreme_fractions(fraction, prompts):
    assert len({row.prompt for row in hold_out(ROWS, fraction, seed=0)[1]}) == prompts


def test_a_single_prompt_is_trained_on():
    assert hold_out([make("p")], 0.5, seed=0) == ([make("p")], [])


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_digests_are_held_out(seed):
    """The definition, written out over the prompts' whole digests; a digest may end with zero bytes."""
    prompts = [f"p{n % 300}" for n in range(700)]
    order = sorted(set(prompts), key=lambda own: hashlib.sha256(f'{seed} "{own}"'.encode()).digest())
    held = {row.prompt for row in hold_out([make(own) for own in prompts], 0.3, seed)[1]}
    assert held == set(order[:90])


def test_best_worst():
    row = replace(make("p", (0.2, 0.9, 0.5, 0.1)), rewards=(2.0, 9.0, 5.0, 1.0))
    pair = reduce_row(row, select="best_worst", list_size=None, seed=0)
    assert (pair.completions, pair.grades, pair.rewards) == (("c1", "c3"), (0.9, 0.1), (9.0, 1.0))


def test_best_alone():
    row = reduce_row(make("p", (0.2, 0.9, 0.5)), select="best", list_size=None, seed=0)
    assert (row.completions, row.grades) == (("c1",), (0.9,))


def test_list_size_keeps_best_and_worst_and_varies_the_others():
    row = make("p", (3.0, 9.0, 4.0, 1.0, 5.0, 6.0))
    kept = [reduce_row(row, select="all", list_size=4, seed=seed) for seed in range(30)]
    for reduced in kept:
        assert len(reduced.completions) == 4 and {9.0, 1.0} < set(reduced.grades)
        assert list(reduced.completions) == sorted(reduced.completions)  # their own order
        assert reduced.grades == tuple(row.grades[row.completions.index(c)] for c in reduced.completions)
    assert {c for reduced in kept for c in reduced.completions} == set(row.completions)


def test_small_lists_stay_as_they_are():
    row = make("p", (0.0, 1.0))
    assert reduce_row(row, select="best_worst", list_size=None, seed=0) is row
    assert reduce_row(row, select="all", list_size=2, seed=0) is row
    assert reduce_row(row, select="all", list_size=None, seed=0) is row


def test_ties_are_broken_by_seed_and_id_and_repeatably():
    tied = make("p", (1.0, 1.0, 0.0, 0.0))
    choices = [reduce_row(tied, select="best_worst", list_size=None, seed=seed).completions for seed in range(20)]
    assert len(set(choices)) == 4
    assert choices == [
        reduce_row(tied, select="best_worst", list_size=None, seed=seed).completions for seed in range(20)
    ]
    others = [replace(tied, id=str(n)) for n in range(20)]
    assert len({reduce_row(row, select="best_worst", list_size=None, seed=0).completions for row in others}) == 4


def test_all_tied_keeps_two_different_completions():
    row = reduce_row(make("p", (1.0, 1.0, 1.0)), select="best_worst", list_size=None, seed=0)
    assert len(set(row.completions)) == 2


def test_sampled_ids_stay_with_their_completions():
    row = replace(make("p", (0.2, 0.9, 0.5, 0.1)), prompt_ids=[1], completion_ids=([3], [4], [5], [6]))
    pair = reduce_row(row, select="best_worst", list_size=None, seed=0)
    assert (pair.completions, pair.completion_ids) == (("c1", "c3"), ([4], [6]))
