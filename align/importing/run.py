"""`align import FILE`: read it, write a recipe, say what became of every key."""

import sys
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError
from align.importing import scripts, trl
from align.importing.left import drop_left
from align.importing.plan import Plan
from align.importing.read import CONFIGS, Found, read
from align.importing.written import recipe_text, report
from align.recipe import parse_recipe


def import_file(
    file: str,
    to: str | None = None,
    *,
    check: bool = False,
    method: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Write the recipe of another tool's file and say what became of each of its keys.

    Args:
        file: the configuration, shell script or Python script.
        to: where the recipe goes; without, it is printed.
        check: compare the token ids of the first 64 rows with what the tool would build.
        method: of a TRL configuration that does not say it.
        trust_remote_code: let `check` run the code that the model comes with; what the file says of it is no consent.

    Returns:
        What became of the keys.

    Raises:
        UserError: it cannot be imported, or there is a recipe already; nothing is written then.
    """
    path = Path(to) if to else None
    if path is not None and path.exists():
        raise UserError(f"{path}: is there already; give another file with --to")
    plan = plan_of(Path(file), method)
    written = _written(plan, path)
    print(report(plan), file=sys.stdout if path else sys.stderr)
    if path is None:
        print(written, end="")
    else:
        print(f"{path}: `align inspect {path}` and `align train {path}`")
    if check:
        from align.importing.check import check_tokens  # with torch and transformers

        recipe = parse_recipe(yaml.safe_load(written), origin=str(path or file))
        for line in check_tokens(plan, recipe, trust_remote_code=trust_remote_code):
            print(line, file=sys.stdout if path else sys.stderr)
    return plan


def plan_of(file: Path, method: str | None = None) -> Plan:
    """What becomes of each key of a file.

    Raises:
        UserError: it cannot be imported.
    """
    found = read(file, method)
    module: Any = CONFIGS.get(found.tool, scripts)
    scripted = file.suffix == ".py"
    general = scripts.GENERAL if scripted else module.GENERAL
    spelled = {general.get(name, name): name for name in found.values}
    values = {general.get(name, name): value for name, value in found.values.items()}
    if len(values) < len(found.values):
        twice = [name for name in found.values if spelled[general.get(name, name)] != name]
        raise UserError(f"{file}: `{twice[0]}` and `{spelled[general.get(twice[0], twice[0])]}` say the same; keep one")
    defaults = trl.DEFAULTS if scripted else module.DEFAULTS
    plan = Plan(found.tool, file, values, spelled, defaults, found.devices)
    if scripted:
        scripts.write(plan, found.method, found.tool == "Unsloth", dict(found.notes))
    else:
        module.write(plan, found.method)
    drop_left(plan, scripts.KEYS if scripted else module.KEYS)
    if not plan.tree.get("data.eval_sources") and not plan.tree.get("data.eval_fraction"):
        plan.tree["sampling"] = {"prompts": 0}
        plan.comments["sampling"] = "no rows are held out whose prompts could be completed"
    _say_how_told(plan, found)
    return plan


def _say_how_told(plan: Plan, found: Found) -> None:
    if "task" in found.notes:
        plan.comments["task"] = found.notes["task"]
    if found.by_name:
        plan.comments["task"] = f"{found.method}, by the file's name or keys; `--method` says another"


def _written(plan: Plan, path: Path | None) -> str:
    """The recipe's text, checked as a recipe, and written with its chat template where it has one."""
    template = plan.tree.get("policy.chat_template")
    if plan.chat_template is not None and path is not None:
        beside = path.with_name(f"{path.stem}.{template}")
        plan.tree["policy.chat_template"] = str(beside)
    text = recipe_text(plan, str(path or "recipe.yaml"))
    parse_recipe(yaml.safe_load(text), origin=str(plan.file))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if plan.chat_template is not None:
            Path(plan.tree["policy.chat_template"]).write_text(plan.chat_template, encoding="utf-8")
    return text
