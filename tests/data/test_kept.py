"""Preparations that are kept: read again where nothing changed, made again where anything did, and never half there."""

import gc
import json
import os
import random
import threading
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
from conftest import CHATML
from read_rows import read_rows

from align.data import kept, prepare, row_store, schema, windows
from align.data.kept import kept_folder, kept_root, known_digest
from align.data.row_store import decoded, encoded
from align.data.schema import Row
from align.data.tokenize import WINDOW
from align.errors import UserError

BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
FILES = ["rows.jsonl", "rows.npz", "train.arrow", "heldout.arrow", "used.npz", "audit.json", "manifest.json"]


def write(file, count=30):
    rows = [
        {"id": n, "prompt": f"p{n % 20}", "completions": ["good", "fair", f"bad {n}"], "ranks": [0, 1, 2]}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def everything(data):
    """All that a run sees of a preparation."""
    lists = [list(own) for own in (data.train, data.heldout)]
    return lists, data.audit.to_dict(), list(data.train_rows), list(data.heldout_rows)


@pytest.fixture
def made(monkeypatch):
    """The folders that were prepared, not read again."""
    found, original = [], prepare._prepare
    monkeypatch.setattr(prepare, "_prepare", lambda folder, *given: (found.append(folder), original(folder, *given)))
    return found


def entries():
    return [own for own in kept_root().iterdir() if own.is_dir()]


def test_a_second_start_reads_what_the_first_has_made(tmp_path, byte_level, made):
    file = write(tmp_path / "rows.jsonl")
    first = everything(read_rows(str(file), tokenizer=byte_level, every_check=True))
    byte_level(["a", "bb"], padding=True, truncation=True, max_length=1)  # leaves its settings behind
    again = everything(read_rows(str(file), tokenizer=deepcopy(byte_level), every_check=True))
    assert len(made) == 1 and again == first
    read_rows(str(file), tokenizer=byte_level, workers=2, stop_on=["scripts"])
    assert len(made) == 1


CHANGES = {
    "max_length": 9,
    "max_prompt_length": 3,
    "overlong": "drop_list",
    "append_eos": False,
    "chat_template": BARE,
    "select": "best_worst",
    "list_size": 2,
    "eval_fraction": 0.5,
    "seed": 1,
    "grades": "rank",
    "limit": 20,
    "min_completions": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_key_that_matters_is_in_the_key(name, tmp_path, byte_level, made):
    file = str(write(tmp_path / "rows.jsonl"))
    read_rows(file, tokenizer=byte_level)
    read_rows(file, tokenizer=byte_level, **{name: CHANGES[name]})
    assert len(made) == 2


@pytest.mark.parametrize("change", ["a row", "a word, its time set back", "the tokenizer", "its template", "beside"])
def test_whatever_is_read_is_in_the_key(change, tmp_path, byte_level, made):
    file, tokenizer = write(tmp_path / "rows.jsonl"), deepcopy(byte_level)
    before = file.stat()
    old = everything(read_rows(str(file), tokenizer=tokenizer))
    if change == "a row":
        write(file, 31)
    elif change == "a word, its time set back":
        file.write_text(file.read_text().replace("fair", "lair"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "the tokenizer":
        tokenizer.add_tokens(["good"])
    elif change == "its template":
        tokenizer.chat_template = BARE
    else:
        (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "rows.jsonl", "ranking": True}}))
    new = everything(read_rows(str(file), tokenizer=tokenizer))
    assert len(made) == 2
    assert (new != old) == (change not in ("its template", "beside"))


def test_a_folder_is_known_by_all_of_its_files(tmp_path, byte_level, made):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "a.jsonl", 5)
    read_rows(str(folder), tokenizer=byte_level, eval_fraction=0.0)
    write(folder / "b.jsonl", 3)
    assert len(read_rows(str(folder), tokenizer=byte_level, eval_fraction=0.0).train) == 8 and len(made) == 2
    (folder / "a.jsonl").unlink()
    assert len(read_rows(str(folder), tokenizer=byte_level, eval_fraction=0.0).train) == 3 and len(made) == 3


def test_a_digest_is_read_from_the_index_where_nothing_changed(tmp_path, own_cache, monkeypatch):
    read, original = [], kept.file_digest
    monkeypatch.setattr(kept, "file_digest", lambda file: (read.append(file), original(file))[1])
    file = write(tmp_path / "rows.jsonl")
    known_digest(file)
    assert known_digest(file) == original(file) and len(read) == 2  # written a moment ago: its times prove nothing
    now = kept.time.time_ns()
    monkeypatch.setattr(kept.time, "time_ns", lambda: now + 3_000_000_000)
    known_digest(file)
    assert known_digest(file) == original(file) and len(read) == 3
    file.write_text("another")
    assert known_digest(file) == original(file) and len(read) == 4
    (own_cache / "align" / "files.json").write_text("[")
    assert known_digest(file) == original(file)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "grow"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_said_and_made_good(name, harm, tmp_path, byte_level, made, caplog):
    source = str(write(tmp_path / "rows.jsonl"))
    first = everything(read_rows(source, tokenizer=byte_level))
    (folder,) = entries()
    old = (folder / name).read_bytes()
    flipped = bytearray(old)
    flipped[len(old) // 2] ^= 1
    (folder / name).unlink()
    if harm != "remove":
        (folder / name).write_bytes({"flip": bytes(flipped), "cut": old[: len(old) // 2], "grow": old + b"x"}[harm])
    assert everything(read_rows(source, tokenizer=byte_level)) == first
    assert len(made) == 2 and "is damaged" in caplog.text and str(folder) in caplog.text


def test_what_checks_said_is_kept_and_damage_of_it_is_said(tmp_path, byte_level, made, caplog, monkeypatch):
    source = str(write(tmp_path / "rows.jsonl"))
    first = read_rows(source, tokenizer=byte_level, every_check=True).audit.to_dict()
    assert first["lint"]
    looked, original = [], prepare.lint
    monkeypatch.setattr(prepare, "lint", lambda *given: (looked.append(given[-1]), original(*given))[1])
    assert read_rows(source, tokenizer=byte_level, every_check=True).audit.to_dict() == first and not looked
    file = entries()[0] / "checks.json"
    file.write_text(file.read_text().replace("0", "1", 1))
    assert read_rows(source, tokenizer=byte_level, every_check=True).audit.to_dict() == first
    assert len(looked) == len(made) == 1 and "checks.json is damaged" in caplog.text


def test_those_who_come_together_prepare_once(tmp_path, byte_level, made):
    source, found = str(write(tmp_path / "rows.jsonl")), []
    start = threading.Barrier(4)

    def read():
        start.wait()
        found.append(everything(read_rows(source, tokenizer=deepcopy(byte_level))))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for own in threads:
        own.start()
    for own in threads:
        own.join()
    assert len(made) == 1 and len(found) == 4 and all(own == found[0] for own in found)


def test_what_breaks_off_leaves_nothing(tmp_path, byte_level, made):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1]}\n{"prompt": "p"}\n')
    with pytest.raises(UserError, match="row 2"):
        read_rows(str(file), tokenizer=byte_level)
    assert not entries()
    write(file)
    read_rows(str(file), tokenizer=byte_level)
    (whole,) = entries()
    left = whole.rename(whole.with_suffix(".tmp"))  # as a kill leaves it
    read_rows(str(file), tokenizer=byte_level)
    assert len(made) == 3 and not left.exists() and entries() == [whole]


def test_nothing_is_kept_without_the_cache_nor_with_chance(tmp_path, byte_level, made):
    source, tokenizer = str(write(tmp_path / "rows.jsonl")), deepcopy(byte_level)
    tokenizer.chat_template = "{{ range(9) | random }}" + CHATML
    for keys in ({"cache": False, "tokenizer": byte_level}, {"tokenizer": tokenizer}):
        first, again = (everything(read_rows(source, **keys)) for _ in range(2))
        assert first == again
    assert len(made) == 4 and all(own.name.startswith("unkept-") for own in entries())


def test_a_date_in_a_template_is_in_the_key(tmp_path, byte_level, made, monkeypatch):
    import transformers.utils.chat_template_utils as module

    class Clock(module.datetime):
        day = "2026-11-28"

        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(cls.day)

    monkeypatch.setattr(module, "datetime", Clock)
    file = tmp_path / "rows.jsonl"
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "hi"}], **sides}) + "\n")
    template = "{{ strftime_now('%d %B') }}" + CHATML
    for day, count in (("2026-11-28", 1), ("2026-11-28", 1), ("2026-11-29", 2)):
        Clock.day = day
        data = read_rows(str(file), tokenizer=byte_level, chat_template=template, eval_fraction=0.0)
        text = byte_level.decode(data.train[0]["prompt_ids"])
        assert len(made) == count and f"{day[-2:]} November" in text


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path):
    file = write(tmp_path / "rows.jsonl")

    def fill(folder):
        (folder / "x").write_text(file.read_text())
        write(file, 31)

    folder = kept_folder(lambda: known_digest(file), fill)
    assert folder.name.startswith("unkept-") and (folder / "x").exists()


def test_memory_is_bounded_by_the_window(tmp_path, byte_level, monkeypatch):
    """Of 3000 rows no more than two windows are alive at any time."""
    alive = most = 0

    def gone():
        nonlocal alive
        alive -= 1

    def began(own):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        weakref.finalize(own, gone)
        return own

    original, made = Row.__init__, schema.row_of
    monkeypatch.setattr(Row, "__init__", lambda own, *args, **fields: original(began(own), *args, **fields))
    for module in (schema, row_store):
        monkeypatch.setattr(module, "row_of", lambda values: began(made(values)))
    source = str(write(tmp_path / "rows.jsonl", 3000))
    data = read_rows(source, tokenizer=byte_level, eval_fraction=0.3, list_size=2)
    gc.collect()
    assert len(data.train) + len(data.heldout) == 3000 and alive <= 1
    assert WINDOW <= most < 2 * WINDOW + 10
    assert sum(len(row.completions) for row in data.heldout_rows) == 3 * len(data.heldout) and alive <= 1


@pytest.mark.parametrize("size", [1, 7, 100])
def test_windows_change_nothing(size, tmp_path, byte_level, monkeypatch):
    """Tables, audit and rows are those of one window that holds all."""
    generator = random.Random(0)
    texts = ["a", "b", "", "longer text", "longer"]
    rows = [
        {
            "prompt": [{"role": "user", "content": generator.choice("pqr") * generator.randint(1, 20)}],
            "completions": generator.choices(texts, k=generator.randint(2, 4)),
            "weight": generator.choice([1, 1, 2]),
            "id": str(n % 70),
        }
        for n in range(90)
    ]
    for row in rows:
        row["scores"] = [generator.randint(0, 3) for _ in row["completions"]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"tokenizer": byte_level, "chat_template": CHATML, "max_length": 40, "every_check": True, "cache": False}
    whole = everything(read_rows(str(file), **keys))
    monkeypatch.setattr("align.data.tokenize.WINDOW", size)
    monkeypatch.setattr(windows, "ROWS", size)
    assert everything(read_rows(str(file), **keys)) == whole
    assert whole[1]["duplicate_ids"] > 0 and whole[1]["refused"]


def test_a_row_is_the_same_from_disk():
    row = Row(
        id="é\n",
        prompt=[{"role": "user", "content": "hi \u2028", "n": 2**70}],
        completions=([{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]),
        grades=(0.1, 1 / 3),
        rewards=None,
        meta={"attributes": [{"x": 0.1}, None], "n": 3},
        source="f",
        number=7,
        margin=0.25,
        tools=[{"type": "function"}],
        unread=("x",),
        gathered=True,
    )
    assert decoded(encoded(row)) == row
    ids = replace(row, token_weights=((0.5, 1.0), (2.0,)), prompt_ids=[1], completion_ids=([1, 2], [3]))
    assert decoded(encoded(ids)) == ids
