"""Lists of which some tokens are learnt and the others only read: how they lie in rows, are cut, are known again."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.data.boundary import Tokens, fit
from align.data.steps import list_parts, packed_size, part_of_list
from align.model.value_cache import list_key
from align.packing import packed_collate
from align.packing.batch import collate

COLLATE = {"padded": lambda lists: collate(lists, pad_id=0), "packed": packed_collate}
PLAIN = Tokens(prefix=(), suffix=(), bos=1, eos=2, ends=frozenset({2}), specials=(), tags=())


@pytest.fixture
def trajectories(ragged):
    """Every other token is learnt, from the first or the second on; the first alone of a completion of one."""
    for example in ragged:
        sizes = map(len, example["completion_ids"])
        example["learn_at"] = [list(range(k % 2, n, 2)) or [0] for k, n in enumerate(sizes)]
    return ragged


@pytest.mark.parametrize("kind", COLLATE)
def test_targets_are_the_learnt_tokens_and_are_predicted_by_what_stands_before_them(trajectories, kind):
    batch = COLLATE[kind](trajectories)
    row = batch.input_ids.flatten().tolist()
    width = batch.input_ids.shape[1]
    places = torch.arange(len(row)) % width if batch.position_ids is None else batch.position_ids.flatten()
    n = 0
    for example in trajectories:
        prompt = example["prompt_ids"]
        for ids, at in zip(example["completion_ids"], example["learn_at"], strict=True):
            assert batch.targets[n].tolist() == [ids[p] for p in at] + [-1] * (batch.targets.shape[1] - len(at))
            found = batch.predict_at[n, : len(at)].tolist()
            assert [row[f] for f in found] == [([*prompt, *ids])[len(prompt) + p - 1] for p in at]
            assert places[found].tolist() == [len(prompt) + p - 1 for p in at]
            assert row[batch.ends_at[n]] == ids[-1] and places[batch.ends_at[n]] == len(prompt) + len(ids) - 1
            n += 1
    assert n == len(batch.targets)


@pytest.mark.parametrize("kind", COLLATE)
def test_where_everything_is_learnt_the_batch_is_the_one_without_the_column(ragged, kind):
    every = [e | {"learn_at": [list(range(len(ids))) for ids in e["completion_ids"]]} for e in ragged]
    own, plain = COLLATE[kind](every), COLLATE[kind](ragged)
    for name in (field.name for field in fields(plain)):
        a, b = getattr(own, name), getattr(plain, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@pytest.mark.parametrize("kind", COLLATE)
def test_numbers_of_tokens_stand_beside_the_learnt_ones(trajectories, kind):
    for example in trajectories:
        example["token_weights"] = [[100.0 * k + p for p in at] for k, at in enumerate(example["learn_at"])]
    batch = COLLATE[kind](trajectories)
    assert batch.token_weights.shape == batch.targets.shape
    expected = [values for example in trajectories for values in example["token_weights"]]
    assert [row[m].tolist() for row, m in zip(batch.token_weights, batch.completion_mask, strict=True)] == expected
    assert not batch.token_weights[~batch.completion_mask].any()


def test_a_part_of_a_list_has_its_completions_places_and_costs_what_is_read(trajectories):
    example = trajectories[3]
    part = part_of_list(example, [5, 1])
    assert part["learn_at"] == [example["learn_at"][5], example["learn_at"][1]]
    assert packed_size(example) == len(example["prompt_ids"]) + sum(map(len, example["completion_ids"]))
    whole = {name: value for name, value in example.items() if name != "learn_at"}
    assert list_parts(example, 12) == list_parts(whole, 12)


lengths = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@given(lengths, st.integers(1, 6), st.integers(2, 12), st.sampled_from(["truncate", "drop_completion"]), st.data())
def test_a_cut_keeps_the_learnt_tokens_that_are_left_with_their_numbers(sizes, prompt, room, overlong, data):
    completions = [list(range(10 * k, 10 * k + n)) for k, n in enumerate(sizes)]
    places = [sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))) for n in sizes]
    weights = [[float(completions[k][p]) for p in at] for k, at in enumerate(places)]
    options = {"max_length": prompt + room, "max_prompt_length": None, "overlong": overlong, "special": PLAIN}
    grades = [float(k) for k in range(len(sizes))]
    found = fit([1] * prompt, completions, grades, **options, learn_at=places, token_weights=weights)
    expected = {}
    for k, ids in enumerate(completions):
        at = [p for p in places[k] if p < room]
        if at and not (overlong == "drop_completion" and len(ids) > room):
            expected[k] = (ids[:room], at, [float(ids[p]) for p in at])
    assert found["kept"] == list(expected) and found["dropped"] == len(sizes) - len(expected)
    columns = (found["completion_ids"], found["learn_at"], found["token_weights"])
    assert list(zip(*columns, strict=True)) == list(expected.values())
    assert found["grades"] == [float(k) for k in expected]


def test_a_list_that_is_refused_has_no_place_left():
    options = {"max_prompt_length": None, "overlong": "truncate", "special": PLAIN}
    found = fit([1, 1], [[3], [4]], [0.0, 1.0], max_length=2, learn_at=[[0], [0]], **options)
    assert found["refused"] and found["completion_ids"] == []


def test_a_list_is_known_by_what_is_learnt_of_it():
    ids = ([1, 2], [[3, 4, 5], [6]])
    every = [[0, 1, 2], [0]]
    assert list_key(*ids, every) == list_key(*ids)  # the same values, which a cache may hold from before
    keys = {list_key(*ids), list_key(*ids, [[0, 2], [0]]), list_key(*ids, [[0, 1], [0]]), list_key(*ids, [[0], [0]])}
    assert len(keys) == 4
    assert list_key([1], [[2, 5], [3], [0], [0]]) != list_key([1], [[2, 5], [3]], [[0], [0]])  # places are not tokens
