"""A signal or the end of a given time ends a run behind a step, with its exit code; the same command ends it as if
nothing had been."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from align.cli import main
from align.recipe import dump_recipe, parse_recipe
from align.recipe.settings import TrainSection
from align.section import read_seconds
from align.stopping import OUT_OF_TIME, Stopped, between_steps, came, left, limited, stoppable
from align.training.train import train
from align.training.trainer import AlignTrainer

ROOT = Path(__file__).parents[2]

SECTIONS = {
    "policy": {"adapter": {"name": "lora", "rank": 4, "dropout": 0.1}},
    "train": {"epochs": 5, "save_steps": 6, "eval_steps": 5, "keep_best": "loss"},
    "sampling": {"prompts": 0},
}
STEPS = 20
CODES = {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130, "SIGUSR1": 138}
TIMES = {"seconds", "lists_per_second", "completion_tokens_per_second", "rank_wait_share", "crc32"}


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def checkpoints(run: Path) -> set[int]:
    return {int(marker.parent.name.split("-")[1]) for marker in run.glob("checkpoints/*/manifest.json")}


def figures(run: Path) -> list[dict]:
    """Every line of metrics, times left out."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_end(one: Path, other: Path) -> None:
    assert adapter(one) == adapter(other)
    assert figures(one) == figures(other)


def ends_with(capsys, code: int, *words: str) -> str:
    """The one sentence of a command that ends so."""
    with pytest.raises(SystemExit) as ended:
        main([*words])
    said = capsys.readouterr().err
    assert ended.value.code == code, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("align: ")]
    return line


@pytest.fixture
def train_whole_and(make_recipe, tmp_path):
    """A finished run, and the recipe of one that is to be stopped, with its file."""
    whole, stopped = make_recipe("whole", **SECTIONS), make_recipe("stopped", **SECTIONS)
    train(whole)
    path = tmp_path / "stopped.yaml"
    path.write_text(dump_recipe(stopped))
    return Path(whole.output), Path(stopped.output), str(path)


def test_each_signal_ends_a_run_behind_a_step_and_the_same_command_ends_it_alike(train_whole_and, monkeypatch, capsys):
    """In the middle of a step, and (SIGUSR1) of an evaluation between two."""
    whole, run, path = train_whole_and
    step, evaluate = AlignTrainer.training_step, AlignTrainer.evaluate
    when = {"SIGTERM": 2, "SIGHUP": 3, "SIGINT": 7, "SIGUSR1": 10}
    due: list[str] = []

    def with_signal(self, *args, **kwargs):
        if due and due[0] != "SIGUSR1" and self.state.global_step + 1 == when[due[0]]:
            os.kill(os.getpid(), getattr(signal, due.pop()))
        return step(self, *args, **kwargs)

    def evaluated(self, *args, **kwargs):
        if due and self.state.global_step == when[due[0]]:
            os.kill(os.getpid(), getattr(signal, due.pop()))
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(AlignTrainer, "training_step", with_signal)
    monkeypatch.setattr(AlignTrainer, "evaluate", evaluated)
    for name, code in CODES.items():
        due.append(name)
        line = ends_with(capsys, code, "train", path)
        ending = f"after step {when[name]} of {STEPS}, whose checkpoint is written; the same command goes on from here"
        assert line == f"align: stopped by {name} {ending}"
        assert when[name] in checkpoints(run), "whatever save_steps says"
        assert figures(run)[-1]["step"] == when[name], "it has not begun another step"
        assert not (run / "summary.json").exists()
    main(["train", path])
    assert_same_end(whole, run)


def test_a_time_limit_leaves_time_for_a_step_and_a_checkpoint(train_whole_and, monkeypatch, capsys):
    """On a clock on which a step takes 3 s and a checkpoint 2; the run ends in time, with no step to spare."""
    whole, run, path = train_whole_and
    now = [0.0]
    step, save = AlignTrainer.training_step, AlignTrainer._save_checkpoint

    def takes(seconds, work):
        def slowly(*args, **kwargs):
            now[0] += seconds
            return work(*args, **kwargs)

        return slowly

    monkeypatch.setattr(AlignTrainer, "training_step", takes(3.0, step))
    monkeypatch.setattr(AlignTrainer, "_save_checkpoint", takes(2.0, save))
    monkeypatch.setattr("align.training.pause.time", SimpleNamespace(monotonic=lambda: now[0]))
    reached = 0
    for seconds in (40.0, 22.0):
        now[0] = 0.0
        monkeypatch.setattr("align.training.pause.left", lambda seconds=seconds: seconds - now[0])
        line = ends_with(capsys, OUT_OF_TIME, "train", path)
        steps, before = int(re.search(r"is over after step (\d+) of 20", line)[1]), reached
        assert line.endswith(f"of {STEPS}, whose checkpoint is written; the same command goes on from here")
        reached = steps
        assert now[0] <= seconds, "the last checkpoint is in time"
        assert steps - before >= 2 and now[0] + 3 + 2 * 2 + 3 > seconds, "another step would not have been"
    monkeypatch.undo()
    main(["train", path])
    assert_same_end(whole, run)


def test_the_end_of_the_time_comes_by_itself():
    """Where no step looks for it: while rows are read, or the held-out lists are measured."""
    began = time.monotonic()
    with pytest.raises(Stopped) as stopped, limited(0.3):
        time.sleep(10)
    assert stopped.value.code == OUT_OF_TIME and time.monotonic() - began < 5
    assert left() == math.inf
    with limited(1e6), between_steps() as asked:
        assert 0.9e6 < left() < 1e6 and not asked()
    with limited(0.2), between_steps() as asked:
        while not asked():
            assert time.monotonic() - began < 10
    with stoppable(began=time.monotonic() - 50), pytest.raises(Stopped), limited(50):
        time.sleep(10)  # the time counts from the command's begin


TWICE = """
import time
from align.stopping import between_steps
with between_steps():
    print("there", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once():
    with subprocess.Popen([sys.executable, "-c", TWICE], stdout=-1, stderr=-1, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.terminate()
        assert process.wait(timeout=10) == 129, "the code of the first"
        assert process.stderr.read() == ""


def test_under_a_launcher_the_same_signal_twice_is_one(monkeypatch):
    """It comes from the terminal or from Slurm, and once more from the launcher, which sends it on."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with between_steps() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM


@pytest.mark.parametrize("name", CODES)
def test_outside_of_training_a_signal_ends_the_work_where_it_is(make_recipe, rows_file, monkeypatch, capsys, name):
    """While rows are read, and in a command that does not train: one sentence, the signal's code, no traceback."""

    def hit(*_, **__):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(10)

    path = Path(make_recipe().output).with_suffix(".yaml")
    path.write_text(dump_recipe(make_recipe()))
    monkeypatch.setattr("align.training.run.read_rows", hit)
    goes_on = f"align: stopped by {name}; the same command goes on from here"
    assert ends_with(capsys, CODES[name], "train", str(path)) == goes_on
    monkeypatch.setattr("align.evaluate.rows.load_measured", hit)
    words = ["evaluate", "rows", str(rows_file), "--model", make_recipe().policy.model]
    again = f"align: stopped by {name}; nothing half done is kept; give the same command again"
    assert ends_with(capsys, CODES[name], *words) == again


def test_what_a_library_says_of_an_interrupt_is_not_said(make_recipe, rows_file, monkeypatch, capsys):
    """A wait that a signal has ended, or another process that it has ended first, is an error of theirs."""

    def interrupted(*_, **__):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("align.evaluate.rows.load_measured", interrupted)
    line = ends_with(capsys, 143, "evaluate", "rows", str(rows_file), "--model", make_recipe().policy.model)
    assert line.startswith("align: stopped by SIGTERM; ")


@pytest.mark.parametrize("whom", ["the launcher", "one process"])
def test_all_processes_end_behind_the_same_step(make_recipe, start_each, tmp_path, whom):
    """Whether the launcher tells each, or one of them alone hears of it."""
    longer = SECTIONS | {"train": SECTIONS["train"] | {"epochs": 12}}
    whole, stopped = make_recipe("whole", **longer), make_recipe("stopped", **longer)
    paths = {}
    for recipe in (whole, stopped):
        paths[recipe.output] = tmp_path / f"{Path(recipe.output).name}.yaml"
        paths[recipe.output].write_text(dump_recipe(recipe))
    start_each("align.cli", "train", str(paths[whole.output])).finish()
    running = start_each("align.cli", "train", str(paths[stopped.output]))
    run = Path(stopped.output)
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 9:
        assert running.process.poll() is None, running.said()
        time.sleep(0.02)
    children = psutil.Process(running.process.pid).children(recursive=True)
    ranks = {one.environ().get("RANK"): one for one in children}
    target = psutil.Process(running.process.pid) if whom == "the launcher" else ranks["1"]
    target.terminate()
    assert running.process.wait(timeout=120) != 0
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    said = running.said()
    assert len(re.findall(r"^align: stopped by SIGTERM after step \d+ of 48, whose checkpoint", said, re.M)) == 1, said
    if whom == "one process":  # the launcher names each one's code
        assert "exitcode  : 143" in said, said
    assert checkpoints(run) and not (run / "summary.json").exists()
    start_each("align.cli", "train", str(paths[stopped.output])).finish()
    assert_same_end(Path(whole.output), run)


def test_what_ignores_or_handles_a_signal_keeps_it():
    heard = []
    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))]
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [1] and not came()
            with pytest.raises(Stopped) as stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            assert stopped.value.code == 143 and isinstance(stopped.value, KeyboardInterrupt)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])


def test_between_steps_a_signal_is_noted_only():
    with between_steps() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == signal.SIGINT
    with between_steps() as asked:
        assert asked() == 0, "what has ended one work does not end the next"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 3 * 3600 + 50 * 60), ("90m", 5400), ("90 min", 5400), ("1d", 86400), ("2h 5s", 7205), (13800, 13800)]
    + [("03:50:00", 3 * 3600 + 50 * 60), ("1-03:50:00", 86400 + 3 * 3600 + 50 * 60)],
)
def test_times_as_people_write_them(text, seconds):
    assert read_seconds(text) == seconds
    assert TrainSection(time_limit=text).time_limit == seconds


@pytest.mark.parametrize("text", ["", "soon", "5x", "h", "-5", 0, "0s", "3:70:00", "inf"])
def test_what_is_no_time_is_said(text):
    with pytest.raises(ValueError, match="time_limit"):
        parse_recipe({"output": "x", "train": {"time_limit": text}}, origin="recipe.yaml")
