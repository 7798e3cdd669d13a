"""Benchmarks: those that are named are there; what `load` compares is the same, and a difference is an error."""

import os
import re
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from align.bench import load
from align.bench.__main__ import names

ROOT = Path(__file__).parents[2]
OURS = {"id": ["1", "2"], "prompt_ids": [[5, 6], [5]], "completion_ids": [[[7], [8, 9]], [[7], [8]]]}
TRL = {"id": [1, 2], "prompt_ids": [[5, 6], [5]], "chosen_ids": [[7], [7]], "rejected_ids": [[8, 9], [8]]}


@pytest.fixture
def lists(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load._read(load.LISTS / "heldout.jsonl.gz")[:12]


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "data/benchmarks/README.md"])
def test_every_benchmark_that_a_page_names_is_there(page):
    named = set(re.findall(r"python -m align\.bench ([a-z]\w*)", (ROOT / page).read_text(encoding="utf-8")))
    assert named
    assert named <= set(names())


def test_pairs_are_the_better_half_against_the_worse():
    row = {"id": "a", "prompt": "p", "completions": list("stuvwxyz"), "rewards": [3, 1, 4, 1.5, 9, 2, 6, 5]}
    pairs = load.story_pairs([row])
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(c, r) for c in "wyzu" for r in "sxvt"]
    assert len({p["id"] for p in pairs}) == 16
    assert len(load.story_pairs([row | {"completions": list("sssssssz")}])) == 4  # z, the third best, against s


def test_equal_rows_are_counted_and_those_of_one_side():
    ours = Dataset.from_dict(OURS)
    assert load.agreement(ours, Dataset.from_dict(TRL)) == {
        "rows_equal": 2,
        "completion_tokens_equal": 5,
        "rows_kept_by_align_alone": 0,
        "rows_kept_by_trl_alone": 0,
    }
    fewer = load.agreement(ours.select([1]), Dataset.from_dict(TRL))
    assert (fewer["rows_equal"], fewer["rows_kept_by_trl_alone"]) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [{"chosen_ids": [[7], [9]]}, {"rejected_ids": [[8], [8]]}, {"prompt_ids": [[5], [5]], "chosen_ids": [[6, 7], [7]]}],
    ids=["another token", "a token less", "another boundary"],
)
def test_a_difference_is_an_error_that_names_the_row(other):
    with pytest.raises(ValueError, match="token ids of 1 rows differ from TRL's, the first is [12]"):
        load.agreement(Dataset.from_dict(OURS), Dataset.from_dict(TRL | other))


def test_trls_ids_are_cut_where_its_collator_cuts(monkeypatch):
    monkeypatch.setattr(load, "MAX_LENGTH", 3)
    longer = TRL | {"rejected_ids": [[8, 9], [8, 9, 9]]}
    ours = OURS | {"completion_ids": [[[7], [8]], [[7], [8, 9]]]}
    assert load.agreement(Dataset.from_dict(ours), Dataset.from_dict(longer))["completion_tokens_equal"] == 5


def test_both_sides_make_the_same_of_shipped_rows(lists, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_apart", lambda function, *arguments: function(*arguments))
    pairs = load.story_pairs(lists)
    result = load.measure(pairs, tmp_path / "pairs", beside=True, rounds=1)
    assert result["rows_equal"] == result["rows"] == len(pairs)
    assert set(result["implementations"]) == {"align", "align, cached", "trl", "trl, cached", load.ALONE}
    assert datasets.is_caching_enabled()


def test_both_sides_make_the_same_of_conversations(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(load, "_apart", lambda *_: 0)
    chats = load._read(shared_data / "chat_pairs_demo" / "pairs.jsonl.gz")[-20:]
    result = load.measure([load._chat_pair(row) for row in chats], tmp_path / "chats", beside=True, rounds=1)
    assert 0 < result["rows_equal"] == result["rows"] - result["refused"]["prompt fills max_length"]
    assert (result["rows_kept_by_align_alone"], result["rows_kept_by_trl_alone"]) == (0, 0)


def test_both_sides_make_the_same_of_answers_of_several_turns(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(load, "_apart", lambda *_: 0)
    monkeypatch.setattr(load, "MAX_LENGTH", 100_000)
    chats = load._read(shared_data / "chat_pairs_demo" / "pairs.jsonl.gz")
    rows = [load._trajectory(row) for row in chats if len(row["messages"]) > 2][:10]
    result = load.measure(rows, tmp_path / "chats", beside=True, rounds=1)
    assert all(len(row["chosen"]) > 1 for row in rows)
    assert result["rows_equal"] == result["rows"] == 10


def test_memory_is_measured_in_a_process_of_its_own():
    assert load._apart(os.getpid) != os.getpid()


def test_a_cached_run_tokenises_nothing(lists, tmp_path, monkeypatch):
    import align.data.tokenize as module

    batches, original = [], module.tokenize_batch
    monkeypatch.setattr(module, "tokenize_batch", lambda *a, **options: batches.append(1) or original(*a, **options))
    monkeypatch.setattr(load, "_apart", lambda *a: 0)
    load.measure(lists, tmp_path / "lists", beside=False, rounds=2)
    cold = 1 + 1 + 2  # the check, then a warm-up and two rounds
    assert len(batches) == cold + 1  # cached: the first time only
