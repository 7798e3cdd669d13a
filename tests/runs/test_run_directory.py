"""What a second call on a run directory does: goes on, begins anew where nothing was done, or refuses."""

import os

import pytest

from align.errors import UserError
from align.files import remove_folder, replaced_folder
from align.recipe import load_recipe
from align.runs.run_directory import RunDirectory
from align.training.train import train


def test_a_recipe_that_was_refused_before_any_work_can_be_mended_in_place(make_recipe, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, row 1, field completions: missing"):
        train(make_recipe(data={"sources": [str(tmp_path / "bad.jsonl")]}))
    mended = make_recipe(train={"steps": 1})
    result = train(mended)
    assert result.summary["steps"] == 1
    assert load_recipe(result.path / "recipe.yaml") == mended


@pytest.mark.parametrize(("old", "new"), [("0.25", "0.35"), ('"step": 1', '"step"; 1')])
def test_a_damaged_line_of_metrics_is_passed_over_and_said(tmp_path, caplog, old, new):
    run, lines = RunDirectory(tmp_path), [{"step": k, "loss": 0.25 * k} for k in (1, 2, 3)]
    for line in lines:
        run.append_metrics(line)
    assert run.read_metrics() == lines
    run.metrics.write_text(run.metrics.read_text().replace(old, new))
    assert run.read_metrics() == lines[1:] and f"{run.metrics}, line 1: damaged, passed over" in caplog.text


def test_another_recipe_is_refused_once_there_is_work(make_recipe):
    recipe = make_recipe()
    run = RunDirectory(recipe.output)
    run.open(recipe)
    run.before.write_text("{}")
    run.open(recipe)
    with pytest.raises(UserError, match=r"another recipe \(it differs in score.beta, train.seed\); set `output`"):
        run.open(make_recipe(train={"seed": 1}, score={"name": "log_ratio", "beta": 0.2}))
    assert load_recipe(run.recipe) == recipe


def test_an_output_that_is_a_file_or_a_folder_of_something_else(make_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: a file; give `output` a folder"):
        RunDirectory(tmp_path / "file").open(make_recipe())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    with pytest.raises(UserError, match="photos: holds files that are no run; give `output` another folder"):
        RunDirectory(tmp_path / "photos").open(make_recipe())


def start(make_recipe, tmp_path, run) -> str:
    with pytest.raises(UserError) as refusal:
        train(make_recipe("second", policy={"start_run": str(run)}))
    assert not (tmp_path / "second" / "metrics.jsonl").exists(), "refused before the first step"
    return str(refusal.value)


def test_a_start_that_is_no_finished_run(make_recipe, tmp_path):
    assert f"{tmp_path}: holds no run (there is no recipe.yaml)" in start(make_recipe, tmp_path, tmp_path)
    first = train(make_recipe("first", train={"steps": 2})).path
    (first / "summary.json").unlink()  # as a kill in the last evaluation leaves it
    message = f"policy.start_run: the run in {first} is not finished; let `align train` end it"
    assert start(make_recipe, tmp_path, first) == message


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_kill_while_a_checkpoint_or_the_best_policy_is_removed_leaves_no_part_of_it(make_recipe, monkeypatch):
    """Retention removes a checkpoint, and a better policy replaces another, file by file."""
    recipe = make_recipe()
    run = RunDirectory(recipe.output)
    run.open(recipe)
    for folder in (run.checkpoints / "checkpoint-1", run.best):
        folder.mkdir(parents=True)
        for name in ("manifest.json", "optimizer.pt"):
            (folder / name).write_text("a")

    def killed_after_the_first(path, **_):
        if files := sorted(path.glob("*")):
            files[0].unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("align.files.shutil.rmtree", killed_after_the_first)
        with pytest.raises(Killed):
            remove_folder(run.checkpoints / "checkpoint-1")
        with pytest.raises(Killed), replaced_folder(run.best) as new:
            (new / "policy.safetensors").write_text("b")
    assert not (run.checkpoints / "checkpoint-1").exists()
    assert [file.name for file in run.best.iterdir()] == ["policy.safetensors"]
    RunDirectory(recipe.output).open(recipe)
    assert not [*run.checkpoints.iterdir()] and not [*run.path.glob(".*.removed")]


def test_a_kill_between_a_runs_figures_and_its_page_is_made_good_by_the_same_command(make_recipe):
    recipe = make_recipe(train={"steps": 1}, sampling={"prompts": 0})
    page = train(recipe).path / "report.html"
    page.unlink()
    page.with_name("report.html.tmp").write_text("half")
    train(recipe)
    assert "</html>" in page.read_text()
    assert not page.with_name("report.html.tmp").exists()
    page.write_text("of a shorter run")
    os.utime(page, (0, 0))
    train(recipe)
    assert "</html>" in page.read_text()
