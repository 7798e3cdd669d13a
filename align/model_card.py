"""The model card of an exported folder: what it is made of, and what was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from align.summary import ROWS, figure, in_words


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
    sections = [
        _metadata(base, is_adapter=base is not None and not merged, is_reward=bool(outputs)),
        f"# {name}\n\n{_what(base, merged, outputs)}",
        _training(recipe, environment),
        _figures(summary),
        _fidelity(differences, is_reward=bool(outputs)),
        f"## Use\n\n```python\n{_usage(name, base, merged, outputs)}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(base: str | None, *, is_adapter: bool, is_reward: bool) -> str:
    fields: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if is_reward else "text-generation",
        "tags": ["preference-alignment", "align-lm"],
    }
    if base is not None and not Path(base).exists():  # the hub takes only its own names here
        fields["base_model"] = base
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


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
        "data": ", ".join(f"`{source['path']}`" for source in data["sources"]),
        "learning rate": train.get("learning_rate"),
        "lists per step": train.get("lists_per_step"),
        "seed": train.get("seed"),
        "versions": ", ".join(f"{k} {v}" for k, v in environment.get("packages", {}).items()),
    }
    lines = [f"| {key} | {value} |" for key, value in facts.items() if value not in (None, "")]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines])


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


def _fidelity(differences: dict[str, float], *, is_reward: bool) -> str:
    if not differences:
        return ""
    if is_reward:
        parts = "; ".join(f"{stage} moved them by {value:.1e} at most" for stage, value in differences.items())
        return f"## Export\n\nRewards of a probe text: {parts}."
    said = {
        "merge": "merging in float32 moved them by {:.1e} nats at most",
        "rounding": "the stored weights give them within {:.1e} nats of float32",
    }
    parts = "; ".join(said[stage].format(value) for stage, value in differences.items())
    return f"## Export\n\nLog-probabilities of a probe text, over the whole vocabulary: {parts}."


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
