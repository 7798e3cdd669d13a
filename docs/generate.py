"""Write the pages that say what the code and the measurements say: recipe keys, formulas, figures.

    python docs/generate.py

A test holds the pages to what this gives. Nothing here says anything of its own: the words are the sections'
attribute docstrings, the functions' docstrings, and the figures of `data/benchmarks`.
"""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from pydantic import BaseModel

from align.objectives import OBJECTIVES, PROPERTIES, SCORES
from align.objectives.lambda_loss import lambda_weights
from align.recipe import Recipe

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "data/benchmarks"
WRITTEN = "<!-- Written by docs/generate.py; change what it reads, then run it. -->"
BOUNDS = {"minimum": "&ge;", "exclusiveMinimum": "&gt;", "maximum": "&le;", "exclusiveMaximum": "&lt;"}
MARKS = {"Free": "May change on a begun run.", "Grows": "May grow on a begun run."}
GRADES = {
    "any": "any",
    "unit": "from 0 to 1",
    "nonnegative": "0 or more",
    "exponent": "from -64 to 64",
    "relevance": "from 0 to 64",
}

KEYS = f"""# Look up a key of a recipe

{WRITTEN}

Every key there is, from the schema that recipes are checked with. A key is written with its section, in YAML or on the
command line (`train.learning_rate=1e-4`); a choice may be given by its name alone (`objective=logistic`). Keys that may
change or grow on a begun run say so; [Write a recipe](recipes.md) tells what that means.

"""
FORMULAS = f"""# Look up the formula of an objective

{WRITTEN}

`s` is a completion's score in nats, `g` its grade, larger is better; a tie forms no pair. For one pair `d` is
`s_i - s_j`, and a list's loss is the sum over its pairs with `g_i > g_j`. Where completions are chosen or rejected, the
chosen are those with the list's best grade, with `a` the score of the chosen and `b` of the rejected on a list of two.
`lp_t` and `ref_t` are a token's log-probabilities under policy and reference, `T` the number of its tokens,
`sg` stops the gradient. The options are among [the recipe's keys](recipe-keys.md#objective).

"""


def recipe_keys() -> str:
    """The page of keys."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    headings = _headings(schema, definitions)
    parts = [KEYS, "## The whole recipe\n\n", _table(schema, _class("Recipe"), headings)]
    for name, (level, heading) in headings.items():
        if level == "##" or name not in definitions:
            parts.append(f"\n## {heading}\n")
        if name not in definitions:
            continue
        if level == "###":
            parts.append(f"\n### {heading}\n")
        section = definitions[name]
        parts.append(f"\n{_prose(section['description'])}\n\n" if "description" in section else "\n")
        parts.append(_table(section, _class(name), headings))
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).rstrip() + "\n"


def _headings(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Section -> level and heading, in the order in which a reader of the recipe meets them, each once."""
    found: dict[str, tuple[str, str]] = {}

    def walk(section: dict[str, Any], path: str) -> None:
        for key, value in section.get("properties", {}).items():
            names, where = _sections(value), f"{path}.{key}".lstrip(".")
            new = [name for name in names if name not in found]
            if new and len(names) > 1:
                found[f"choice {where}"] = ("##", f"`{where}`")
            for name in new:
                own = definitions[name]["properties"].get("name", {}).get("const")
                found[name] = ("###", f"`{where}: {own}`") if len(names) > 1 else ("##", f"`{where}`")
            for name in new:
                walk(definitions[name], where)

    walk(schema, "")
    return found


def _sections(value: Any) -> list[str]:
    """Names of the definitions that a key's value may be."""
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
        return own + [name for key, part in value.items() if key != "discriminator" for name in _sections(part)]
    return [name for part in value for name in _sections(part)] if isinstance(value, list) else []


def _class(name: str) -> type[BaseModel]:
    def below(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield cls
        for one in cls.__subclasses__():
            yield from below(one)

    return next(cls for cls in below(BaseModel) if cls.__name__ == name and cls.__module__.startswith(("align", "rew")))


def _table(section: dict[str, Any], cls: type[BaseModel], headings: dict[str, tuple[str, str]]) -> str:
    """The keys of one section."""
    rows = []
    for key, value in section.get("properties", {}).items():
        if "const" in value:
            continue  # the name of a choice, which its heading says
        marks = [MARKS[type(mark).__name__] for mark in cls.model_fields[key].metadata if type(mark).__name__ in MARKS]
        what = " ".join([_prose(value.get("description", "")), *marks]).strip()
        required = key in section.get("required", ())
        rows.append(f"| `{key}` | {_type(value, headings)} | {_default(value, required)} | {_cell(what)} |\n")
    head = "| key | value | by default | |\n|---|---|---|---|\n"
    return head + "".join(rows) if rows else "No keys but the name.\n"


def _default(value: dict[str, Any], required: bool) -> str:
    if required:
        return "**must be given**"
    default = value.get("default")
    if default is None or default in ([], {}, ""):
        return "none"
    if isinstance(default, dict):
        name = default.get("name")
        return f"`{name}`" if name else "as there"
    text = yaml.safe_dump(default, default_flow_style=True, width=1000).splitlines()[0]
    return f"`{text}`"


def _type(value: dict[str, Any], headings: dict[str, tuple[str, str]]) -> str:
    """What a key takes, with links to the sections among it."""
    if names := _sections(value):
        place = headings[names[0]][1].strip("`").partition(": ")[0]
        link = f"one of [{place}](#{_slug(place)})" if len(names) > 1 else f"[{place}](#{_slug(place)})"
        return f"{'list of ' if value.get('type') == 'array' else ''}{link}"
    if "anyOf" in value:
        return " or ".join(_type(one, headings) for one in value["anyOf"] if one.get("type") != "null")
    if "enum" in value or "const" in value:
        return " or ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        items = value.get("items") or (value.get("prefixItems") or [{}])[0]
        return f"list of {_type(items, headings)}"
    words = {"string": "text", "integer": "whole number", "boolean": "`true` or `false`", "object": "mapping"}
    bounds = [f"{sign} {value[name]:g}" for name, sign in BOUNDS.items() if name in value]
    return " ".join([words.get(value.get("type", ""), value.get("type", "anything")), " and ".join(bounds)]).strip()


def _slug(heading: str) -> str:
    """The anchor that GitHub and MkDocs both give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _prose(text: str) -> str:
    """One line, in which what is no code holds no tag."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def formulas() -> str:
    """The page of formulas."""
    parts = [FORMULAS, "## Objectives\n"]
    for name, function in OBJECTIVES.items():
        own = PROPERTIES[name]
        sizes = f"{own.min_list_size} or more" if own.max_list_size is None else str(own.max_list_size)
        facts = [f"Completions of a list: {sizes}", f"grades: {GRADES[own.grades]}"]
        facts += ["a list of ties: no loss"] * own.zero_when_tied
        facts += ["on pairs a multiple of DPO"] * own.dpo_at_two
        parts.append(_formula(name, function) + f"\n{'; '.join(facts)}.\n")
    parts.append(_formula("lambda_weights, which `lambda` uses", lambda_weights, "\n### "))
    parts.append("\n## Scores\n")
    parts += [_formula(name, function) for name, function in SCORES.items()]
    return "".join(parts)


def _formula(name: str, function: Any, heading: str = "\n### ") -> str:
    """What a function's docstring says before its arguments, and its source."""
    text = inspect.getdoc(function) or ""
    said, *formula = re.split(r"\n\n(?=\S)", text.partition("\nArgs:")[0].strip())
    source = re.search(r"^Source: (.*)", text, flags=re.S | re.M)
    parts = [f"{heading}{name if '`' in name else f'`{name}`'}\n\n{' '.join(said.split())}\n"]
    parts += [f"\n```text\n{formula[0]}\n```\n"] if formula else []
    parts += [f"\n{' '.join(more.split())}\n" for more in formula[1:]]
    parts += [f"\nSource: {' '.join(source[1].split())}\n"] if source else []
    return "".join(parts)


FIGURES = f"""# Look up a figure

{WRITTEN}

Tables of files in `data/benchmarks` that [What was measured](benchmarks.md) does not tell in words.
"""
SHOWN = ("pair_accuracy", "ndcg", "likelihood_ndcg", "best_logprob_change", "sample_reward")
PEERS = ("torch", "trl", "three_pass", "read")


def figures() -> str:
    """The page of tables."""
    return FIGURES + _quickstart() + _kernels() + _reward_models()


def _measured(name: str) -> Any:
    return json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))


def _rows(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _quickstart() -> str:
    """Before and after, as means over seeds."""
    runs = _measured("quickstart-cpu.json")["runs"]
    seeds = len(next(iter(runs.values())))
    before = [run["eval_before"] for run in next(iter(runs.values()))]
    named = {"before": before} | {name: [run["eval_after"] for run in each] for name, each in runs.items()}
    rows = [[name, *(f"{mean(one[key] for one in each):.4f}" for key in SHOWN)] for name, each in named.items()]
    said = f"\n## Three objectives on the story lists\n\nHeld out, mean of {seeds} seeds (`quickstart-cpu.json`).\n\n"
    return said + _rows(("", *(f"`{key}`" for key in SHOWN)), rows)


def _kernels() -> str:
    """Times relative to ours; peers that a case does not have stay empty."""
    parts = [
        "\n## Kernels on one CPU thread\n\nMilliseconds of ours, then the others' time relative to it. `read` reads the"
    ]
    parts.append(" input once and does nothing; `three_pass` is our softmax with a pass for the maximum.\n")
    for name in ("kernels-cpu.json", "kernels-cpu-xeon.json"):
        file = _measured(name)
        rows = []
        for case in file["cases"]:
            each = case["implementations"]
            times = [f"{each[peer]['times_ours']:.2f}" if peer in each else "" for peer in PEERS]
            rows.append([case["name"].replace("torch.", ""), f"{each['ours']['median_ms']:.1f}", *times])
        parts.append(f"\n{file['machine']['device']}, {file['machine']['instruction_set']} (`{name}`)\n\n")
        parts.append(_rows(("case", "ours, ms", *PEERS), rows))
    return "".join(parts)


def _reward_models() -> str:
    """Pair accuracy beside what length alone would give; attributes by their correlation."""
    pairs, attributes = [], []
    for name, run in _measured("reward-models-cpu.json")["runs"].items():
        held = run["heldout"]
        if "pair_accuracy" in held:
            shown = (held["pair_accuracy"], held["longer_wins"], held["balanced"])
            pairs.append([name, str(held["pairs"]), *(f"{value:.3f}" for value in shown)])
        else:
            each = [(key, value) for key, value in held.items() if isinstance(value, dict) and "spearman" in value]
            attributes += [[name, key, str(value["count"]), f"{value['spearman']:.3f}"] for key, value in each]
    said = (
        "\n## Small reward models on human judgements\n\nHeld out (`reward-models-cpu.json`). Balanced: the mean of the"
    )
    said += " accuracies where the longer and where the shorter text is better.\n\n"
    head = ("pairs", "held out", "accuracy", "the longer wins", "balanced")
    told = _rows(("attributes", "", "held out", "Spearman's rank correlation"), attributes)
    return said + _rows(head, pairs) + "\n" + told


PAGES = {"recipe-keys.md": recipe_keys, "formulas.md": formulas, "figures.md": figures}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (HERE / page).write_text(text(), encoding="utf-8")
