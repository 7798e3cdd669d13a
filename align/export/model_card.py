"""The model card of an exported folder: what it is made of, and what was measured."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from align.report.summary import ITERATION_COLUMNS, ROWS, figure, in_words

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.jsonl)(?<!\.json)(?<!\.gz)(?<!\.parquet)")
"""Of a data set on the hub, and not of a file."""


def model_card(
    *,
    name: str,
    base: str | None,
    merged: bool,
    differences: dict[str, float],
    outputs: Sequence[str] = (),
    recipe: dict[str, Any],
    summary: dict[str, Any],
    environment: dict[str, Any],
) -> str:
    """A README.md with the hub's metadata.

    Args:
        name: Title of the card.
        base: Folder or hub name of the base model; None where every weight was trained.
        merged: Whether the folder holds base and adapter as one checkpoint.
        differences: By how much the export moved the log-probabilities (nats) or rewards of a probe text at most, per
            stage.
        outputs: Names of a reward model's outputs; none for a language model.
        recipe: The run's recipe; {} where there is no run.
        summary: The run's summary.json, or {}.
        environment: The run's environment.json, or {}.

    Returns:
        The card's text; a section is left out where nothing is known for it.

    Source: ours
    """
    metadata = _metadata(base, recipe, is_adapter=base is not None and not merged, is_reward=bool(outputs))
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}\n\n{_what(base, merged, outputs)}",
        _training(recipe, environment),
        _figures(summary),
        _iterations(summary),
        f"## Export\n\n{fidelity(differences, is_reward=bool(outputs))}" if differences else "",
        f"## Use\n\n```python\n{_usage(name, base, merged, outputs)}\n```",
    ]
    return str(ModelCard("\n\n".join(section for section in sections if section) + "\n"))


def _metadata(base: str | None, recipe: dict[str, Any], *, is_adapter: bool, is_reward: bool) -> ModelCardData:
    """What the hub reads; it takes only its own names, no folders of this machine."""
    names = [source["path"] for source in recipe.get("data", {}).get("sources", [])]
    known = base if base is not None and not Path(base).exists() else None
    relation: dict[str, Any] = {"base_model_relation": "adapter" if is_adapter else "finetune"} if known else {}
    return ModelCardData(
        base_model=known,
        datasets=[name for name in names if HUB_NAME.fullmatch(name) and not Path(name).exists()] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=["preference-alignment", "align-lm"],
        **relation,
    )


def _what(base: str | None, merged: bool, outputs: Sequence[str]) -> str:
    model = f"reward model (outputs: {', '.join(outputs)})" if outputs else "language model"
    if base is None:
        return f"A {model} whose weights were all trained on preferences with Align."
    form = "merged into its base model" if merged else "in PEFT's format, for its base model"
    what = f"A {model} trained as an adapter" if outputs else "An adapter trained on preferences"
    return f"{what} with Align, {form} `{base}`."


def _training(recipe: dict[str, Any], environment: dict[str, Any]) -> str:
    if not recipe:
        return ""
    policy, data, train = recipe["policy"], recipe["data"], recipe["train"]
    facts = {
        "base model": f"`{policy['model']}`" + (f" at {policy['revision']}" if policy.get("revision") else ""),
        "quantised while training": policy.get("quantization"),
        "adapter": _options(policy.get("adapter", {})),
        "started from": policy.get("start_adapter"),
        "objective": " + ".join(_options(term) for term in _terms(recipe)) or recipe.get("task"),
        "score": _options(recipe.get("score", {})) if recipe.get("task") != "reward" else None,
        "prompts" if recipe.get("online") else "data": ", ".join(f"`{source['path']}`" for source in data["sources"]),
        **_online(recipe),
        "learning rate": train.get("learning_rate"),
        "lists per step": train.get("lists_per_step"),
        "seed": train.get("seed"),
        "versions": ", ".join(f"{k} {v}" for k, v in environment.get("packages", {}).items()),
    }
    lines = [f"| {key} | {value} |" for key, value in facts.items() if value not in (None, "")]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines])


def _online(recipe: dict[str, Any]) -> dict[str, Any]:
    """How an online run came by its data."""
    online, rollout = recipe.get("online"), recipe.get("rollout", {})
    if not online:
        return {}
    drawn = ("completions", "max_tokens", "temperature", "top_k", "top_p", "min_p", "decoding")
    count, prompts = online["iterations"], online.get("prompts")
    every = f"{prompts} prompts each" if prompts else "all prompts each time"
    return {
        "iterations": f"{count}, {every}; reference: {online.get('reference', 'initial')}",
        "rollouts": f"sampled from the policy itself: {_options({k: rollout.get(k) for k in drawn})}",
        "scorer of the rollouts": _options(rollout.get("reward") or {}),
    }


def _iterations(summary: dict[str, Any]) -> str:
    """What every iteration of an online run sampled and reached."""
    rows = [
        f"| {one['iteration']} | "
        + " | ".join(_cell(one.get(key), pattern) for key, _, pattern in ITERATION_COLUMNS)
        + " |"
        for one in summary.get("iterations", [])
    ]
    heads = " | ".join(label for _, label, _ in ITERATION_COLUMNS)
    rule = "|---" * (1 + len(ITERATION_COLUMNS)) + "|"
    return "\n".join(["## Iterations", "", f"| | {heads} |", rule, *rows]) if rows else ""


def _cell(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _terms(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's objectives: one is written as itself, several as a list."""
    objective = recipe.get("objective", [])
    return [objective] if isinstance(objective, dict) else objective


def _options(section: dict[str, Any]) -> str:
    values = {key: _options(v) if isinstance(v, dict) else v for key, v in section.items() if key != "name"}
    options = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
    name = section.get("name", "")
    return f"{name} ({options})" if options else name


def _figures(summary: dict[str, Any]) -> str:
    before, after = summary.get("eval_before") or {}, summary.get("eval_after") or {}
    rows = [
        f"| {in_words(label, summary.get('task', ''))} | "
        f"{figure(pattern, before[key])} | {figure(pattern, after[key])} |"
        for key, label, pattern in ROWS
        if key in before and key in after
    ]
    if not rows:
        return ""
    return "\n".join(["## On held-out lists", "", "| | before | after |", "|---|---|---|", *rows])


def fidelity(differences: dict[str, float], *, is_reward: bool) -> str:
    """What an export cost, in words; see `export.write_files`."""
    what, unit = ("Rewards", "") if is_reward else ("Log-probabilities", " nats")
    said = {
        "merge": f"merging in float32 moved them by {{:.1e}}{unit} at most",
        "stored": f"the stored weights give them within {{:.1e}}{unit} of the policy's own",
        "stored_mean": f"{{:.1e}}{unit} on average",
    }
    parts = ", ".join(said[stage].format(value) for stage, value in differences.items())
    where = "of a probe text" if is_reward else "of a probe text, over the whole vocabulary"
    return f"{what} {where}: {parts}."


def _usage(name: str, base: str | None, merged: bool, outputs: Sequence[str]) -> str:
    if outputs and (base is None or merged):
        return f'from rewards import load_scorer\n\nrewards = load_scorer("{name}").score([prompt], [completion])'
    if outputs:
        return (
            "from peft import AutoPeftModelForSequenceClassification\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForSequenceClassification.from_pretrained("{name}", num_labels={len(outputs)})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
        )
    if base is None or merged:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
        )
    return (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    )
