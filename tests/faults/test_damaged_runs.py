"""Every file of a run, damaged in every way, and every command that reads a run: the same result or one sentence.

The default run takes one way a file, another for each, and what is most harmful; `-m slow` takes all.
"""

import json
import os
import shutil
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from harm import HARMS, as_a_plain_user, files_of, restore
from table import case

from align.cli import main
from align.manifest import check, seal
from align.training.trainer import AlignTrainer

STEPS, KILLED = 4, 3
HARMFUL = [
    (f"checkpoints/checkpoint-{KILLED}/{name}", harm)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "policy.safetensors")
    for harm in ("missing", "flipped")
] + [
    ("metrics.jsonl", "truncated"),
    ("metrics.jsonl", "missing"),
    ("before.json", "flipped"),
    ("given.json", "missing"),
    ("recipe.yaml", "flipped"),
    ("digests.json", "empty"),
    ("best/policy.safetensors", "flipped"),
    ("best/manifest.json", "missing"),
]


class Place(NamedTuple):
    """Where a table's cases are tried."""

    folder: Path
    run: Path
    killed: Path
    """A copy of the run when it was killed before its last step, and of its end."""
    finished: Path
    rows: Path


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_policy, rows_file) -> Place:
    folder = tmp_path_factory.mktemp("damaged")
    tree = {
        "output": str(folder / "run"),
        "policy": {"model": str(tiny_policy), "adapter": {"name": "lora", "rank": 4, "dropout": 0.1}},
        "reference": {"cache_dir": str(folder / "cache")},
        "data": {"sources": [str(rows_file)], "limit": 8, "eval_fraction": 0.25, "grades": "raw"},
        "objective": "lambda",
        "train": {"steps": STEPS, "lists_per_step": 2, "threads": 1, "save_steps": 1, "learning_rate": 1e-2},
        "sampling": {"prompts": 1, "max_tokens": 2},
    }
    tree["train"] |= {"eval_steps": 2, "keep_best": "loss"}
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    step = AlignTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:

        def killed(self, *given):
            if self.state.global_step == KILLED:
                raise Killed
            return step(self, *given)

        patch.setattr(AlignTrainer, "training_step", killed)
        with pytest.raises(Killed):
            main(["train", str(folder / "r.yaml")])
    shutil.copytree(folder / "run", folder / "killed")
    main(["train", str(folder / "r.yaml")])
    shutil.copytree(folder / "run", folder / "finished")
    return Place(folder, folder / "run", folder / "killed", folder / "finished", rows_file)


def train(place: Place) -> dict[str, bytes]:
    main(["train", str(place.folder / "r.yaml")])
    return {file: (place.run / "adapter" / file).read_bytes() for file in files_of(place.run / "adapter")}


def report(place: Place) -> dict[str, bytes]:
    main(["report", str(place.run), "--output", str(place.folder / "page.html")])
    return {"page": (place.folder / "page.html").read_bytes()}


def export(place: Place) -> dict[str, bytes]:
    output = place.folder / "exported"
    shutil.rmtree(output, ignore_errors=True)
    main(["export", str(place.run), str(output)])
    # Where the run's state is damaged, the adapter's folder stands for it in the comparison, whose figures round apart.
    figures = ("export.json", "README.md", "digests.json")
    return {file: (output / file).read_bytes() for file in files_of(output) if file not in figures}


def evaluate(place: Place) -> dict[str, bytes]:
    figures = place.folder / "figures.json"
    main(["evaluate", "rows", str(place.rows), "--model", str(place.run), "--json", str(figures)])
    return {"metrics": json.dumps(json.loads(figures.read_text())["metrics"]).encode()}


CASES = ((train, "killed"), (train, "finished"), (report, "finished"), (export, "finished"), (evaluate, "finished"))


class Outcome(NamedTuple):
    """How a command takes a damaged file."""

    code: int
    said: str = ""
    wrong: str = ""
    """Empty where nothing is."""


def outcome(place: Place, command, source: Path, expected: dict[str, bytes], file: str, harm: str, capsys) -> Outcome:
    restore(source, place.run)
    HARMS[harm](place.run / file)
    capsys.readouterr()
    try:
        with as_a_plain_user():
            found = command(place)
    except SystemExit as stopped:
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align: ")]
        fine = stopped.code == 2 and len(said) == 1 and Path(file).name in said[0]
        return Outcome(int(stopped.code or 0), said[0] if fine else "", "" if fine else f"exit {stopped.code}, {said}")
    except BaseException as error:
        return Outcome(1, wrong=f"traceback: {error!r}")
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return Outcome(0, wrong=f"another result: {wrong}" if wrong else "")


def chosen(source: Path, *, every: bool) -> list[tuple[str, str]]:
    files = files_of(source)
    if every:
        return [(file, harm) for file in files for harm in HARMS]
    newest = [file for file in files if "checkpoint-" not in file or f"checkpoint-{max(KILLED, 0)}" in file]
    return [*zip(newest, cycle(HARMS), strict=False)]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(("command", "state"), CASES, ids=lambda own: getattr(own, "__name__", own))
def test_the_same_result_or_one_sentence_that_names_the_file(place, capsys, record_property, command, state, every):
    source = getattr(place, state)
    restore(place.finished, place.run)
    expected = command(place)
    cases = chosen(source, every=every)
    if command is train and not every:
        cases = HARMFUL if state == "killed" else cases[::3]
    results = {chosen: outcome(place, command, source, expected, *chosen, capsys) for chosen in cases}
    for (file, harm), own in results.items():
        what = f"{command.__name__} of a {state} run, {file} {harm}"
        record_property(*case(what, code=own.code, said=own.said, wrong=own.wrong))
    assert not {chosen: own.wrong for chosen, own in results.items() if own.wrong}
    assert os.path.exists(place.folder / "r.yaml") and len(results) > 5


def test_stray_folders_are_passed_over(place, capsys):
    restore(place.finished, place.run)
    expected = train(place)
    restore(place.killed, place.run)
    for name in ("checkpoint-abc", "checkpoint-12", "checkpoint-007"):
        (place.run / "checkpoints" / name).mkdir()
    (place.run / "checkpoints" / "checkpoint-9").write_text("a file")
    capsys.readouterr()
    assert train(place) == expected
    said = capsys.readouterr().err
    assert "checkpoint-12 is passed over" in said and f"goes on from step {KILLED} of {STEPS}" in said
    left = {one.name for one in (place.run / "checkpoints").iterdir()}
    assert left == {
        "checkpoint-abc",
        "checkpoint-007",
        "checkpoint-9",
        f"checkpoint-{STEPS - 1}",
        f"checkpoint-{STEPS}",
    }


def test_a_checkpoint_of_another_recipe_is_one_sentence(place, capsys):
    restore(place.killed, place.run)
    newest = place.run / "checkpoints" / f"checkpoint-{KILLED}"
    seal(newest, check(newest) | {"recipe": "0" * 64})
    with pytest.raises(SystemExit) as stopped:
        train(place)
    assert stopped.value.code == 2
    assert f"{newest}: a checkpoint of another run (of other recipe); move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "export {}/adapter out",
        "evaluate rows {rows} --model {}/adapter",
        "evaluate rewards {rows} --reward {}/adapter",
        "score {rows} s.jsonl --reward {}/adapter --no-cache",
        "train r.yaml output=next policy.start_adapter={}/adapter",
        'train r.yaml output=next token_rewards={{"name":"log_ratio","model":"{}"}} regularizer={{"name":"token_reg"}}',
    ],
)
def test_an_adapter_that_is_named_by_itself_is_held_to_its_runs_digests(place, capsys, monkeypatch, command):
    monkeypatch.chdir(place.folder)
    restore(place.finished, place.run)
    HARMS["flipped"](place.run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(SystemExit) as stopped:
        main(command.format(place.run, rows=place.rows).split())
    assert stopped.value.code == 2
    assert f"{place.run}/adapter/adapter_model.safetensors: damaged" in capsys.readouterr().err
