"""The cache of reference log-probabilities: what it holds, when it is used, and when it is not."""

import hashlib
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file, save_file

from align.model import identity, reference, value_cache
from align.model.adapters import Full, Lora, Olora, Pissa
from align.model.config import PolicySection
from align.model.forward import TokenScorer
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.model.reference import flat_values, read_lists
from align.model.token_rewards import with_token_column
from align.packing.batch import collate


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(8)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 40, (length,), generator=generator).tolist()

    sizes = [2 + i % 3 for i in range(20)]
    return [
        {"prompt_ids": ids(1, 6), "completion_ids": [ids(1, 8) for _ in range(k)], "grades": [1.0] * k} for k in sizes
    ]


@pytest.fixture
def counted(monkeypatch):
    """Completions that went through a model since the last look."""
    seen = []
    forward = TokenScorer.forward
    monkeypatch.setattr(TokenScorer, "forward", lambda self, b, *a: seen.append(len(b.targets)) or forward(self, b, *a))

    def look():
        total = sum(seen)
        seen.clear()
        return total

    return look


@pytest.fixture
def attach(model_folder, tmp_path):
    """Lists with the column `reference_logprobs`, by the tiny model, into one folder."""

    def attach(rows, policy=None, tokens_per_batch=60, **options):
        policy = policy or load_policy(PolicySection(model=str(model_folder), adapter=Lora(rank=2)))
        lists = Dataset.from_list(rows)
        options = {"cache_dir": tmp_path / "cache", "tokens_per_batch": tokens_per_batch} | options
        stored = read_lists(lists, policy, **options)["logprobs"]
        return with_token_column(lists, "reference_logprobs", flat_values(lists, stored)).to_list()

    return attach


def completions(rows):
    return sum(len(row["completion_ids"]) for row in rows)


def live(policy, rows):
    """Computed one list at a time, in order."""
    values = []
    for row in rows:
        batch = collate([{k: row[k] for k in ("prompt_ids", "completion_ids", "grades")}], pad_id=0)
        with policy.reference():
            logprobs = TokenScorer(policy)(batch).logprobs
        values.append([own[mask].tolist() for own, mask in zip(logprobs, batch.completion_mask, strict=True)])
    return values


def test_the_column_is_what_the_reference_says_live(attach, model_folder, data):
    for adapter in (Lora(rank=2), Pissa(rank=2), Full()):
        policy = load_policy(PolicySection(model=str(model_folder), adapter=adapter))
        for name, parameter in policy.model.named_parameters():
            if "lora_B.default" in name:  # the policy has moved, the reference has not
                torch.nn.init.normal_(parameter)
        for rows in (attach(data, policy), attach(data, policy)):
            for row, expected in zip(rows, live(policy, data), strict=True):
                for cached, own in zip(row["reference_logprobs"], expected, strict=True):
                    assert cached == pytest.approx(own, abs=2e-6)
        batch = collate(rows, pad_id=0)
        with policy.reference():
            now = TokenScorer(policy)(batch).logprobs
        torch.testing.assert_close(batch.reference_logprobs, now, atol=1e-5, rtol=1e-5)


def test_it_is_computed_once_and_a_few_lists_are_looked_at_again(attach, data, counted):
    first = attach(data)
    assert counted() == completions(data)
    second = attach(data, tokens_per_batch=1000)
    assert 0 < counted() <= 3 * 4
    assert first == second


def test_changed_lists_alone_are_computed(attach, data, counted):
    attach(data)
    counted()
    cut = [row | {"completion_ids": [ids[:3] for ids in row["completion_ids"]]} for row in data]
    changed = [new for new, old in zip(cut, data, strict=True) if new != old]
    assert 0 < len(changed) < len(data)
    attach(cut)
    assert completions(changed) < counted() <= completions(changed) + 3 * 4
    other_prompts = [row | {"prompt_ids": [5, *row["prompt_ids"]]} for row in data]
    attach(other_prompts)
    assert counted() == completions(data)


def test_the_boundary_between_prompt_and_completion_is_part_of_the_key():
    keys = {
        value_cache.list_key([1, 2], [[3, 4], [5]]),
        value_cache.list_key([1], [[2, 3, 4], [5]]),
        value_cache.list_key([1, 2], [[3], [4, 5]]),
        value_cache.list_key([1, 2], [[3, 4, 5]]),
        value_cache.list_key([1, 2], [[5], [3, 4]]),
    }
    assert len(keys) == 5


@pytest.mark.parametrize("what", ["base", "dtype", "attention", "precision", "torch", "transformers", "backend"])
def test_all_that_the_values_depend_on_is_part_of_the_key(
    attach, model_folder, data, counted, what, monkeypatch, tmp_path
):
    attach(data)
    counted()
    section, options = {}, {}
    match what:
        case "base":
            model_folder = moved_copy(model_folder, tmp_path)
        case "dtype":
            section = {"dtype": "bfloat16"}
        case "attention":
            section = {"attention": "eager"}
        case "precision":
            options = {"precision": "bfloat16"}
        case "backend":
            monkeypatch.setattr(identity, "BACKEND", "another")
        case _:
            monkeypatch.setattr(getattr(identity, what), "__version__", "2.99.0")
    policy = load_policy(PolicySection(model=str(model_folder), adapter=Lora(rank=2), **section))
    attach(data, policy, **options)
    assert counted() == completions(data)


def moved_copy(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_the_values_do_not_depend_on_reuses_them(attach, model_folder, data, counted, tmp_path):
    attach(data)
    counted()
    for adapter in (Lora(rank=4, dropout=0.5), Full()):
        policy = load_policy(PolicySection(model=str(model_folder), adapter=adapter), LoadOptions(seed=3))
        attach([row | {"grades": [0.5] * len(row["grades"])} for row in reversed(data)], policy)
        assert counted() <= 3 * 4
    start = tmp_path / "start"
    load_policy(PolicySection(model=str(model_folder), adapter=Olora(rank=2))).save_adapter(start)
    attach(data, load_policy(PolicySection(model=str(model_folder), start_adapter=str(start))))
    assert counted() == completions(data), "another reference: the start adapter"
    attach(data, load_policy(PolicySection(model=str(model_folder), start_adapter=str(start))))
    assert counted() <= 3 * 4


def test_parts_that_were_finished_before_a_kill_are_kept(attach, data, counted, monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "SHARD_VALUES", 40)
    write, written = value_cache._write, []

    def killed(folder, part):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(part))
        write(folder, part)

    monkeypatch.setattr(value_cache, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        attach(data)
    counted()
    monkeypatch.setattr(value_cache, "_write", write)
    rows = attach(data)
    assert 0 < counted() < completions(data)
    assert rows == attach(data, cache_dir=tmp_path / "another")
    assert not list(tmp_path.rglob("*.tmp"))


def change_every_value(folder: Path, by: float) -> None:
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        tensors["values"] += by
        save_file(tensors, file)
        file.rename(file.with_stem(hashlib.sha256(file.read_bytes()).hexdigest()))  # as a wrong machine would write it


def test_a_part_that_another_process_removes_meanwhile_is_computed_again(tmp_path):
    """As where several find the same part damaged: the last to read it does not find it."""
    cache = value_cache.ValueCache(tmp_path, ["logprobs"], {"model": "m"})
    cache.create(describe=False)
    cache.write({"logprobs": {b"k" * 16: np.ones(3, np.float32)}})
    (cache.folders["logprobs"] / "0.safetensors").symlink_to("removed")
    assert [*cache.read([b"k" * 16])["logprobs"]] == [b"k" * 16]


def test_cached_values_that_are_wrong_are_found_and_all_computed_again(attach, data, counted, tmp_path, caplog):
    first = attach(data)
    change_every_value(tmp_path / "cache", 0.01)
    counted()
    with caplog.at_level(logging.WARNING):
        assert attach(data) == first
    assert counted() >= completions(data)
    assert "differ from the reference" in caplog.text
    assert attach(data) == first
    assert counted() <= 3 * 4


@pytest.mark.parametrize("harm", ["cut", "empty", "header", "key", "value", "exponent"])
def test_a_damaged_part_is_said_and_computed_again(attach, data, counted, tmp_path, caplog, harm):
    """A flipped bit of a number would be a number, or none (NaN), that nothing else tells from the right one."""
    first = attach(data)
    (part,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = part.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    places = {"header": 9, "key": head + 3, "value": len(whole) - 4, "exponent": len(whole) - 1}
    harmed = bytearray({"cut": whole[:-4], "empty": b""}.get(harm, whole))
    if harm in places:
        harmed[places[harm]] ^= 0x40
    part.write_bytes(harmed)
    counted()
    assert attach(data) == first and counted() >= completions(data)
    assert f"{part} is damaged" in caplog.text and part.read_bytes() == whole


def test_a_run_waits_for_the_values_that_another_one_computes(attach, data, counted, tmp_path):
    expected = attach(data, cache_dir=tmp_path / "other")
    attach(data[:1])
    counted()
    (folder,) = (one for one in (tmp_path / "cache").iterdir() if one.is_dir())
    found = []
    with FileLock(folder.with_suffix(".lock")):
        run = threading.Thread(target=lambda: found.append(attach(data)))
        run.start()
        run.join(timeout=2)
        assert run.is_alive() and not counted(), "it waits before its first forward pass"
        shutil.copytree(tmp_path / "other" / folder.name, folder, dirs_exist_ok=True)
    run.join(timeout=60)
    assert found == [expected]
    assert counted() <= completions(data) / 2, "those alone that are checked"


def test_lists_that_occur_twice_are_computed_once(attach, data, counted):
    rows = attach([*data, *data[:5]])
    assert counted() == completions(data)
    assert [row["reference_logprobs"] for row in rows[20:]] == [row["reference_logprobs"] for row in rows[:5]]


def test_no_batch_is_larger_than_asked_for(attach, data, monkeypatch):
    shapes = []
    forward = TokenScorer.forward
    monkeypatch.setattr(
        TokenScorer, "forward", lambda self, b, *a: shapes.append(b.input_ids.shape) or forward(self, b, *a)
    )
    attach(data, tokens_per_batch=64)
    assert max(rows * width for rows, width in shapes) <= 64
    assert len(shapes) < len(data)
