"""Signs of life: on a terminal, in a notebook and in a log file, before the work and while it goes on."""

import io
import subprocess
import sys
import threading
import types

import pytest
from rich.console import Console
from rich.text import Text
from tiny_models import letters, llama, saved
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from align import progress as module
from align.cli import main
from align.progress import in_time, progress, stage
from align.recipe import dump_recipe
from align.training.train import train


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def open_terminal(monkeypatch):
    """A terminal in place of stderr, opened in the test: pytest puts its own there when the test begins."""

    def open_one() -> Terminal:
        made = Terminal()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "stderr", made)
        return made

    return open_one


def last_frame(terminal: Terminal) -> list[str]:
    """The lines that stay on a terminal after the last removal of a line."""
    frame = terminal.getvalue().split("\x1b[2K")[-1]
    return [line.rstrip() for line in Text.from_ansi(frame).plain.splitlines() if line.strip()]


def test_a_note_stays_until_the_next_one(open_terminal):
    terminal = open_terminal()
    with progress("training", 4, unit="steps") as advance:
        advance(1, "loss 0.5")
        advance(1)
        advance(2)
    (line,) = last_frame(terminal)
    assert "training" in line and "4/4 steps" in line and "loss 0.5" in line and len(line) <= 80


def test_work_within_work_shares_the_display_and_leaves_no_line(open_terminal, monkeypatch):
    terminal = open_terminal()
    monkeypatch.setattr(module, "MOMENT", 0.0)
    with progress("training", 2, unit="steps") as advance:
        advance()
        with stage("evaluating"):
            pass
        advance()
    with stage("writing the report"):
        pass
    assert "evaluating" in terminal.getvalue()
    assert module._Shared.bars is None and module._Shared.users == 0
    assert len(last_frame(terminal)) == 1


def test_a_failure_gives_the_terminal_back(open_terminal):
    terminal = open_terminal()
    with pytest.raises(ZeroDivisionError), progress("outer", 1), stage("inner"):
        raise ZeroDivisionError
    assert module._Shared.bars is None
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h")  # the cursor is back


def test_a_terminal_moves_while_the_work_says_nothing(open_terminal):
    terminal = open_terminal()
    with stage("loading"):
        seen = len(terminal.getvalue())
        for _ in range(100):
            threading.Event().wait(0.05)
            if len(terminal.getvalue()) > seen:
                break
        assert len(terminal.getvalue()) > seen


def test_plain_lines_come_before_the_work_and_while_it_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.02)
    with stage("loading the model"):
        assert capsys.readouterr().err == "loading the model\n"
        found = ""
        for _ in range(200):
            threading.Event().wait(0.02)
            found += capsys.readouterr().err
            if found.count("\n") >= 2:
                break
    assert set(found.splitlines()) == {"loading the model 0 s"}
    assert not any(character < " " and character != "\n" for character in found)


def test_plain_lines_say_how_far_it_is(capsys):
    with progress("training", 10, unit="steps", start=6) as advance:
        for step in range(7, 11):
            advance(1, f"loss {step}" if step % 2 else "")
    first, last = capsys.readouterr().err.splitlines()
    assert first == "training: 4 steps" and last.startswith("training 10/10 steps, ") and last.endswith("; loss 9")


def test_a_notebook_has_one_line_that_changes(monkeypatch, capsys):
    shown: list[dict] = []

    class Handle:
        def update(self, data, raw):
            shown.append(data)

    def display(data, raw, display_id):
        shown.append(data)
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    fake = types.ModuleType("IPython.display")
    fake.display = display
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(Console, "is_jupyter", True, raising=False)
    monkeypatch.setattr(Console, "__init__", lambda self, **_: None)
    with progress("training", 4, unit="steps") as advance:
        advance(2, "loss 0.5")
        assert "0/4 steps" in shown[0]["text/plain"]
    assert shown[-1]["text/plain"].startswith("training " + "█" * 6 + "░" * 6 + " 2/4 steps")
    assert shown[-1]["text/plain"].endswith("; loss 0.5")
    assert capsys.readouterr().err == ""


def test_other_processes_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with progress("training", 2, unit="steps") as advance:
        advance(2, "loss 1")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (185, "3 min 5 s"), (3599.6, "1 h 0 min"), (7800, "2 h 10 min")]
)
def test_durations(seconds, words):
    assert in_time(seconds) == words


def test_every_stage_of_a_run_announces_itself(make_recipe, capsys, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "tokens")  # another test has these rows too
    recipe = make_recipe(
        train={"steps": 2}, sampling={"prompts": 2, "max_tokens": 4, "reward": {"name": "length", "max": 9}}
    )
    train(recipe)
    lines = iter(capsys.readouterr().err.splitlines())
    expected = [
        "reading ",
        "counting what is in the rows",
        "loading the model",
        "reference: ",
        "token by token: ",
        "evaluating before training: ",
        "sampling: ",
        "scoring the samples",
        "training: ",
        "evaluating after training: ",
        "sampling: ",
        "scoring the samples",
        "saving what was trained",
        "writing the report",
    ]
    for label in expected:
        assert any(line.startswith(label) for line in lines), f"no word of {label!r} in its place"


def test_a_resumed_run_says_where_it_goes_on(make_recipe, capsys, monkeypatch):
    from align.training.trainer import AlignTrainer

    recipe = make_recipe(train={"steps": 4, "save_steps": 2})
    log = AlignTrainer.log

    def killed(self, logs, start_time=None):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        log(self, logs, start_time)

    monkeypatch.setattr(AlignTrainer, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.setattr(AlignTrainer, "log", log)
    capsys.readouterr()
    train(recipe)
    assert "goes on from step 2 of 4" in capsys.readouterr().err


def test_the_first_word_comes_before_torch():
    """What is imported first is seen by a finder that says so."""
    script = """
import sys
class Seen:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "datasets"):
            print("IMPORT", name, file=sys.stderr, flush=True)
            sys.exit(3)
sys.meta_path.insert(0, Seen())
from align.cli import main
main(["inspect", "nowhere.yaml"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("align 0.") or not any("IMPORT" in line for line in lines), done.stderr
    assert done.returncode in (2, 3)


def test_commands_announce_what_they_do(make_recipe, rows_file, tmp_path, capsys):
    recipe = make_recipe(train={"steps": 2})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))

    def said(*arguments: str) -> list[str]:
        capsys.readouterr()
        main([*arguments])
        return capsys.readouterr().err.splitlines()

    assert any(line.startswith("reference: ") for line in said("annotate", str(path)))
    main(["train", str(path)])
    rows, run, reward = str(rows_file), recipe.output, "{name: length, max: 9}"
    table = {
        ("inspect", str(path), "data.cache=false"): ("looking at ",),
        ("evaluate", "rows", rows, "--model", run): ("loading the model", "evaluating: "),
        ("export", run, str(tmp_path / "merged"), "--merge"): ("writing the model",),
        ("score", rows, str(tmp_path / "scored.jsonl"), "--reward", reward, "--no-cache"): (
            "reading ",
            "score: ",
        ),
        ("report", run): ("writing the report",),
    }
    for arguments, labels in table.items():
        lines = said(*arguments)
        for label in labels:
            assert any(line.startswith(label) for line in lines), (arguments, label, lines)


def test_a_run_from_python_shows_no_bars_of_transformers(make_recipe, tiny_policy, tmp_path, capsys, monkeypatch):
    """Reading and writing weights: its own bars are as they were afterwards."""
    reward = saved(tmp_path / "scorer", LlamaForSequenceClassification(llama(pad_token_id=2)), letters("</s>"))
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)  # which a command turns off for good
    scorer = {"prompts": 2, "max_tokens": 4, "reward": {"name": "sequence_classifier", "model": reward}}
    capsys.readouterr()
    train(make_recipe(policy={"adapter": {"name": "full"}}, train={"steps": 1}, sampling=scorer))
    assert "it/s" not in (shown := capsys.readouterr().err) and "weights" not in shown and "model shards" not in shown
    LlamaForCausalLM.from_pretrained(tiny_policy)
    assert "Loading weights" in capsys.readouterr().err
