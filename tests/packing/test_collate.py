"""How lists lie in a packed row."""

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st

from align.data.steps import micro_batches, packed_size
from align.packing import packed_collate
from align.packing.batch import collate


def test_every_completion_reads_as_its_own_sequence(ragged):
    """The row's tokens that a target's position may see, in order, are the prompt and the completion up to there."""
    batch = packed_collate(ragged)
    row, positions = batch.input_ids[0], batch.position_ids[0]
    n, start = 0, 0
    for example, sizes in zip(ragged, batch.segments, strict=True):
        stops = list(accumulate(sizes, initial=start))
        prompt = example["prompt_ids"]
        assert row[start : stops[1]].tolist() == prompt
        for ids in example["completion_ids"]:
            assert batch.targets[n][batch.targets[n] >= 0].tolist() == ids
            at = batch.predict_at[n, : len(ids)].tolist()
            assert at[0] == stops[1] - 1
            assert [row[p].item() for p in at[1:]] == ids[:-1]
            assert positions[at].tolist() == list(range(len(prompt) - 1, len(prompt) + len(ids) - 1))
            n += 1
        start = stops[-1]
    assert start == len(row) == sum(map(packed_size, ragged))


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
