"""How lists lie in a packed row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from align.data.steps import micro_batches, packed_size
from align.packing import packed_collate
from align.packing.batch import collate


def test_every_completion_reads_as_its_own_sequence(ragged):
    """Of every target the position that predicts it, and that one's place in its sequence."""
    batch = packed_collate(ragged)
    row, positions = batch.input_ids[0], batch.position_ids[0]
    n = 0
    for example in ragged:
        prompt = example["prompt_ids"]
        for ids in example["completion_ids"]:
            assert batch.targets[n][batch.targets[n] >= 0].tolist() == ids
            at = batch.predict_at[n, : len(ids)]
            assert row[at].tolist() == [prompt[-1], *ids[:-1]]
            assert positions[at].tolist() == list(range(len(prompt) - 1, len(prompt) + len(ids) - 1))
            assert row[batch.ends_at[n]] == ids[-1]
            n += 1


def test_all_but_the_rows_is_as_in_a_padded_batch(ragged):
    for example in ragged:
        example["reference_logprobs"] = [[-0.5 * token for token in ids] for ids in example["completion_ids"]]
    packed, padded = packed_collate(ragged), collate(ragged, pad_id=0)
    for name in ("targets", "list_index", "slot", "grades", "list_mask", "reference_logprobs"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name


examples = st.lists(
    st.builds(
        lambda p, sizes: {"prompt_ids": [0] * p, "completion_ids": [[0] * n for n in sizes]},
        st.integers(1, 20),
        st.lists(st.integers(1, 20), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=12,
)


@given(examples, st.integers(1, 200))
def test_packed_batches_keep_every_list_and_the_budget(lists, budget):
    batches = micro_batches(lists, tokens_per_batch=budget, packed=True)
    assert sorted(id(e) for batch in batches for e in batch) == sorted(map(id, lists))
    sizes = [sum(map(packed_size, batch)) for batch in batches]
    assert all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert sum(2 * size <= budget for size in sizes) <= 1  # two batches half empty would have been one


def test_what_is_counted_is_the_prompt_once():
    one = {"prompt_ids": [0] * 10, "completion_ids": [[0] * 3, [0] * 2]}
    assert [len(batch) for batch in micro_batches([one] * 4, tokens_per_batch=30, packed=True)] == [2, 2]
    assert [len(batch) for batch in micro_batches([one] * 4, tokens_per_batch=29, packed=True)] == [1, 1, 1, 1]


def test_lists_with_one_system_prompt_meet_in_a_batch_and_it_is_counted_once():
    """Each of two system prompts 200 tokens, 50 of a user and of the completions: (450 - 200) / 50 lists a batch."""
    lists = [
        {"prompt_ids": [n % 2] * 200 + [2 + n] * 20, "completion_ids": [[7] * 20, [8] * 10], "grades": [1.0, 0.0]}
        for n in range(20)
    ]
    batches = micro_batches(lists, tokens_per_batch=450, packed=True)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5]
    assert [{example["prompt_ids"][0] for example in batch} for batch in batches] == [{0}, {0}, {1}, {1}]
    assert [packed_collate(batch).input_ids.numel() for batch in batches] == [450] * 4
