"""Recipes, templates and demo data work by name from any folder, in a checkout and in a wheel; align init."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from align.cli import main
from align.data import read_chat_template
from align.errors import UserError
from align.recipe import load_recipe
from align.recipe.init import TASKS, init
from rewards import read_reward

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["lipo_lambda", "recipes/lipo_lambda.yaml", str(ROOT / "recipes/lipo_lambda.yaml")])
def test_a_recipe_by_name_finds_its_data_from_any_folder(name, elsewhere):
    recipe = load_recipe(name, ["data.eval_sources=data/formats/preference.jsonl"])
    assert Path(recipe.policy.model) == ROOT / "data/story-policy"
    assert Path(recipe.data.sources[0].path) == ROOT / "data/story-lists/train.jsonl.gz"
    assert Path(recipe.data.eval_sources[0].path) == ROOT / "data/formats/preference.jsonl"
    assert recipe.output == "runs/lipo_lambda"


def test_commands_without_a_recipe_find_them_too(elsewhere):
    rows = "data/formats/preference.jsonl"
    main(["score", rows, "scored.jsonl", "--reward", "data/story-scorer", "--no-cache"])
    main(["evaluate", "rewards", rows, "--reward", "data/story-scorer"])
    main(["evaluate", "rows", rows, "--model", "data/story-policy", "--json", "figures.json"])
    main(["chat", "data/story-policy", "--prompt", "Once", "--max-tokens", "2"])
    assert Path("scored.jsonl").exists() and Path("figures.json").exists()


@pytest.mark.parametrize(
    "spec",
    [
        "{model: data/story-scorer}",
        "{name: sequence_classifier, model: data/story-scorer}",
        "{scorer: {model: data/story-scorer}, weight: 2}",
        "reward.yaml",
    ],
)
def test_a_reward_in_yaml_finds_what_ships(spec, elsewhere):
    Path("reward.yaml").write_text("{model: data/story-scorer}")
    reward = read_reward(spec)
    assert Path(reward.scorer.model) == ROOT / "data/story-scorer"
    Path("data/story-scorer").mkdir(parents=True)
    assert read_reward(spec).scorer.model == "data/story-scorer", "one's own goes first"


def test_only_so_many_rows_are_measured_and_one_is_singular(elsewhere, capsys):
    main(["evaluate", "rows", "data/formats/preference.jsonl", "--model", "data/story-policy", "--limit", "1"])
    captured = capsys.readouterr()
    assert "1 list " in captured.out and "training / held-out lists │ 1 / 0" in captured.out
    assert not re.findall(r"\b1 \w+s\b", captured.err), captured.err


def test_files_of_ones_own_go_first(elsewhere):
    (elsewhere / "recipes").mkdir()
    (elsewhere / "recipes/dpo.yaml").write_text((ROOT / "recipes/dpo.yaml").read_text().replace("runs/dpo", "mine"))
    (elsewhere / "data/story-policy").mkdir(parents=True)
    recipe = load_recipe("recipes/dpo.yaml")
    assert (recipe.output, recipe.policy.model) == ("mine", "data/story-policy")


def test_in_a_checkout_paths_stay_as_they_are_written(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("recipes/lipo_lambda.yaml")
    assert recipe.policy.model == "data/story-policy"


def test_a_name_that_is_none_is_answered_with_those_that_are(elsewhere):
    with pytest.raises(UserError, match=r"lipo_lamda: cannot read the recipe .*: dpo, kto, lipo_lambda, "):
        load_recipe("lipo_lamda")


def test_a_template_by_name(elsewhere):
    text = (ROOT / "recipes/templates/plain.jinja").read_text()
    assert read_chat_template("plain") == read_chat_template("recipes/templates/plain.jinja") == text
    (elsewhere / "plain").write_text("{{ mine }}")
    assert read_chat_template("plain") == "{{ mine }}"
    with pytest.raises(UserError, match="plane: no such file; `plain` suits base models"):
        read_chat_template("plane")


@pytest.mark.parametrize("task", TASKS)
def test_init_writes_a_recipe_that_loads_with_ones_own_paths(task, elsewhere, capsys):
    main(["init", task, "--model", "my models/m", "--data", "rows: 1.jsonl"])
    said = capsys.readouterr().out
    assert said.startswith(
        f"{task}.yaml: set rollout.reward there" if task == "online" else f"{task}.yaml: `align insp"
    )
    recipe, shipped = load_recipe(f"{task}.yaml"), load_recipe(TASKS[task].recipe)
    assert (recipe.policy.model, recipe.data.sources[0].path) == ("my models/m", "rows: 1.jsonl")
    assert recipe.output == f"runs/{task}"
    method = ("task", "score", "objective", "regularizer", "reward", "online", "wpo", "dpop", "z_penalty")
    assert [getattr(recipe, key) for key in method] == [getattr(shipped, key) for key in method]
    assert recipe.data.select == shipped.data.select and recipe.data.overlong == shipped.data.overlong
    text = Path(f"{task}.yaml").read_text()
    assert "story" not in text and "data/" not in text
    assert max(map(len, text.splitlines())) <= 120 and text.count("# ") > 15


def test_init_names_what_is_left_to_set(elsewhere, capsys):
    main(["init"])
    assert "set policy.model, data.sources there, then `align inspect preference.yaml`" in capsys.readouterr().out
    main(["init", "online", "--data", "mine.jsonl"])
    assert "set policy.model, rollout.reward there" in capsys.readouterr().out


def test_init_never_overwrites(elsewhere):
    assert init("dpo") == Path("dpo.yaml")
    before = Path("dpo.yaml").read_text()
    with pytest.raises(UserError, match=r"dpo.yaml: is there already; .*: align init dpo --output mine.yaml$"):
        init("dpo")
    given = r"align init dpo --model 'my models/m' --data rows.jsonl --output mine.yaml$"
    with pytest.raises(UserError, match=given):
        init("dpo", model="my models/m", data="rows.jsonl")
    assert Path("dpo.yaml").read_text() == before
    assert init("dpo", "below/mine.yaml").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds what `pip install` puts into site-packages, without the C kernels."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["egg_info", "--egg-base", folder, "build", "--build-base", folder / "build"]
    wheel = ["bdist_wheel", "--bdist-dir", folder / "bdist", "--dist-dir", folder]
    command = [sys.executable, "setup.py", "-q", *map(str, [*build, *wheel])]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CC": "/bin/false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    assert file.stat().st_size < 15e6
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "target")
    return folder / "target"


def test_the_wheel_holds_what_the_first_command_needs(installed):
    there = {str(file.relative_to(installed)) for file in installed.rglob("*") if file.is_file()}
    wanted = {f"align/share/recipes/{file.relative_to(ROOT / 'recipes')}" for file in (ROOT / "recipes").rglob("*.*")}
    wanted |= {f"align/share/data/story-policy/{name}" for name in ("model.safetensors", "tokenizer.json")}
    wanted |= {
        "align/share/data/story-lists/train.jsonl.gz",
        "align/recipe/init.yaml.jinja",
        "align/report/page.html.jinja",
    }
    assert wanted <= there
    assert not [name for name in there if name.startswith(("tests/", "recipes/", "data/"))]


def test_an_installed_wheel_inspects_a_recipe_by_name_from_an_empty_folder(installed, elsewhere):
    program = (
        "import align, sys; from pathlib import Path; assert Path(align.__file__).parents[1] == Path(sys.argv[1]); "
        "from align.cli import main; main(['inspect', 'lipo_lambda', 'data.limit=5', '--rows', '1'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(installed)],
        env=os.environ | {"PYTHONPATH": str(installed), "HF_HOME": str(elsewhere / "cache")},
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{installed}/align/share/data/story-policy" in done.stdout.replace("\n", "")
    assert "training / held-out lists" in done.stdout
