"""README: every place that it names is there, and every command that it shows is one."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from align.cli import _parser
from align.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:sh)?\n(.*?)```", README, flags=re.S)


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
