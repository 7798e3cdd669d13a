"""Commands that are stopped at the nth thing that they do to files: the same command then ends with the same files."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from stops import STOPPED, Stops
from table import case

SHORT = 2
"""Moments of each command in the default run; `-m long` takes every one."""
PARTS = 8
"""Of all moments, so that a table that was stopped among them goes on there."""


@pytest.fixture(scope="module")
def stops(tmp_path_factory) -> Iterator[Stops]:
    started = Stops(tmp_path_factory.mktemp("hook"))
    yield started
    started.close()


class Job(NamedTuple):
    """A command, and what it makes."""

    arguments: list[str]
    folder: Path
    """All that it writes is below."""
    artefacts: tuple[str, ...]
    """Files and folders in it that must be the same, byte by byte."""
    taken: str = ""
    """What the command says, with exit code 2, where it finds them whole."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, stops, tiny_policy, rows_file) -> dict[str, Job]:
    place = tmp_path_factory.mktemp("jobs")
    (work := place / "work").mkdir()
    tree = {
        "output": str(work / "run"),
        "policy": {"model": str(tiny_policy), "adapter": {"name": "lora", "rank": 2}},
        "reference": {"cache_dir": str(work / "cache")},
        "data": {"sources": [str(rows_file)], "limit": 6, "eval_fraction": 0.34, "grades": "raw", "cache": False},
        "objective": "lambda",
        "train": {"steps": 2, "lists_per_step": 2, "threads": 1, "save_steps": 1, "eval_steps": 1, "keep_best": "loss"},
        "sampling": {"prompts": 0, "token_lists": 0},
    }
    tree["train"]["keep_checkpoints"] = 1
    (place / "r.yaml").write_text(yaml.safe_dump(tree))
    trained = place / "trained"
    assert stops.run(["train", str(place / "r.yaml"), f"output={trained}"], below=trained).code == 0, stops.said()
    score = ["score", str(rows_file), str(work / "scored.jsonl"), "--reward", "{name: length, max: 9}"]
    return {
        "train": Job(["train", str(place / "r.yaml")], work, ("run/adapter", "run/best", "run/checkpoints")),
        "annotate": Job(["annotate", str(place / "r.yaml")], work, ("cache",)),
        "export": Job(["export", str(trained), str(work / "out")], work, ("out",), "an export is there whole"),
        "merge": Job(
            ["export", str(trained), str(work / "out"), "--merge"], work, ("out",), "an export is there whole"
        ),
        "score": Job([*score, "--cache", str(work / "rewards"), "--window", "12"], work, ("scored.jsonl",)),
    }


def made(job: Job) -> dict[str, bytes]:
    files = [file for name in job.artefacts for file in [job.folder / name, *(job.folder / name).rglob("*")]]
    return {str(file.relative_to(job.folder)): file.read_bytes() for file in files if file.is_file()}


def check_files(job: Job) -> None:
    """Modes are the umask's, whatever temporary files a library wrote through, and sets in configs have one order."""
    umask = os.umask(0)
    os.umask(umask)
    for file in (job.folder / name for name in made(job)):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file
        if file.name == "adapter_config.json":
            targets = json.loads(file.read_text())["target_modules"]
            assert targets == sorted(targets) and len(targets) > 4


def clean(job: Job) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir()


@pytest.mark.parametrize("part", [None, *(pytest.param(part, marks=pytest.mark.long) for part in range(PARTS))])
@pytest.mark.parametrize("name", ["train", "annotate", "export", "merge", "score"])
def test_stopped_anywhere_the_same_command_ends_with_the_same_files(stops, jobs, record_property, name, part):
    job = jobs[name]
    clean(job)
    ended = stops.run(job.arguments, below=job.folder)
    assert ended.code == 0, stops.said()
    whole = whole_of(job)
    assert whole and ended.seen > SHORT
    check_files(job)
    few = range(ended.seen // (2 * SHORT), ended.seen, ended.seen // SHORT)
    for at in few if part is None else range(part, ended.seen, PARTS):
        clean(job)
        assert stops.run(job.arguments, below=job.folder, at=at).code == STOPPED, f"at {at}: {stops.said()}"
        found = whole_of(job)
        code = stops.run(job.arguments, below=job.folder).code
        taken = found == whole and code == 2 and job.taken and job.taken in stops.said()
        again = whole_of(job)
        wrong = "" if code == 0 or taken else stops.said()
        wrong += "".join(f" lost: {own}" for own in whole.keys() | again.keys() if whole.get(own) != again.get(own))
        wrong += "".join(f" left: {file}" for file in job.folder.rglob("*") if file.suffix == ".tmp")
        what = f"{' '.join(job.arguments[:1])}, stopped at {at} of {ended.seen}"
        record_property(*case(what, code=code, said=job.taken if taken else "", wrong=wrong))
        assert not wrong, f"stopped at {at}: {wrong}"


def whole_of(job: Job) -> dict[str, bytes]:
    """What a command made, less what differs from run to run."""
    return {name: own for name, own in made(job).items() if not is_of_its_time(name)}


def is_of_its_time(name: str) -> bool:
    """Files that hold seconds, or the digest of such a file."""
    return name.endswith(("metrics.jsonl", "manifest.json", "trainer_state.json")) or "lock" in name
