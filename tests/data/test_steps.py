"""Which lists a step takes, and how it is cut."""

import gzip
import json
from collections import Counter
from itertools import product
from operator import itemgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.steps import (
    Cost,
    StepLists,
    balanced_shares,
    cut_further,
    list_parts,
    micro_batches,
    packed_size,
    part_of_list,
    plan_steps,
    width,
)
from align.errors import UserError


def plan(weights, **options):
    return plan_steps(weights, **{"lists_per_step": 4, "epochs": 1, "steps": None, "seed": 0} | options)


def test_an_epoch_takes_every_list_once_and_the_last_step_is_smaller():
    steps = plan([1.0] * 10)
    assert [len(rows) for rows in steps] == [4, 4, 2]
    assert sorted(row for rows in steps for row in rows) == list(range(10))


def test_weights_are_how_often_a_list_is_taken():
    counts = Counter(row for rows in plan([2.0, 1.0, 0.25], epochs=400) for row in rows)
    assert counts[0] == 800 and counts[1] == 400
    assert 60 < counts[2] < 140  # 400 draws of a quarter: four standard deviations of 8.7


def test_weights_that_take_nothing_are_refused():
    with pytest.raises(UserError, match="data.sources: with these weights no list is taken in 1 epochs"):
        plan([1e-6] * 4)
    assert len(plan([1e-2] * 4, steps=3)) == 3


def test_steps_take_the_place_of_epochs_and_part_of_an_epoch_is_a_part():
    assert [len(rows) for rows in plan([1.0] * 10, steps=7)] == [4] * 7
    assert sum(map(len, plan([1.0] * 10, epochs=1.5))) == 15


def test_the_order_follows_from_the_seed_and_differs_between_epochs():
    assert plan([1.0] * 50, seed=1) == plan([1.0] * 50, seed=1) != plan([1.0] * 50, seed=2)
    order = [row for rows in plan([1.0] * 50, epochs=2) for row in rows]
    assert order[:50] != order[50:]


def test_processes_share_a_step_without_overlap():
    lists = [{"id": i, "prompt_ids": [0] * (1 + i**2), "completion_ids": [[0], [0] * i]} for i in range(10)]
    shares = [StepLists(lists, plan([1.0] * 10), rank=rank, world_size=3) for rank in range(3)]
    for step, rows in enumerate(plan([1.0] * 10)):
        taken = [example["id"] for share in shares for example in share[step]]
        assert sorted(taken) == sorted(rows)


def test_the_draws_of_a_list_follow_from_its_row_and_the_step_alone():
    """Not from the number of processes; a row that a step has twice draws twice."""
    lists = [{"id": f"r{i}", "prompt_ids": [0], "completion_ids": [[0] * (1 + i % 3)]} for i in range(6)]
    steps = [[0, 1, 2, 3], [0, 4, 5, 0]]

    def keys(world: int, step: int) -> list[tuple[str, int]]:
        shares = [StepLists(lists, steps, rank=rank, world_size=world)[step] for rank in range(world)]
        return sorted((example["id"], example["key"]) for share in shares for example in share)

    assert keys(1, 0) == keys(2, 0) == keys(3, 0) and keys(1, 1) == keys(3, 1)
    found = [key for step in (0, 1) for _, key in keys(1, step)]
    assert len(set(found)) == 8, "another step, row or repeat, another draw"


def test_shares_are_balanced_by_tokens():
    lists = [{"prompt_ids": [0] * n, "completion_ids": [[0]]} for n in (1, 50, 2, 48, 3, 49, 1, 1)]
    loads = [sum(map(packed_size, share)) for share in balanced_shares(lists, 3, packed_size)]
    assert sum(loads) == sum(map(packed_size, lists))
    assert max(loads) - min(loads) <= 3


@given(st.lists(st.integers(1, 60), min_size=0, max_size=7), st.integers(1, 3))
def test_the_costliest_share_is_near_the_best_that_any_deal_gives(sizes, count):
    """Against every deal there is: at most a third less than 4/3 of the best, as for the costliest first (Graham)."""
    lists = [{"id": i, "size": size} for i, size in enumerate(sizes)]
    shares = balanced_shares(lists, count, itemgetter("size"))
    assert sorted(e["id"] for share in shares for e in share) == list(range(len(lists))) and len(shares) == count

    def costliest(places):
        return max(sum(size for size, place in zip(sizes, places, strict=True) if place == p) for p in range(count))

    best = min(map(costliest, product(range(count), repeat=len(sizes))))
    assert max(sum(e["size"] for e in share) for share in shares) <= (4 / 3 - 1 / (3 * count)) * best


def test_a_list_costs_its_tokens_its_attention_and_the_head():
    """Each pair of a token and one it sees, half of one for itself; padded, the prompt is read for every completion."""
    example = {"prompt_ids": [0] * 4, "completion_ids": [[0] * 2, [0] * 6]}
    prompt, first, second = 4 * 4 / 2, 2 * 4 + 2 * 2 / 2, 6 * 4 + 6 * 6 / 2
    assert Cost(pair=0.5, head=2.0, packed=True).of(example) == 4 + 8 + 2 * 8 + 0.5 * (prompt + first + second)
    assert Cost(pair=0.5, head=2.0, packed=False).of(example) == 8 + 8 + 2 * 8 + 0.5 * (2 * prompt + first + second)


@pytest.mark.parametrize("packed", [True, False])
def test_real_lists_leave_hardly_a_process_waiting(shared_data, packed):
    """Ranked answers of `../shared/data`, a token for four characters: steps of 32 over four processes."""
    with gzip.open(shared_data / "oasst_ranked/lists.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    prompts = ["".join(message["content"] for message in row["messages"]) for row in rows]
    answers = [[[0] * max(1, len(item["text"]) // 4) for item in row["items"]] for row in rows]
    lists = [{"prompt_ids": [0] * (len(p) // 4), "completion_ids": a} for p, a in zip(prompts, answers, strict=True)]
    cost = Cost(pair=1 / (6 * 896), head=151936 / (12 * 896 * 24), packed=packed).of
    for start in range(0, 128, 32):
        loads = [sum(map(cost, share)) for share in balanced_shares(lists[start : start + 32], 4, cost)]
        assert 1 - sum(loads) / 4 / max(loads) < 0.02


def test_a_list_over_the_budget_is_cut_by_completions():
    example = {"prompt_ids": [0] * 4, "completion_ids": [[0] * n for n in (3, 9, 5, 2)], "grades": [0.0, 1.0, 2.0, 3.0]}
    assert list_parts(example, 23) == [[0, 1, 2, 3]]
    parts = list_parts(example, 14)
    assert sorted(place for part in parts for place in part) == [0, 1, 2, 3]
    assert all(packed_size(part_of_list(example, part)) <= 14 for part in parts) and len(parts) == 2
    assert list_parts(example, 1) == [[1], [2], [0], [3]]
    assert part_of_list(example, [2, 0]) == {
        "prompt_ids": [0] * 4,
        "completion_ids": [[0] * 5, [0] * 3],
        "grades": [2.0, 0.0],
    }


examples = st.lists(
    st.builds(
        lambda p, sizes: {"prompt_ids": [0] * p, "completion_ids": [[0] * n for n in sizes]},
        st.integers(1, 20),
        st.lists(st.integers(1, 20), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=12,
)


@given(examples, st.integers(1, 200), st.integers(1, 12))
def test_micro_batches_keep_every_list_and_the_budget(lists, budget, count):
    batches = micro_batches(lists, tokens_per_batch=budget)
    assert sorted(id(e) for batch in batches for e in batch) == sorted(map(id, lists))
    for batch in batches:
        cells = sum(len(e["completion_ids"]) for e in batch) * max(map(width, batch))
        assert cells <= budget or len(batch) == 1
    further = cut_further(batches, count)
    assert len(further) == max(len(batches), min(count, len(lists)))
    assert sorted(id(e) for batch in further for e in batch) == sorted(map(id, lists))


def test_lists_of_like_length_share_a_batch():
    lists = [{"prompt_ids": [0], "completion_ids": [[0] * n]} for n in (1, 50, 2, 49)]
    batches = micro_batches(lists, tokens_per_batch=102)
    assert [[width(e) for e in batch] for batch in batches] == [[2, 3], [50, 51]]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_list_is_never_split(k):
    one = {"prompt_ids": [0] * 10, "completion_ids": [[0] * 10] * k}
    assert micro_batches([one], tokens_per_batch=1) == [[one]]
