"""README and docs: every command, key, option, path and name in them exists; programs and recipes in them run."""

import argparse
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import venv
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from align.bench.__main__ import names as benchmarks
from align.cli import _parser, main
from align.data.formats import read_row
from align.errors import UserError
from align.model.adapters import ADAPTER
from align.objectives import OBJECTIVES, PROPERTIES
from align.objectives.contract import check_objective
from align.recipe import Recipe, dump_recipe, load_recipe, parse_recipe, recipe_keys
from align.studies.plan import plan_study
from align.training.train import train
from rewards import read_reward

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), **PAGES}
WRITTEN = {"docs/recipe-keys.md", "docs/formulas.md", "docs/figures.md"}
KEYS = recipe_keys()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BASES = (
    {"task": "preference", "objective": "logistic"},
    {"task": "sft"},
    {"task": "reward", "objective": "bradley_terry"},
)
"""What a part of a recipe may be a part of."""


class Block(NamedTuple):
    """A fenced block, and why it is not checked."""

    page: str
    language: str
    text: str
    reason: str


def blocks() -> list[Block]:
    fence = re.compile(r"(?:^<!-- not checked: ([^>]+) -->\n)?^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
    return [Block(page, lang, text, why) for page, whole in PAGES.items() for why, lang, text in fence.findall(whole)]


BLOCKS = blocks()


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.S | re.M)


def spans() -> list[tuple[str, str]]:
    """Page and inline code, line ends within it taken out."""
    return [(page, " ".join(span.split())) for page in PAGES for span in re.findall(r"`([^`]+)`", prose(page))]


def commands() -> list[str]:
    """Every command of the shell blocks, and every whole `align` command within a line."""
    shell = [block.text.replace("\\\n", "") for block in BLOCKS if block.language == "sh" and not block.reason]
    lines = [part.strip() for text in shell for line in text.splitlines() for part in line.split(" && ")]
    inline = [span for _, span in spans() if re.match(r"(align|accelerate launch) (?!evaluate \w+$)\S+ \S", span)]
    return sorted({*lines, *(span for span in inline if not re.search(r"[A-Z]{3}|\.\.\.|\[", span))})


def sections(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def tree() -> list[str]:
    """The paths of the file tree."""
    (block,) = [block.text for block in BLOCKS if block.text.startswith("align/\n")]
    paths, room = [], ""
    for line in block.splitlines():
        indent, names = len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0]
        if indent > 2 or not names:
            continue  # a comment goes on
        room = names if indent == 0 else room
        paths += [room if indent == 0 else room + name for name in names.split(", ")]
    return paths


def test_a_block_says_what_it_is_and_every_page_is_in_the_navigation():
    assert {block.language for block in BLOCKS} == {"sh", "python", "yaml", "json", "text"}
    assert {block.language for block in BLOCKS if block.reason} == {"sh"}
    assert not [block for block in BLOCKS if block.language == "text" and re.search(r"^align \w", block.text, re.M)]
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [page for part in navigation for page in next(iter(part.values()))]
    written = ["index.md", "contributing.md", "changelog.md"]
    assert sorted(named) == sorted([Path(page).name for page in PAGES if page.startswith("docs/")] + written)
    assert not [page for page in PAGES if page.startswith("docs/") and f"({page})" not in README]


def test_readme_takes_three_minutes():
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("page", PAGES)
def test_every_place_that_a_page_names_is_there(page):
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not link.startswith("http"):
            target, _, anchor = link.partition("#")
            path = (here / target).resolve() if target else ROOT / page
            assert path.exists(), link
            assert not anchor or anchor in sections(path), link
    named = re.findall(r"(?<![\w/.])(?:data|recipes|tests|align|rewards|docs)/[\w./-]*[\w/]", PAGES[page])
    missing = [name for name in named if not (ROOT / name).exists()]
    assert page in WRITTEN or not missing


def test_every_test_that_a_page_names_is_there():
    named = {span for _, span in spans() if re.fullmatch(r"(pytest )?tests/\S+::\w+", span)}
    assert len(named) > 50
    for name in named:
        path, _, function = name.removeprefix("pytest ").partition("::")
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_the_file_tree_names_every_room_and_nothing_else():
    paths = tree()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    rooms = {f"{p.name}/" for p in (ROOT / "align").iterdir() if p.is_dir() and p.name != "__pycache__"}
    files = {p.name for p in (ROOT / "align").glob("*.py") if p.name != "__init__.py"}
    assert {path.removeprefix("align/") for path in paths if path.startswith("align/")} - {""} == rooms | files


def check_overrides(recipe: str, overrides: list[str]) -> None:
    """Keys and values fit a recipe: the one named, where it is there, else one that has what every run needs."""
    path = ROOT / recipe if recipe.startswith("recipes/") else ROOT / "recipes/dpo.yaml"
    load_recipe(path, overrides)


def check_installation(words: list[str]) -> None:
    """`python3 -m venv FOLDER`, or pip with constraints and extras that are there."""
    if words[:3] == ["python3", "-m", "venv"]:
        return
    extras = re.findall(r"\.\[(\w+)\]", " ".join(words))
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).exists()


def check_tests(words: list[str]) -> None:
    """pytest on paths and with marks that are there."""
    marks = [mark.partition(":")[0] for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    options = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("-")}
    assert options.get("-m", marks[0]) in marks
    assert not [word for word in words if "/" in word and not (ROOT / word.partition("::")[0]).exists()]


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one(command):
    """Parsed by what would run it; what is no command of this project stands behind a comment that says why."""
    words = shlex.split(command)
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[:2] == ["accelerate", "launch"]:
        end = words.index("align.cli") + 1
        assert launch_command_parser().parse_args(words[2:end]).module
        words = ["align", *words[end:]]
    if words[0] == "align":
        parsed, rest = _parser().parse_known_args(words[1:])
        assert all("=" in word for word in rest)
        if hasattr(parsed, "overrides"):
            check_overrides(parsed.recipe, [*parsed.overrides, *rest])
    elif words[:3] == ["python", "-m", "align.bench"]:
        assert words[3] in benchmarks() and words[4] == "--json" and len(words) == 6
    elif words[0] == "pytest":
        check_tests(words[1:])
    elif words[0] in ("pip", "python3"):
        check_installation(words)
    elif words[0] in ("mkdocs", "ruff", "mypy"):
        assert any(words[0] in one for extra in ("docs", "test") for one in extra_of(extra))
    else:
        assert len(words) == 1 and os.access(ROOT / words[0], os.X_OK), "no command that is known here"


def extra_of(name: str) -> list[str]:
    return PROJECT["project"]["optional-dependencies"][name]


def part_of_a_recipe(tree: dict) -> bool:
    """Whether some kind of recipe may hold it."""
    base = {"output": "x", "policy": {"model": "m"}, "data": {"sources": ["r", "q"]}}
    for kind in BASES:
        try:
            parse_recipe(base | kind | tree, origin="part")
            return True
        except UserError:
            continue
    return False


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in ("yaml", "json")], ids=lambda block: block.page
)
def test_recipes_scorers_and_rows_are_ones(block, tmp_path):
    if block.language == "json":
        assert [read_row(json.loads(line), "rows", 1) for line in block.text.splitlines()]
        return
    tree = yaml.safe_load(block.text)
    if "vary" in tree:
        (tmp_path / "study.yaml").write_text(block.text)
        assert len(plan_study(str(tmp_path / "study.yaml")).arms) > 1
    elif "scorer" in tree:
        (tmp_path / "reward.yaml").write_text(block.text)
        assert read_reward(str(tmp_path / "reward.yaml")).transforms
    else:
        assert part_of_a_recipe(tree)


def test_inline_choices_are_ones_of_a_recipe_a_scorer_or_a_transform():
    places = ("objective", "score", "regularizer", "token_weights", "rollout.decoding")
    found = {span for page, span in spans() if page not in WRITTEN and re.fullmatch(r"\{name: .*\}", span)}
    found = {span for span in found if "..." not in span}  # what is left out there is shown in the keys
    assert len(found) > 7
    for span in found:
        tree = yaml.safe_load(span)
        nested = [{one: tree} if "." not in one else {"rollout": {"decoding": tree}} for one in places]
        if not any(part_of_a_recipe(one) for one in nested):
            given = span if tree["name"] != "lsc" else f"{{scorer: {{name: length, max: 9}}, transforms: [{span}]}}"
            assert read_reward(given).scorer.name in ("length", tree["name"])


def test_inline_keys_are_keys_of_recipes_and_values_fit():
    seen = Counter()
    for page, span in spans():
        section = re.match(r"\w+", span)
        if section is None or section[0] not in Recipe.model_fields or page in WRITTEN:
            continue
        if re.fullmatch(r"\w+(\.\w+)+", span) and not span.endswith((".py", ".yaml", ".jsonl", ".csv")):
            assert span in KEYS, (page, span)
            seen["keys"] += 1
        elif re.match(r"[\w.]+=", span):
            check_overrides("", re.split(r" (?=[a-z_]+(?:\.\w+)*=)", span))
            seen["overrides"] += 1
        elif found := re.fullmatch(r"(\w+(?:\.\w+)+): (.+)", span):
            check_overrides("", [f"{found[1]}={found[2]}"])
            seen["overrides"] += 1
        elif re.fullmatch(r"\w+: .+", span):
            assert part_of_a_recipe(yaml.safe_load("{" + span + "}")), (page, span)
            seen["parts"] += 1
    assert seen["keys"] > 20 and seen["overrides"] > 5 and seen["parts"] > 20


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for one in action.choices.values() for option in options_of(one)}
    return found


def test_inline_options_commands_and_names_are_there():
    options = options_of(_parser())
    for page, span in spans():
        if page in WRITTEN:
            continue
        if span.startswith("--"):
            assert span.split()[0] in options, (page, span)
        elif found := re.match(r"align (\w+)(?: (rows|rewards|winrate)\b)?", span):
            words = [word for word in found.groups() if word]
            with pytest.raises(SystemExit) as stop:
                _parser().parse_args([*words, "--help"])
            assert stop.value.code == 0, (page, span)
        elif re.fullmatch(r"(align|rewards)(\.\w+)+", span):
            pkgutil.resolve_name(span)


def test_nothing_is_said_twice():
    said = Counter()
    for page in PAGES.keys() - WRITTEN:
        sentences = re.split(r"(?<=[.:;])\s|\n\n|\|", prose(page))
        said.update({" ".join(one.split()) for one in sentences if len(" ".join(one.split())) > 40})
    said = {one: times for one, times in said.items() if not re.fullmatch(r"(`tests/\S+`(, )?)+", one)}
    assert [sentence for sentence, times in said.items() if times > 1] == []


def test_the_written_pages_say_what_the_code_says():
    specification = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    of_pages = ("rows", "look", "trl", "import", "adapters", "export", "optimizers")
    others = {f"docs/{page}.md" for page in of_pages}
    assert {f"docs/{page}" for page in generate.PAGES} == WRITTEN | others
    for page, text in generate.PAGES.items():
        assert PAGES[f"docs/{page}"] == text(), f"run `python docs/generate.py`: {page} is not what the code says"


def test_every_key_and_objective_is_in_the_written_pages():
    """Looked up in what was written, by another way than it was."""
    keys = PAGES["docs/recipe-keys.md"]
    missing = [key for key in KEYS if f"| `{key.rpartition('.')[2]}` |" not in keys and not key.endswith(".name")]
    assert missing == []
    assert all(f"### `{name}`" in PAGES["docs/formulas.md"] for name in OBJECTIVES)
    assert all(f"`{name}`" in PAGES["docs/objectives.md"] for name in OBJECTIVES)
    assert all(f"`{name}`" in PAGES["docs/adapters.md"] for name in ADAPTER.classes)


def kernels_give_what_torch_gives(names: dict) -> None:
    whole = (names["hidden"] @ names["head"].T).log_softmax(-1)
    assert names["logprobs"].allclose(whole[range(5), [3, 1, 4, 1, 5]], atol=1e-5)
    assert names["drawn"].token.shape == (5,)


def the_rewards_differ(names: dict) -> None:
    sunny, rainy = names["rewards"]
    assert sunny != rainy


def it_keeps_the_contract(names: dict) -> None:
    check_objective(names["squared_hinge"], "own.py:squared_hinge", PROPERTIES["hinge"], {"margin": 2.0})


def they_are_ours(names: dict) -> None:
    assert names["DPOTrainer"].__module__ == names["DPOConfig"].__module__.replace("config", "dpo") == "align.trl.dpo"


def it_was_told(names: dict) -> None:
    assert len(names["margins"]) >= 3 and names["result"].summary["steps"] == 3
    assert names["result"].heldout.column("figure")[0] == "loss"


PROGRAMS = {
    "docs/kernels.md": kernels_give_what_torch_gives,
    "docs/scoring.md": the_rewards_differ,
    "docs/objectives.md": it_keeps_the_contract,
    "docs/trl.md": they_are_ours,
    "docs/python.md": it_was_told,
}
"""Page -> what holds after its program has run; README's has a test of its own."""


def test_every_program_is_run():
    pages = [block.page for block in BLOCKS if block.language == "python"]
    assert sorted(pages) == sorted(["README.md", *PROGRAMS])


@pytest.mark.parametrize("page", PROGRAMS)
def test_a_program_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    (program,) = [block.text for block in BLOCKS if block.language == "python" and block.page == page]
    names: dict = {}
    exec(compile(program, page, "exec"), names)
    PROGRAMS[page](names)


def test_what_it_says_of_trls_losses_is_a_recipe():
    rows = re.findall(r"^\| `\w+` \| (`objective.*`) \|$", PAGES["docs/objectives.md"], flags=re.M)
    assert len(rows) == 20
    base = {"output": "x", "policy": {"model": "m"}, "data": {"sources": ["r"]}}
    for row in rows:
        parse_recipe(base | yaml.safe_load("{" + row.strip("`") + "}"), origin=row)


def fenced(language: str) -> str:
    """README's one block of a language."""
    (block,) = [block.text for block in BLOCKS if block.page == "README.md" and block.language == language]
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
    rows = re.findall(r"^\| [^|]+ \| `(policy[^`]+)` \| ([^|]+) \|$", PAGES["docs/adapters.md"], flags=re.M)
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
