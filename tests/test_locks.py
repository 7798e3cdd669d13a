"""Two processes do not write the same files: the second is refused, or waits, and a killed holder keeps nobody out."""

import errno
import json
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import BaseFileLock, FileLock, SoftFileLock

from align.cli import main
from align.errors import UserError
from align.export.export import export
from align.locks import LOCK_FILES, alone, in_turn
from align.rollout.sample import rollout
from align.scoring import score_rows
from align.training.train import train

HOLD = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(code: str, *arguments: str):
    """Another process runs this and has the lock; in the end it is killed."""
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=Path(__file__).parents[1])
    assert process.stdout and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def held(file: Path):
    """Another process has the lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return holding(HOLD, str(file))


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def works(make_recipe, rows_file, tmp_path):
    """Name -> what a command does, and the folder that it writes."""
    own = {"adapter": {"name": "lora", "rank": 4}, "model": make_recipe().policy.model}
    reward = {"name": "length", "max": 4}
    drawn = {"completions": 4, "max_tokens": 8, "engine": "transformers", "reward": reward}
    few = {"train": {"steps": 1}, "sampling": {"prompts": 0}}
    run, output = Path(make_recipe().output), tmp_path / "out.jsonl"
    return {
        "train": (lambda: train(make_recipe(**few)), run),
        "online": (lambda: train(make_recipe(policy=own, rollout=drawn, online={"iterations": 1}, **few)), run),
        "rollout": (lambda: rollout(make_recipe(policy=own, rollout=drawn)), run),
        "export": (lambda: export(train(make_recipe(**few)).path, tmp_path / "out"), tmp_path / "out"),
        "score": (
            lambda: score_rows(str(rows_file), str(output), rewards=[reward], use_cache=False),
            tmp_path / "out.jsonl.parts",
        ),
    }


@pytest.mark.parametrize("name", ["train", "online", "rollout", "score", "export"])
def test_a_second_process_is_refused_until_the_first_has_ended(works, tmp_path, name):
    work, folder = works[name]
    with held(folder / ".lock" if name != "export" else folder.with_name(".out.lock")):
        before = content(folder)
        with pytest.raises(UserError, match=f"^{folder}: another process is at work here; wait for its end, or give"):
            work()
        assert content(folder) == before
    work()  # the holder was killed
    assert not (tmp_path / ".out.lock").exists()


def test_a_finished_run_and_one_that_was_refused_hold_nobody_off(make_recipe, tmp_path):
    recipe = make_recipe(train={"steps": 1}, sampling={"prompts": 0})
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "p"}) + "\n")
    with pytest.raises(UserError, match="bad.jsonl, row 1"):
        train(make_recipe(data={"sources": [str(tmp_path / "bad.jsonl")]}))
    for _ in range(2):
        train(recipe)
        with held(Path(recipe.output) / ".lock"):
            pass


def test_a_folder_of_something_else_gets_no_lock(make_recipe, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_text("")
    with pytest.raises(UserError, match="holds files that are no run"):
        train(make_recipe("photos"))
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["cat.png"]


AT_WORK = """
import sys
from pathlib import Path
from align import locks
folder, disk = sys.argv[1:]
if disk == "without locks":
    class Refusing(locks.FileLock):
        def acquire(self, **_):
            raise OSError(95, "Operation not supported")
    locks.FileLock = Refusing
sys.argv = ["/usr/bin/align", "score", "rows.jsonl"]
with locks.alone(Path(folder), instead="go"):
    print("held", flush=True)
    sys.stdin.read()
"""


def at_work(folder: Path, disk: str):
    """`align score` in another process holds the folder."""
    return holding(AT_WORK, str(folder), disk)


@pytest.fixture(params=["with locks", "without locks"])
def disk(request, monkeypatch) -> str:
    """One whose locks work, and one that knows none, as some networks' do not."""

    def refuse(self, **_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if request.param == "without locks":
        monkeypatch.setattr(FileLock, "acquire", refuse)
        monkeypatch.setattr(SoftFileLock, "acquire", BaseFileLock.acquire)
    return request.param


def test_who_holds_it_is_said_and_a_killed_holder_keeps_nobody_out(tmp_path, disk):
    folder = tmp_path / "out"
    with at_work(folder, disk) as process:
        since = rf"since {time.strftime('%Y-%m-%d')} ..:..: .*s"
        who = rf"\(`align score`, process {process.pid} on {platform.node()}, {since}\)"
        said = rf"^{folder}: another process is at work here {who}; wait for its end, or go$"
        with pytest.raises(UserError, match=said), alone(folder, instead="go"):
            pass
        process.kill()
        process.wait()
        assert {file.name for file in folder.iterdir()} <= LOCK_FILES
        with alone(folder, instead="go"):
            assert json.loads((folder / ".lock.holder").read_text())["pid"] == os.getpid()
    assert {file.name for file in folder.iterdir()} <= {".lock"}


def test_a_holder_on_another_machine_is_named_with_its_age_and_the_remedy(tmp_path, monkeypatch):
    """Nobody here can tell whether it is alive."""

    def refuse(self, **_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    class Elsewhere(SoftFileLock):
        def _published_record(self):
            return super()._published_record()._replace(hostname="node7")

    monkeypatch.setattr("align.locks.FileLock", type("Refusing", (FileLock,), {"acquire": refuse}))
    soft = tmp_path / ".lock.soft"
    lock = Elsewhere(soft)
    lock.acquire()
    about = {"host": "node7", "pid": 4, "since": time.time() - 3 * 3600, "command": "align train"}
    (tmp_path / ".lock.holder").write_text(json.dumps(about))
    with (
        pytest.raises(
            UserError, match=rf"process 4 on node7, .*: 3 h 0 min\); if that process is gone, remove {soft};"
        ),
        alone(tmp_path, instead="go"),
    ):
        pass
    soft.unlink()
    with alone(tmp_path, instead="go"):
        pass
    lock.release(force=True)


def test_who_waits_says_for_whom(tmp_path, capsys):
    file = tmp_path / "key.lock"
    with held(file) as process:
        about = {"host": "here", "pid": 4, "since": time.time(), "command": "align train"}
        (tmp_path / "key.lock.holder").write_text(json.dumps(about))
        threading.Timer(0.3, process.kill).start()
        with in_turn(file, work="computes"):
            pass
    assert "waiting for another process, which computes (`align train`, process 4 on here" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_folder_that_cannot_be_locked_at_all_is_said_and_used(tmp_path, monkeypatch, caplog, error):
    def refuse(*_, **__):
        raise error

    for kind in (FileLock, SoftFileLock):
        monkeypatch.setattr(kind, "acquire", refuse)
    monkeypatch.setattr("align.locks.log.propagate", True)
    with alone(tmp_path / "run", instead="go"):
        pass
    assert "cannot be locked" in caplog.text and str(error) in caplog.text


def test_readers_are_never_held_up(make_recipe, rows_file):
    """`align report`, `align evaluate` and `align chat` read a run that another process writes."""
    recipe = make_recipe(train={"steps": 1}, sampling={"prompts": 0})
    run = train(recipe).path
    with held(run / ".lock"):
        main(["report", str(run)])
        main(["evaluate", "rows", str(rows_file), "--model", str(run), "--grades", "raw", "--limit", "2"])
        main(["chat", str(run), "--prompt", "w3", "--max-tokens", "2"])
