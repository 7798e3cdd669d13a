"""What the system lacks is one sentence and exit code 2 in every command, and the same command then goes on."""

import errno
import json
import os
import re
import resource
import sqlite3
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from transformers import AutoTokenizer

from align.cli import main
from align.data import prepare_data
from align.data.config import DataSection
from align.disk import size_of
from align.errors import UserError
from align.lacks import in_words
from align.recipe import dump_recipe
from align.rollout.sample import rollout
from align.scoring import score_rows
from align.scoring.job import Job
from align.training.annotate import annotate
from align.training.train import train
from align.training.trainer import AlignTrainer

TENSOR = {"x": torch.zeros(200_000)}


def _sqlite(path: str) -> None:
    with sqlite3.connect(path) as table:
        table.execute("PRAGMA max_page_count = 1")
        table.execute("CREATE TABLE t (x)")
        table.execute("INSERT INTO t VALUES (?)", ("x" * 100_000,))


def _text(path: str) -> None:
    with open(path, "w") as file:
        file.write("x" * 100_000)


WRITERS = {
    "text": _text,
    "torch": lambda path: torch.save(TENSOR, path),
    "safetensors": lambda path: save_file(TENSOR, path),
    "parquet": lambda path: parquet.write_table(pa.table({"x": range(100_000)}), path),
    "sqlite": _sqlite,
}
"""What writes our files -> how it fails in the middle."""


@pytest.mark.parametrize("name", ["text", "torch"])  # the others replace or remove what they could not write
def test_a_full_disk_is_said_whoever_writes(name):
    """/dev/full takes nothing, as a full disk does."""
    with pytest.raises(Exception) as failed:
        WRITERS[name]("/dev/full")
    sentence = in_words(failed.value)
    assert sentence and "make room, and the same command goes on" in sentence


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_grow_is_said_whoever_writes(name, tmp_path):
    """As `ulimit -f` and quotas do; in a process of its own, whose limit it is."""
    limit = 5 if name == "parquet" else 20_000
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            WRITERS[name](str(tmp_path / "file"))
            os._exit(1)
        except Exception as error:
            os._exit(0 if in_words(error) else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


NUMBERS = {
    errno.ENOSPC: "FILE: no space is left; make room",
    errno.EDQUOT: "FILE: the disk quota is used up",
    errno.EFBIG: "FILE: the file may not become so large",
    errno.EROFS: "FILE: the file system can only be read; give a path that can be written",
    errno.EMFILE: "too many files are open; raise the limit",
    errno.EIO: "FILE: the disk, or the network to it, fails (Input/output error)",
    errno.ESTALE: "FILE: the disk, or the network to it, fails (Stale file handle)",
    errno.EACCES: "FILE: Permission denied; give a path that can be written",
    errno.ENAMETOOLONG: "FILE: File name too long; give a path that can be written",
}


@pytest.fixture
def recipe_file(make_recipe, tmp_path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(make_recipe(train={"steps": 4}, sampling={"prompts": 0})))
    return str(path)


def fails(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("align: ")]
    return line


@pytest.mark.parametrize("number", NUMBERS)
def test_every_number_has_its_sentence_behind_a_librarys_own_error(number):
    try:
        try:
            raise OSError(number, os.strerror(number), "FILE")
        except OSError as error:
            raise RuntimeError("cannot save") from error
    except RuntimeError as error:
        assert in_words(error).startswith(NUMBERS[number])


def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_its_steps(make_recipe, recipe_file, monkeypatch, capsys):
    save = AlignTrainer._save

    def failing(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise RuntimeError("cannot save") from OSError(errno.ENOSPC, "No space left on device", "FILE")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(AlignTrainer, "_save", failing)
    assert fails(capsys, "train", recipe_file).startswith(f"align: {NUMBERS[errno.ENOSPC]}")
    monkeypatch.undo()
    main(["train", recipe_file])
    whole = train(make_recipe("whole", train={"steps": 4}, sampling={"prompts": 0}))
    files = [Path(run) / "adapter/adapter_model.safetensors" for run in (make_recipe().output, whole.path)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("can't start new thread"), "no more processes or threads may be started"),
        (RuntimeError("Could not determine home directory."), "there is no home folder; set HOME"),
    ],
)
def test_memory_threads_and_home(recipe_file, monkeypatch, capsys, error, said):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("align.training.run.read_rows", failing)
    assert fails(capsys, "train", recipe_file).startswith(f"align: {said}")


def test_no_folder_for_temporary_files(monkeypatch, recipe_file, capsys):
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("align.training.run.read_rows", lambda *_, **__: tempfile.mkdtemp())
    assert "no folder for temporary files can be written; set TMPDIR" in fails(capsys, "train", recipe_file)


@pytest.mark.slow
def test_too_many_files_for_real(rows_file, tmp_path):
    """A process that may open only a few files more than Python itself has."""
    program = (
        "import resource, sys, align.cli, align.scoring.command\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))\n"
        "align.cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "score", str(rows_file), str(tmp_path / "o.jsonl"), "--no-cache"]
    done = subprocess.run([*command, "--reward", "{name: length, max: 4}"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "too many files are open; raise the limit" in done.stderr


def test_another_fault_keeps_its_traceback():
    assert in_words(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert in_words(FileNotFoundError(errno.ENOENT, "No such file")) is None
    assert in_words(json.JSONDecodeError("bad", "x", 0)) is None


@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 4}, {"name": "full"}])
def test_what_a_run_will_write_is_held_against_what_is_free(make_recipe, monkeypatch, adapter):
    """Against the size of the files that a run has written."""
    policy = {"policy": {"adapter": adapter}}
    recipe = make_recipe(train={"steps": 3, "save_steps": 1, "keep_checkpoints": 2}, sampling={"prompts": 0}, **policy)
    run = train(recipe).path
    (newest, _) = sorted(run.glob("checkpoints/checkpoint-*"), reverse=True)
    wrote = sum(file.stat().st_size for file in newest.rglob("*") if file.suffix in (".pt", ".safetensors"))
    free = SimpleNamespace(free=0)
    monkeypatch.setattr("align.disk.shutil.disk_usage", lambda _: free)
    small = make_recipe("small", train={"steps": 1}, sampling={"prompts": 0}, **policy)
    with pytest.raises(UserError, match=r"small: a checkpoint of this run takes about .* 0 bytes are free") as said:
        train(small)
    told = float(re.search(r"about ([0-9.]+) kB", str(said.value))[1]) * 1000
    least = 0.3 if adapter["name"] == "lora" else 0.6  # of a few kB of numbers the files have as much besides
    assert least * wrote < told < 1.1 * wrote, (told, wrote)
    free.free = int(2 * told)
    train(small)
    assert "make room, or give train.keep_checkpoints=1" in (Path(small.output) / "events.log").read_text()


UNITS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6}


def told_bytes(message: str) -> float:
    found = re.search(r"take (?:about )?([0-9.]+) (bytes|kB|MB), and [0-9.]+ (?:bytes|kB) are free", message)
    assert found, message
    return float(found[1]) * UNITS[found[2]]


@pytest.fixture
def full(monkeypatch):
    """A disk that says it is full, although files can be written."""
    monkeypatch.setattr("align.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=0))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_what_a_score_will_write_is_held_against_what_is_free(tmp_path, monkeypatch, ending):
    """Against its files: the parts before they go, and the output."""
    texts = [" ".join("abcdefgh"[(n * k) % 8] * (n % 7 + 1) for k in range(150)) for n in range(60)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": one, "completions": [one, one[1:]]}) + "\n" for one in texts))
    output, parts = tmp_path / f"scored.{ending}", []
    score = partial(score_rows, str(rows), str(output), rewards=[{"name": "length", "max": 9}], window=16)
    no_room = {tmp_path}  # not that of the cache
    with monkeypatch.context() as patch:
        patch.setattr("align.disk.shutil.disk_usage", lambda at: SimpleNamespace(free=0 if at in no_room else 10**9))
        with pytest.raises(UserError, match=f"scored.{ending}: it and its parts will take about") as said:
            score(cache=tmp_path / "cache")
        no_room = {tmp_path / "cache"}
        with pytest.raises(UserError, match="cache/rewards.sqlite: the rewards will take about 8.64 kB") as of_cache:
            score(cache=tmp_path / "cache")
        assert told_bytes(str(of_cache.value)) == 120 * 72  # SQLite takes 71 bytes a reward, of 100 000
        close = Job.close
        patch.setattr(Job, "close", lambda job, summary: (parts.append(size_of(job.folder)), close(job, summary)))
        score(use_cache=False)
    wrote = parts[0] + output.stat().st_size
    assert 0.8 * wrote < told_bytes(str(said.value)) < 1.5 * wrote, wrote


def test_what_a_reference_will_write_is_held_against_what_is_free(make_recipe, monkeypatch, tmp_path):
    recipe = make_recipe(reference={"cache_dir": str(tmp_path / "cache")}, sampling={"prompts": 0})
    with monkeypatch.context() as patch:
        patch.setattr("align.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(UserError, match=r"the reference's values will take about .* `reference.cache_dir`") as said:
            annotate(recipe)
    annotate(recipe)
    wrote = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.safetensors"))
    assert 0.5 * wrote < told_bytes(str(said.value)) < 1.1 * wrote


def test_what_token_ids_will_take_is_held_against_what_is_free(tiny_policy, tmp_path, monkeypatch):
    """Told from the first window of rows, of several."""
    rows = tmp_path / "rows.jsonl"
    texts = [" ".join("abcdefgh"[(n * k) % 8] for k in range(n % 40 + 9)) for n in range(900)]
    rows.write_text("".join(json.dumps({"prompt": one, "chosen": one[1:], "rejected": "b"}) + "\n" for one in texts))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    section = DataSection(sources=[str(rows)], eval_fraction=0.0)
    prepare = partial(prepare_data, section, AutoTokenizer.from_pretrained(tiny_policy))
    with monkeypatch.context() as patch:
        patch.setattr("align.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(UserError, match=r"the token ids will take about .* HF_DATASETS_CACHE") as said:
            prepare()
    (file,) = {own["filename"] for own in prepare().train.cache_files}
    assert 0.9 * Path(file).stat().st_size < told_bytes(str(said.value)) < 1.1 * Path(file).stat().st_size


def test_a_rollout_that_could_fill_the_disk_is_said(make_recipe, full, capfd):
    section = {"engine": "transformers", "completions": 2, "max_tokens": 3}
    rows = rollout(make_recipe(rollout=section, sampling={"prompts": 0}))
    said = capfd.readouterr().err.splitlines()
    told = next(told_bytes(own) for own in said if "completions of 3 tokens each would take" in own)
    assert told == len(rows.read_text().splitlines()) * 2 * 3 * 20 * 2
