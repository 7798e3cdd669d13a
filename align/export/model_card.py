"""The model card of an exported folder: what it is made of, and what was measured."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from align.export.formats import FLOATS, Format
from align.report.summary import ITERATION_COLUMNS, ROWS, figure, in_words

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.jsonl)(?<!\.json)(?<!\.gz)(?<!\.parquet)")
"""Of a data set on the hub, and not of a file."""
LIBRARIES = {"peft": "peft", "gguf": "gguf", "lora-gguf": "gguf", "onnx": "onnx"}
"""What the hub calls what loads a format; transformers loads the others."""
COMMANDS = {
    "gguf": "llama-server -m {name}/model.gguf\nollama create {name} -f {name}/Modelfile",
    "lora-gguf": "llama-server -m BASE.gguf --lora {name}/adapter.gguf  # BASE.gguf: {base} as GGUF",
    "onnx": "python -c \"import onnxruntime; onnxruntime.InferenceSession('{name}/model.onnx')\"",
}
"""How a format is loaded that is not loaded from Python as a model."""


def model_card(
    *,
    name: str,
    base: str | None,
    form: Format,
    found: dict[str, Any],
    outputs: Sequence[str] = (),
    recipe: dict[str, Any],
    summary: dict[str, Any],
    environment: dict[str, Any],
) -> str:
    """A README.md with the hub's metadata.

    Args:
        name: Title of the card.
        base: Folder or hub name of the base model; None where every weight was trained.
        form: What the folder is.
        found: What the comparison with what was trained has given, as `export.json` has it.
        outputs: Names of a reward model's outputs; none for a language model.
        recipe: The run's recipe; {} where there is no run.
        summary: The run's summary.json, or {}.
        environment: The run's environment.json, or {}.

    Returns:
        The card's text; a section is left out where nothing is known for it.

    Source: ours
    """
    metadata = _metadata(base, recipe, form, is_reward=bool(outputs))
    compared = compared_in_words(found, is_reward=bool(outputs))
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}\n\n{_what(base, form, outputs)}",
        _training(recipe, environment),
        _figures(summary),
        _iterations(summary),
        "## Export\n\n" + "\n\n".join(compared) if compared else "",
        f"## Use\n\n{_usage(name, base, form, outputs)}",
    ]
    return str(ModelCard("\n\n".join(section for section in sections if section) + "\n"))


def _metadata(base: str | None, recipe: dict[str, Any], form: Format, *, is_reward: bool) -> ModelCardData:
    """What the hub reads; it takes only its own names, no folders of this machine."""
    names = [source["path"] for source in recipe.get("data", {}).get("sources", [])]
    known = base if base is not None and not Path(base).exists() else None
    relation: dict[str, Any] = {"base_model_relation": _relation(form)} if known else {}
    return ModelCardData(
        base_model=known,
        datasets=[name for name in names if HUB_NAME.fullmatch(name) and not Path(name).exists()] or None,
        library_name=LIBRARIES.get(form.name, "transformers"),
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=["preference-alignment", "align-lm"],
        **relation,
    )


def _relation(form: Format) -> str:
    if form.of_adapter:
        return "adapter"
    return "finetune" if set(form.stored_in) <= set(FLOATS) else "quantized"


def _what(base: str | None, form: Format, outputs: Sequence[str]) -> str:
    model = f"reward model (outputs: {', '.join(outputs)})" if outputs else "language model"
    stored = "" if form.name in ("peft", "transformers") else f" It is stored as {form.what}."
    if base is None:
        return f"A {model} whose weights were all trained on preferences with Align.{stored}"
    how = "in PEFT's format, for its base model" if form.name == "peft" else "for its base model"
    how = how if form.of_adapter else "merged into its base model"
    what = f"A {model} trained as an adapter" if outputs else "An adapter trained on preferences"
    return f"{what} with Align, {how} `{base}`.{stored}"


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
    drawn = ("completions", "max_tokens", "temperature", "top_k", "top_p", "min_p", "adaptive_temperature", "decoding")
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


def compared_in_words(found: dict[str, Any], *, is_reward: bool) -> list[str]:
    """What an export cost, in sentences; see `compare` and `export._write` for the names."""
    return [said for said in (_combined(found), _fidelity(found, is_reward=is_reward), _compared(found)) if said]


def _combined(found: dict[str, Any]) -> str:
    of = f" in the mean of this run and {', '.join(found['average'])}" if found.get("average") else ""
    times = f"{1 + found['extrapolate']:g} times " if found.get("extrapolate") else ""
    return f"These weights are the start and {times}what training changed{of}." if of or times else ""


def _fidelity(found: dict[str, Any], *, is_reward: bool) -> str:
    what, unit = ("Rewards", "") if is_reward else ("Log-probabilities", " nats")
    said = {
        "merge_difference": f"merging in float32 moved them by {{:.1e}}{unit} at most",
        "stored_difference": f"the stored weights give them within {{:.1e}}{unit} of the policy's own",
        "stored_mean_difference": f"{{:.1e}}{unit} on average",
    }
    parts = [text.format(found[key]) for key, text in said.items() if key in found]
    where = "of a probe text" if is_reward else "of a probe text, over the whole vocabulary"
    return f"{what} {where}: {', '.join(parts)}." if parts else ""


def _compared(found: dict[str, Any]) -> str:
    if "engine" not in found:
        return ""
    text = (
        f"Read again by {found['engine']} on {found['compared_on']} ({found['tokens']} tokens): a token's "
        f"log-probability is off by {found['mean_logprob_difference']:.1e} nats on average (bound "
        f"{found['tolerance']:g}) and {found['max_logprob_difference']:.1e} at most"
    )
    if found["pair_accuracy_after"] is not None:
        text += (
            f"; pair accuracy by {found['pair_accuracy_by']} {found['pair_accuracy_before']:.4f} as trained, "
            f"{found['pair_accuracy_after']:.4f} in the export"
        )
    if found["prompts_compared"]:
        text += f"; {found['prompts_compared']} prompts are read as the same token ids"
    if found.get("drop") is not None:
        text += f"; {100 * found['drop']:g} % of the adapter's second factors were dropped"
    return text + "."


def _usage(name: str, base: str | None, form: Format, outputs: Sequence[str]) -> str:
    """How the folder is loaded, as a block of Markdown."""
    if form.name in COMMANDS:
        return f"```sh\n{COMMANDS[form.name].format(name=name, base=base)}\n```"
    return f"```python\n{_python(name, base, base is not None and not form.of_adapter, outputs)}\n```"


def _python(name: str, base: str | None, merged: bool, outputs: Sequence[str]) -> str:
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
