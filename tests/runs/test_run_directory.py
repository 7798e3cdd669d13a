"""What a second call on a run directory does: goes on, begins anew where nothing was done, or refuses."""

import pytest

from align.errors import UserError
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
