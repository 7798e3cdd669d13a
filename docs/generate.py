"""Write the pages that say what the code and the measurements say: recipe keys, formulas, figures.

    python docs/generate.py

A test holds the pages to what this gives. Nothing here says anything of its own: the words are the sections'
attribute docstrings, the functions' docstrings, and the figures of `data/benchmarks`.
"""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel
from transformers import TrainingArguments

from align.data.formats import FORMAT
from align.export.formats import FORMATS
from align.importing.left import OURS
from align.importing.read import CONFIGS
from align.lint import CHECK
from align.model.peft_kinds import KINDS
from align.objectives import OBJECTIVES, PROPERTIES, SCORES
from align.objectives.lambda_loss import lambda_weights
from align.recipe import Recipe
from align.recipe.kept import KEPT
from align.recipe.keys import class_of, default_of, said_of, sections_of, type_of
from align.recipe.optimizers import AVERAGING, IMPOSSIBLE, LOW_RANK, PACKAGES, SOURCES
from align.recipe.other_tools import NAMES
from align.trl.answers import WITHOUT_EFFECT, answer
from align.trl.config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "data/benchmarks"
WRITTEN = "<!-- Written by docs/generate.py; change what it reads, then run it. -->"
SIGNS = {">=": "&ge;", ">": "&gt;", "<=": "&le;", "<": "&lt;"}
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
`s_i - s_j - m`, with `m` the row's margin or 0, and a list's loss is the sum over its pairs with `g_i > g_j`. Where
completions are chosen or rejected, the chosen are those with the list's best grade, with `a` the score of the chosen
and `b` of the rejected on a list of two.
`lp_t` and `ref_t` are a token's log-probabilities under policy and reference, `T` the number of its tokens,
`sg` stops the gradient. The options are among [the recipe's keys](recipe-keys.md#objective).

"""


def recipe_keys() -> str:
    """The page of keys."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    headings = _headings(schema, definitions)
    parts = [KEYS, "## The whole recipe\n\n", _table(schema, class_of("Recipe"), headings)]
    for name, (level, heading) in headings.items():
        if level == "##" or name not in definitions:
            parts.append(f"\n## {heading}\n")
        if name not in definitions:
            continue
        if level == "###":
            parts.append(f"\n### {heading}\n")
        section = definitions[name]
        parts.append(f"\n{_prose(section['description'])}\n\n" if "description" in section else "\n")
        parts.append(_table(section, class_of(name), headings))
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).rstrip() + "\n"


def _headings(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Section -> level and heading, in the order in which a reader of the recipe meets them, each once."""
    found: dict[str, tuple[str, str]] = {}

    def walk(section: dict[str, Any], path: str) -> None:
        for key, value in section.get("properties", {}).items():
            names, where = sections_of(value), f"{path}.{key}".lstrip(".")
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


def _table(section: dict[str, Any], cls: type[BaseModel], headings: dict[str, tuple[str, str]]) -> str:
    """The keys of one section."""
    rows = []
    for key, value in section.get("properties", {}).items():
        if "const" in value:
            continue  # the name of a choice, which its heading says
        what = _prose(said_of(cls, key, value))
        required = key in section.get("required", ())
        rows.append(f"| `{key}` | {_type(value, headings)} | {default_of(value, required)} | {_cell(what)} |\n")
    head = "| key | value | by default | |\n|---|---|---|---|\n"
    return head + "".join(rows) if rows else "No keys but the name.\n"


def _type(value: dict[str, Any], headings: dict[str, tuple[str, str]]) -> str:
    """What a key takes, with links to the sections among it."""

    def link(names: list[str]) -> str:
        place = headings[names[0]][1].strip("`").partition(": ")[0]
        return f"{'one of ' if len(names) > 1 else ''}[{place}](#{_slug(place)})"

    text = type_of(value, link)
    return re.sub("[<>]=?", lambda sign: SIGNS[sign[0]], text)


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


def rows() -> str:
    """The page of rows with its table of formats written anew, general ones first; the rest stays as it stands."""
    mark = "<!-- Written by docs/generate.py from align/data/formats. -->"
    before, _, after = (HERE / "rows.md").read_text(encoding="utf-8").split(mark)
    rows = []
    for own in reversed(FORMAT.classes.values()):
        said = " ".join((inspect.getdoc(own) or "").partition("\n\n")[0].split()).removesuffix(".")
        rows.append([_cell(f"{said} ({own.published})" if own.published else said), f"`{_cell(own.shape)}`"])
    return f"{before}{mark}\n\n{_rows(('what a row holds', 'its columns'), rows)}\n{mark}{after}"


def look() -> str:
    """The page of what is looked for in rows, with its table of checks written anew; the rest stays as it stands."""
    mark = "<!-- Written by docs/generate.py from align/lint. -->"
    before, _, after = (HERE / "look.md").read_text(encoding="utf-8").split(mark)
    rows = []
    for name, own in CHECK.classes.items():
        said = " ".join((inspect.getdoc(own) or "").split())
        rows.append([f"`{name}`", _cell(said), "every run" if own.cheap else "`align inspect`", _cell(own.bad)])
    return f"{before}{mark}\n\n{_rows(('check', 'what it says', 'done by', 'stops where'), rows)}\n{mark}{after}"


def trl() -> str:
    """The page of the trainers by TRL's names, with its table of arguments written anew; the rest stays."""
    mark = "<!-- Written by docs/generate.py from align/trl. -->"
    before, _, after = (HERE / "trl.md").read_text(encoding="utf-8").split(mark)
    shared = {f.name for f in fields(TrainingArguments)} - WITHOUT_EFFECT.keys()
    said: dict[tuple[str, str], list[str]] = {}
    for own in (DPOConfig, KTOConfig, RewardConfig, CPOConfig, ORPOConfig):
        trainer = own.__name__.removesuffix("Config")
        for field in [f for f in fields(own) if f.name not in shared]:
            what, why = answer(trainer, field.name)
            text = f"{what}: {why or field.metadata['help']}"
            said.setdefault((field.name, text), []).append(trainer)
    table = [[f"`{name}`", ", ".join(of), _cell(text)] for (name, text), of in sorted(said.items())]
    return f"{before}{mark}\n\n{_rows(('argument', 'of', 'what it does here'), table)}\n{mark}{after}"


def imports() -> str:
    """The page of imports, with a table of each tool's keys written anew."""
    mark = "<!-- Written by docs/generate.py from align/importing. -->"
    before, _, after = (HERE / "import.md").read_text(encoding="utf-8").split(mark)
    parts = [
        f"## Keys of {name}\n\n{_rows(('ours', 'its keys'), _imported(module))}" for name, module in CONFIGS.items()
    ]
    return f"{before}{mark}\n\n" + "\n\n".join(parts) + f"\n\n{mark}{after}"


def _imported(module: Any) -> list[list[str]]:
    """What stands for a tool's keys, those with the same answer together; what has no counterpart last."""
    found: dict[str, list[str]] = {}
    for key in sorted(module.KEYS):
        here = NAMES.get(key) or NAMES.get(module.GENERAL.get(key, key)) or OURS.get(key)
        ours = (
            f"`{here.write}`" if here and here.write else f"dropped: {here.note}" if here else f"`{key}` of a section"
        )
        found.setdefault(re.sub(r"sources\.\d\.", "sources.", ours), []).append(key)
    order = sorted(found, key=lambda ours: (ours.startswith("dropped"), ours))
    return [[_cell(ours), ", ".join(found[ours])] for ours in order]


def adapters() -> str:
    """The page of adapters, with its tables of PEFT's kinds and of what each adapter costs written anew."""
    text = (HERE / "adapters.md").read_text(encoding="utf-8")
    for name, table in (("align/model/peft_kinds.py", _kinds()), ("data/benchmarks/adapters-cpu.json", _costs())):
        mark = f"<!-- Written by docs/generate.py from {name}. -->"
        before, _, after = text.split(mark)
        text = f"{before}{mark}\n\n{table}\n{mark}{after}"
    return text


def _kinds() -> str:
    rows = []
    for name, kind in KINDS.items():
        here = "a frozen copy of its start" if kind.moved else "the base"
        if kind.why_not:
            here = f"none: refused, it {kind.why_not}"
        rows.append([f"`{name}`", kind.what, f"take {kind.instead}" if kind.instead else _cell(here)])
    return _rows(("type", "what it trains", "its reference"), rows)


def _costs() -> str:
    rows = []
    for name, own in _measured("adapters-cpu.json")["adapters"].items():
        differs = [f"{own['differs'][dtype]:.0e}" if own["differs"] else "" for dtype in ("float32", "bfloat16")]
        size, packed = f"{own['bytes'] / 2**20:.1f}", "yes" if own["packed"] else "no"
        rows.append([f"`{name}`", f"{own['trained']:,}", f"{own['time']:.2f}", size, packed, own["update"], *differs])
    head = ("adapter", "trained", "time", "MiB", "packed", "update", "float32", "bfloat16")
    return _rows(head, rows)


def optimizers() -> str:
    """The page of optimizers with its table of names written anew."""
    mark = "<!-- Written by docs/generate.py from align/recipe/optimizers.py. -->"
    before, _, after = (HERE / "optimizers.md").read_text(encoding="utf-8").split(mark)
    parts = []
    for source, names in SOURCES.items():
        rows = [[f"`{name}`", f"{KEPT.get((source, name), '')}", _note(source, name)] for name in names]
        parts.append(f"### {source}\n\n{_rows(('name', 'kept', ''), rows)}\n")
    return f"{before}{mark}\n\n" + "".join(parts) + f"{mark}{after}"


def _note(source: str, name: str) -> str:
    """What holds for a name besides."""
    if name in IMPOSSIBLE[source]:
        return _cell(f"refused: {IMPOSSIBLE[source][name]}")
    first = next(own for own, names in SOURCES.items() if name in names)
    packages = [package for package, parts in PACKAGES.values() if any(part in name for part in parts)]
    notes = [
        f"needs {' and '.join(packages)}" if packages and source == "transformers" else "",
        f"`source: {source}`; the name alone is {first}'s" if source != first else "",
        "projects gradients" if name in LOW_RANK else "",
        "an average" if name in AVERAGING else "",
        "LoRA alone" if name == "lorarite" else "",
    ]
    return _cell("; ".join(filter(None, notes)))


def exports() -> str:
    """The page of exports with its table of what was measured written anew."""
    mark = "<!-- Written by docs/generate.py from data/benchmarks/export-cpu.json. -->"
    before, _, after = (HERE / "export.md").read_text(encoding="utf-8").split(mark)
    found = _measured("export-cpu.json")["exports"]
    columns = sorted({(row["format"], row["dtype"]): 0 for row in found}, key=lambda own: list(FORMATS).index(own[0]))
    table: dict[str, dict[tuple[str, str], str]] = {}
    for row in found:
        what = "refused" if "refused" in row else f"{row['max_logprob_difference']:.0e}"
        table.setdefault(row["adapter"], {})[row["format"], row["dtype"]] = what
    rows = [[f"`{name}`", *(own.get(column, "") for column in columns)] for name, own in table.items()]
    head = tuple(form if form == dtype else f"{form} {dtype}" for form, dtype in columns)
    return f"{before}{mark}\n\n{_rows(('adapter', *head), rows)}\n{mark}{after}"


PAGES = {
    "adapters.md": adapters,
    "export.md": exports,
    "optimizers.md": optimizers,
    "import.md": imports,
    "recipe-keys.md": recipe_keys,
    "formulas.md": formulas,
    "figures.md": figures,
    "rows.md": rows,
    "look.md": look,
    "trl.md": trl,
}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (HERE / page).write_text(text(), encoding="utf-8")
