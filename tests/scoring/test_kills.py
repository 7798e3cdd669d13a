"""A job that is stopped, at every moment that matters or by SIGKILL at any, ends with the same bytes."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from tiny_models import letters, llama, saved
from transformers import LlamaForSequenceClassification

from align.errors import UserError
from align.scoring import command, job, score_rows, window

KILLS = int(os.environ.get("ALIGN_KILLS", "1"))
ROWS = int(os.environ.get("ALIGN_SCORE_ROWS", "300"))
"""Set them higher for a longer trial."""


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def rows_file(path: Path, n: int) -> str:
    draw = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(draw.choices("abcdefgh", k=draw.randint(1, longest)))

    rows = [{"id": i, "prompt": text(9) + " ", "completions": [text(20) for _ in range(1 + i % 3)]} for i in range(n)]
    lines = [json.dumps(row) for row in rows]
    lines[n // 2] = '{"prompt": "p"}'
    lines[1] = lines[0]  # a text that an earlier window has scored
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def classifier(tmp_path) -> str:
    return saved(tmp_path / "classifier", LlamaForSequenceClassification(llama(pad_token_id=0)), letters())


def files(output: Path) -> list[bytes]:
    return [output.read_bytes(), output.with_name(output.name + ".errors.jsonl").read_bytes()]


class Moments:
    """Raises Stopped at the n-th of the moments before and after the functions that it wraps."""

    def __init__(self) -> None:
        self.left = math.inf

    def wrap(self, function: Callable) -> Callable:
        def call(*arguments, **keywords):
            self.pass_one()
            result = function(*arguments, **keywords)
            self.pass_one()
            return result

        return call

    def pass_one(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stopped


def test_stopped_before_or_after_any_step(tmp_path, classifier, monkeypatch):
    """The steps: a window scored, a file put in its place, rewards put into the cache, the parts removed."""
    path = rows_file(tmp_path / "rows.jsonl", 16)
    moments = Moments()
    monkeypatch.setattr(window, "score_window", moments.wrap(window.score_window))
    monkeypatch.setattr(os, "replace", moments.wrap(os.replace))
    monkeypatch.setattr(command.RewardCache, "add", moments.wrap(command.RewardCache.add))
    monkeypatch.setattr(os, "rename", moments.wrap(os.rename))
    monkeypatch.setattr(shutil, "rmtree", moments.wrap(shutil.rmtree))

    def run(name: str) -> Path:
        output = tmp_path / f"{name}.jsonl"
        score_rows(
            path, str(output), rewards=[classifier], on_error="collect", window=10, cache=tmp_path / f"{name}-cache"
        )
        return output

    whole = run("whole")
    for n in count():
        moments.left = n
        try:
            run(f"stopped{n}")
            break
        except Stopped:
            moments.left = math.inf
        output = run(f"stopped{n}")
        assert files(output) == files(whole)
        left = [file for ending in ("parts", "tmp", "removed") for file in tmp_path.glob(f"*stopped{n}.*{ending}")]
        assert not left
    assert n >= 2 * (4 + 4 + 3), "three windows or more, a part each, and the files beside them"


def stopped_before_its_end(tmp_path, monkeypatch) -> tuple[Callable[[str], Path], Path]:
    """What runs a job of two windows, and the parts of one that has scored them and no more."""
    path = rows_file(tmp_path / "rows.jsonl", 16)

    def run(name: str) -> Path:
        output = tmp_path / f"{name}.jsonl"
        reward = "{name: length, max: 9}"
        score_rows(path, str(output), rewards=[reward], on_error="collect", window=10, use_cache=False)
        return output

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(job.Job, "expect_parts", stop)
        run("stopped")
    return run, tmp_path / "stopped.jsonl.parts"


@pytest.mark.parametrize("harm", ["digit", "digest", "cut", "empty"])
def test_a_damaged_part_is_said_and_scored_again(tmp_path, monkeypatch, caplog, harm):
    run, folder = stopped_before_its_end(tmp_path, monkeypatch)
    part = min(folder.glob("part-*.jsonl"))
    content = bytearray(part.read_bytes())
    content[-20 if harm == "digit" else 3] ^= 1
    part.write_bytes({"cut": content[:-9], "empty": b""}.get(harm, content))
    assert files(run("stopped")) == files(run("whole"))
    assert f"{part}: damaged" in caplog.text


@pytest.mark.parametrize("harm", ["missing", "cut", "digit"])
def test_a_damaged_description_of_a_begun_job_is_a_sentence(tmp_path, monkeypatch, harm):
    run, folder = stopped_before_its_end(tmp_path, monkeypatch)
    text = (folder / "job.json").read_text()
    (folder / "job.json").unlink()
    if harm != "missing":
        (folder / "job.json").write_text(text[:-9] if harm == "cut" else text.replace("10", "11", 1))
    with pytest.raises(UserError, match=r"job.json: (is missing|damaged)"):
        run("stopped")


def start(path: str, output: Path, classifier: str, cache: Path) -> subprocess.Popen:
    arguments = ["score", path, str(output), "--reward", classifier, "--on-error", "collect", "--window", "100"]
    command = [sys.executable, "-m", "align.cli", *arguments, "--cache", str(cache)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, classifier):
    path = rows_file(tmp_path / "rows.jsonl", ROWS)
    whole, killed = tmp_path / "whole.jsonl.gz", tmp_path / "killed.jsonl.gz"
    began = time.monotonic()
    process = start(path, whole, classifier, tmp_path / "cache1")
    assert process.wait(timeout=900) == 0, process.stderr.read()
    seconds = time.monotonic() - began
    moments = random.Random()
    interrupted = finished = 0
    windows: list[int] = []
    while interrupted < KILLS:
        began = time.monotonic()
        process = start(path, killed, classifier, tmp_path / "cache2")
        try:
            process.wait(timeout=moments.uniform(0.1, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            interrupted += 1
            windows.append(len(list(tmp_path.glob("killed.jsonl.gz.parts/part-*.jsonl"))))
        else:
            finished += 1
            seconds = min(seconds, time.monotonic() - began)  # the machine may have become faster
            assert files(killed) == files(whole)
            shutil.rmtree(tmp_path / "cache2")  # the next kill meets a fresh start
            for file in tmp_path.glob("killed*"):
                file.unlink()
    print(f"{interrupted} kills, the output finished {finished} times between them; windows there at each: {windows}")
    process = start(path, killed, classifier, tmp_path / "cache2")
    assert process.wait(timeout=900) == 0, process.stderr.read()
    assert files(killed) == files(whole)
