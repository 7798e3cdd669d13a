"""The page: what the other modules found, in one HTML file that needs nothing else."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from align.progress import in_time
from align.report import charts, findings
from align.report.displacement import sentence
from align.report.measured import BENCHMARKS, EVALUATION, RATES, Benchmarks, Evaluation, Export, read_measured
from align.report.reading import Run
from align.report.summary import FEW, few_lists
from align.report.tokens import token_view
from align.runs.trees import differing_keys

SAMPLES = 12
"""Sampled completions that the page shows."""
LISTS = 20
"""Lists whose tokens it shows: ten thousand tokens make a megabyte."""


def render(runs: Sequence[Run], exports: Mapping[str, Export] | None = None) -> str:
    """The page of these runs and of exports by name. Everything from a file is escaped by the template engine."""
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            title=" · ".join(run.name for run in runs),
            kind="Align report",
            **page_parts(),
            runs=[_described(run) for run in runs],
            differences=_differences(runs),
            exports=exports or {},
            rates=RATES,
            main_charts=charts.main_charts(runs),
            other_charts=charts.other_charts(runs),
            size=charts,
        )
    )


def page_parts() -> dict[str, Any]:
    """What the head of a page and its end hold: style, script, and the script's digest, which alone may run."""
    script, style = ((files("align.report") / name).read_text("utf-8") for name in ("script.js", "style.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": Markup(style), "script": Markup(script), "script_hash": digest}


@cache
def templates() -> Environment:
    """Compiled once: an online run writes a page for every iteration."""
    loader = PackageLoader("align.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"signed": _signed, "yaml": _yaml}
    return environment


def _described(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    summary = run.summary or {}
    heldout = summary.get("data", {}).get("heldout_lists", 0)
    return {
        "name": run.name,
        "path": str(run.path),
        "facts": _facts(run),
        "finished": run.summary is not None,
        "heldout": heldout,
        "uncertainty": round(50 / math.sqrt(heldout)) if heldout else None,
        "few": few_lists(heldout) if heldout < FEW else None,
        "cards": findings.cards(run),
        "table": findings.table(run),
        "other": findings.other_figures(run),
        "displacement": _diagnosis(summary),
        "window": charts.smoothing_window(len(run.steps)),
        "tokens": token_view(run.token_lists[:LISTS]) if run.token_lists else None,
        "all_lists": len(run.token_lists or []),
        "samples": summary.get("samples", [])[:SAMPLES],
        "all_samples": len(summary.get("samples", [])),
        "recipe": run.recipe_text,
        "environment": run.environment,
        "data": summary.get("data"),
        "evaluation": read_measured(run.path / EVALUATION, Evaluation),
        "benchmarks": read_measured(run.path / BENCHMARKS, Benchmarks),
    }


def _diagnosis(summary: dict[str, Any]) -> str | None:
    if "displacement" not in summary:
        return None
    text = sentence(summary["displacement"])
    return text[0].upper() + text[1:]


def _facts(run: Run) -> dict[str, str]:
    """What the run is, in a few words each; what the recipe does not say is left out."""
    policy, train = run.recipe.get("policy") or {}, run.recipe.get("train") or {}
    objective = run.recipe.get("objective") or []
    terms = [objective] if isinstance(objective, dict) else objective
    summary, environment = run.summary or {}, run.environment or {}
    seconds = summary.get("train_seconds")
    facts = {
        "policy": policy.get("model"),
        "objective": " + ".join(str(term["name"]) for term in terms) or run.recipe.get("task"),
        "adapter": (policy.get("adapter") or {}).get("name"),
        "beta": (run.recipe.get("score") or {}).get("beta"),
        "learning rate": train.get("learning_rate"),
        "lists per step": train.get("lists_per_step"),
        "seed": train.get("seed"),
        "steps": len(run.steps),
        "training time": in_time(seconds) if seconds is not None else None,
        "device": environment.get("device"),
        "started": str(environment.get("started", ""))[:16].replace("T", " ") or None,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Dotted recipe keys in which the runs differ -> each run's value."""
    first = runs[0].recipe
    keys = set[str]().union(*(differing_keys(first, run.recipe) for run in runs[1:])) - {"output"}
    return {key: [_in_line(_at(run.recipe, key)) for run in runs] for key in sorted(keys)}


def _at(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _signed(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _in_line(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()
