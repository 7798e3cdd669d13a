"""README: every place that it names is there, and every command that it shows is one."""

import json
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from align.cli import _parser, main
from align.recipe import dump_recipe, load_recipe, parse_recipe
from align.training.train import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.S | re.M)
BLOCKS = [block for language, block in FENCED if language in ("", "sh")]


def commands() -> list[str]:
    """The `align` commands of the code blocks, those with placeholders left out."""
    blocks = [block.replace("\\\n", "") for block in BLOCKS]
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    lines = [part.strip() for line in lines for part in line.split("&&")]
    found = [re.sub(r"^(\.venv/bin/|accelerate launch -m )align(\.cli)?", "align", line) for line in lines]
    return sorted({line for line in found if line.startswith("align ") and not re.search(r"[A-Z]{3}|\.\.\.|\[", line)})


def tree() -> list[str]:
    """The paths of the file tree."""
    (block,) = [block for block in BLOCKS if block.startswith("align/\n")]
    paths, room = [], ""
    for line in block.splitlines():
        indent, names = len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0]
        if indent > 2 or not names:
            continue  # a comment goes on
        room = names if indent == 0 else room
        paths += [room if indent == 0 else room + name for name in names.split(", ")]
    return paths


def test_links_and_named_files_are_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    named = re.findall(r"(?<![\w/.])(?:data|recipes|tests|align|rewards)/[\w./-]*[\w/]", README)
    assert links and len(named) > 20
    missing = [name for name in {*links, *named} if not (ROOT / name).exists()]
    assert not missing


def test_the_file_tree_names_every_room_and_nothing_else():
    paths = tree()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    rooms = {f"{p.name}/" for p in (ROOT / "align").iterdir() if p.is_dir() and p.name != "__pycache__"}
    files = {p.name for p in (ROOT / "align").glob("*.py") if p.name != "__init__.py"}
    assert {path.removeprefix("align/") for path in paths if path.startswith("align/")} - {""} == rooms | files


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one(command):
    parsed, rest = _parser().parse_known_args(shlex.split(command)[1:])
    assert all("=" in word for word in rest)
    recipe = getattr(parsed, "recipe", "")
    if recipe.startswith("recipes/"):
        load_recipe(ROOT / recipe, [*parsed.overrides, *rest])


def test_what_it_says_of_trls_losses_is_a_recipe():
    rows = re.findall(r"^\| `\w+` \| (`objective.*`) \|$", README, flags=re.M)
    assert len(rows) == 20
    base = {"output": "x", "policy": {"model": "m"}, "data": {"sources": ["r"]}}
    for row in rows:
        parse_recipe(base | yaml.safe_load("{" + row.strip("`") + "}"), origin=row)


def fenced(language: str) -> str:
    """The one code block of a language."""
    (block,) = [block for name, block in FENCED if name == language]
    return block


def test_a_recipe_of_six_lines_and_python_of_five(tiny_policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe, program = fenced("yaml"), fenced("python")
    assert len(recipe.splitlines()) == 6 and len(program.splitlines()) == 5
    model = "Qwen/Qwen2.5-0.5B-Instruct"
    assert model in recipe
    Path("mine.yaml").write_text(recipe.replace(model, str(tiny_policy)))
    rows = [{"prompt": f"w{3 + i}", "chosen": f" w3 w{5 + i}", "rejected": f" w4 w{6 + i}"} for i in range(30)]
    Path("my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(compile(program, "README.md", "exec"), {})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pair accuracy ")]
    assert re.fullmatch(r"pair accuracy 0\.500 -> [01]\.\d{3}, the adapter is in runs/mine/adapter", line)
    assert Path("runs/mine/adapter/adapter_model.safetensors").exists()


def test_four_ways_from_sft_to_preferences_have_the_reference_that_it_says(make_recipe, tiny_policy, tmp_path):
    """Against the model that it starts from a policy's margins are 0 before the first step; against the base not."""
    rows = re.findall(r"^\| [^|]+ \| `(policy[^`]+)` \| ([^|]+) \|$", README, flags=re.M)
    assert len(rows) == 4
    sft = train(make_recipe("sft", task="sft", objective=(), sampling={"prompts": 0})).path
    main(["export", str(sft), str(tmp_path / "sft-model"), "--merge"])
    started = {}
    for number, (overrides, reference) in enumerate(rows):
        path = tmp_path / f"{number}.yaml"
        path.write_text(dump_recipe(make_recipe(f"way{number}", train={"steps": 1}, sampling={"prompts": 0})))
        own = overrides.replace("sft-model", f"{tmp_path}/sft-model").replace("runs/sft", str(sft))
        given = re.split(r" (?=policy\.)", own.replace("BASE", str(tiny_policy)))
        summary = train(load_recipe(path, given)).summary
        started[reference] = summary["eval_before"]
    margins = {reference: figures["margin"] for reference, figures in started.items()}
    assert len(margins) == 4
    for reference, margin in margins.items():
        assert (abs(margin) > 1e-2) if "base" in reference else abs(margin) < 1e-4, (reference, margin)
    likelihood = {round(figures["likelihood_ndcg"], 4) for figures in started.values()}
    assert len(likelihood) == 1, "all four start from the same policy"


def test_the_environment_is_activated_as_it_says(tmp_path):
    assert "`. .venv/bin/activate`" in README
    venv.create(tmp_path / ".venv")
    command = ". .venv/bin/activate && python -c 'import sys; print(sys.prefix)'"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / ".venv") != sys.prefix
