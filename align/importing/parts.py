"""The parts of a recipe that every tool's file says alike, under TRL's names: model, adapter, training, course.

Sources: transformers' TrainingArguments, PEFT's LoraConfig, TRL's ModelConfig
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.files import is_there
from align.importing.plan import OFF, Plan
from align.recipe.optimizers import OPTIMIZERS, why_not
from align.recipe.schedules import NEEDED, OPTIONS
from align.recipe.trackers import checked_trackers

SCHEDULES = tuple(name for name in OPTIONS if name not in NEEDED)
"""Those that need no option."""
WITHOUT_OPTIONS = {"cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine"}
ATTENTION = "attention is chosen for packed rows, and changes speed, never the result; `policy.attention` forces one"
DROPOUT = "{tool} turns dropout off in the whole model, the adapter's too"
STEPS = "the total of steps is not known before the rows are read; write warmup steps / all steps here"
DEVICES = "batch x accumulation{devices}; changes nothing but who holds which list"
ONE_DEVICE = "; times the number of processes, if there were several"
RENAMED = {"adamw_hf": "adamw_torch", "adamw": "adamw_torch", "adamw_apex_fused": "adamw_torch"}
"""Optimizers of older releases."""
KNOWN_ADAPTERS = ("lora", "full", "adalora", "ia3")


def write_model(plan: Plan, dtype: str, dtype_of: Sequence[str], dtype_why: str = "") -> None:
    """The model, and what its weights are held in.

    Raises:
        UserError: there is none, or the reference is another.
    """
    model = plan.value("model_name_or_path")
    if not model:
        raise plan.mistake("model_name_or_path", "is missing; name the model that is trained")
    plan.put("policy.model", str(model), ("model_name_or_path",))
    revision = plan.value("model_revision")
    if revision not in (None, "", "main"):
        plan.put("policy.revision", str(revision), ("model_revision",))
    plan.drop("model_revision", "the default branch, as here")
    plan.put("policy.dtype", dtype, dtype_of, dtype_why)
    if plan.on("trust_remote_code"):
        plan.put("policy.trust_remote_code", True, ("trust_remote_code",))
    if plan.on("load_in_4bit"):
        plan.put("policy.quantization", "4bit", ("load_in_4bit",))
    plan.drop("attn_implementation", ATTENTION)
    reference = plan.value("ref_model")
    if reference in (model, *OFF):
        plan.drop("ref_model", "the reference is the policy as it starts, which is that model")
    else:
        raise plan.mistake(
            "ref_model", "is another model than the trained one; the reference here is the policy's start"
        )


def write_adapter(plan: Plan, kind: str, of: Sequence[str]) -> None:
    """How it is trained.

    Args:
        kind: lora, full, adalora or ia3.
        of: the general names that say so.

    Raises:
        UserError: an adapter that is not here.
    """
    if kind not in KNOWN_ADAPTERS:
        name = next((name for name in of if plan.given(name)), "use_peft")
        raise plan.mistake(name, f"cannot be imported: there is no adapter `{kind}` here; take lora, dora, ... or full")
    if kind != "full" and plan.on("start_adapter"):
        why = "it goes on training, and is the reference"
        adapters = plan.value("start_adapter")
        path = adapters[0] if isinstance(adapters, list) and len(adapters) == 1 else adapters
        if not isinstance(path, str) or "," in path:
            raise plan.mistake(
                "start_adapter", "names several adapters; merge them into the model first, and give that"
            )
        plan.put("policy.start_adapter", path, ("start_adapter",), why)
        why = "the adapter that goes on has its own rank, factors and layers"
        for name in (*of, "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"):
            plan.drop(name, why)
        return
    plan.drop("start_adapter", "no adapter is trained")
    names = (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
    )
    if kind in ("full", "ia3"):
        plan.put("policy.adapter", {"name": kind}, of)
        for name in names:
            plan.drop(name, "no low-rank adapter is trained")
        return
    adapter, why = _low_rank(plan, kind)
    plan.put("policy.adapter", adapter, (*of, *names, "adalora_init_r", "adalora_target_r"), why)


def _low_rank(plan: Plan, kind: str) -> tuple[dict[str, Any], str]:
    """The section of a low-rank adapter, and what of it is other than in the file."""
    start = str(plan.value("init_lora_weights") or "").lower()
    variants = [name for name, on in (("rslora", plan.on("use_rslora")), ("dora", plan.on("use_dora"))) if on]
    variants += [one for one in ("pissa", "olora", "eva", "loftq") if start.startswith(one)]
    if len(variants) > 1:
        raise plan.mistake("use_dora", f"together with {' and '.join(variants)} is no adapter here; keep one of them")
    dropout, off = plan.number("lora_dropout") if plan.on("lora_dropout") else 0.0, plan.value("disable_dropout")
    adapter: dict[str, Any] = {"name": variants[0] if variants else kind, "rank": int(plan.number("lora_r"))}
    adapter["alpha"] = int(plan.number("lora_alpha"))
    if kind == "adalora":
        adapter["rank"] = int(plan.number("adalora_target_r"))
        adapter["initial_rank"] = int(plan.number("adalora_init_r"))
    if dropout and not off:
        adapter["dropout"] = dropout
    adapter["targets"] = _targets(plan.value("lora_target_modules"))
    return adapter, DROPOUT.format(tool=plan.tool) if dropout and off else ""


def _targets(value: Any) -> Any:
    names = value if isinstance(value, list | tuple) else str(value or "all-linear").replace(",", " ").split()
    return "all-linear" if list(names) in (["all"], ["all-linear"]) else [str(name) for name in names]


def write_training(plan: Plan) -> None:
    """Learning rate, steps, batch, precision.

    Raises:
        UserError: an optimizer or a schedule that is not here.
    """
    plan.put("train.learning_rate", plan.number("learning_rate"), ("learning_rate",))
    _schedule(plan)
    _length(plan)
    _optimizer(plan)
    for key in ("weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"):
        if plan.value(key) is not None:
            plan.put(f"train.{key}", plan.number(key), (key,))
    batch, steps = int(plan.number("per_device_train_batch_size")), int(plan.number("gradient_accumulation_steps"))
    devices = f" x {plan.devices} processes" if plan.devices > 1 else ""
    of = ("per_device_train_batch_size", "gradient_accumulation_steps", "devices")
    why = DEVICES.format(devices=devices) + ("" if plan.devices > 1 else ONE_DEVICE)
    plan.put("train.lists_per_step", batch * steps * plan.devices, of, why)
    half = "bfloat16" if plan.on("bf16") else "float16" if plan.on("fp16") else "float32"
    plan.put("train.precision", half, ("bf16", "fp16"))
    plan.put("train.gradient_checkpointing", plan.on("gradient_checkpointing"), ("gradient_checkpointing",))
    if plan.value("disable_dropout") in OFF:
        plan.put("train.dropout", True, ("disable_dropout",))
    plan.drop("disable_dropout", "dropout is off here too")
    plan.put("train.seed", int(plan.number("seed")), ("seed",), "" if not plan.given("seed") else "the order differs")


def _schedule(plan: Plan) -> None:
    name = str(plan.value("lr_scheduler_type")).rpartition(".")[2].lower()
    ours = WITHOUT_OPTIONS.get(name, name)
    if ours not in SCHEDULES:
        raise plan.mistake("lr_scheduler_type", f"is no schedule here; take one of {', '.join(SCHEDULES)}")
    bare = ours != name
    why = f"it ends at 0; write {{name: {name}, min_lr_rate: ...}} to end where yours does"
    plan.put("train.schedule", ours, ("lr_scheduler_type",), why if bare else "", differs=bare)
    warmup, ratio = plan.value("warmup_steps"), plan.value("warmup_ratio")
    limit = plan.number("max_steps") if plan.value("max_steps") not in OFF else 0
    if warmup in (*OFF, 0):
        plan.drop("warmup_steps", "no steps, as here")
        share = plan.number("warmup_ratio") if ratio not in OFF else 0.0
        plan.put("train.warmup_ratio", share, ("warmup_ratio",))
    elif plan.number("warmup_steps") < 1:
        plan.put(
            "train.warmup_ratio", plan.number("warmup_steps"), ("warmup_steps", "warmup_ratio"), "a share of the steps"
        )
    elif limit > 0:
        share = round(plan.number("warmup_steps") / limit, 6)
        plan.put("train.warmup_ratio", share, ("warmup_steps", "warmup_ratio"), "warmup steps / max steps")
    else:
        plan.put("train.warmup_ratio", 0.1, ("warmup_steps", "warmup_ratio"), STEPS, differs=True)


def _length(plan: Plan) -> None:
    limit = int(plan.number("max_steps")) if plan.value("max_steps") not in OFF else 0
    if limit > 0:
        plan.put("train.steps", limit, ("max_steps",))
        plan.drop("num_train_epochs", "max_steps takes its place, there and here")
        return
    plan.drop("max_steps", "no limit, as here")
    plan.put("train.epochs", plan.number("num_train_epochs"), ("num_train_epochs",))


def _optimizer(plan: Plan) -> None:
    name = str(plan.value("optim")).rpartition(".")[2].lower()
    ours = RENAMED.get(name, name)
    problem = "" if ours in OPTIMIZERS else f"`{name}` is none of transformers' optimizers"
    problem = problem or why_not(ours)
    if not problem:
        plan.put("train.optimizer", ours, ("optim",), "" if ours == name else "its name today")
        return
    packaged = "needs a package" in problem
    why = f"{problem.partition(';')[0]}; set `{ours}` where it is installed" if packaged else problem.partition(";")[0]
    plan.put("train.optimizer", "adamw_torch", ("optim",), why, differs=True)


def write_course(plan: Plan) -> None:
    """Output, evaluation, checkpoints, trackers."""
    output = str(plan.value("output_dir") or f"runs/{plan.file.stem}")
    taken = is_there(Path(output), Path.is_dir) and any(Path(output).iterdir())
    why = "the folder holds another tool's run" if taken else ""
    plan.put("output", f"{output.rstrip('/')}-align" if taken else output, ("output_dir",), why)
    if plan.value("logging_steps") is not None:
        steps = plan.number("logging_steps")
        plan.put("train.logging_steps", max(1, int(steps)), ("logging_steps",), "" if steps >= 1 else "whole steps")
    plan.drop("logging_steps", "every step is in metrics.jsonl")
    _evaluation(plan)
    strategy, steps = str(plan.value("save_strategy")).lower(), plan.value("save_steps")
    whole = steps not in OFF and plan.number("save_steps") >= 1
    if strategy in ("steps", "none") and whole:
        plan.put("train.save_steps", int(plan.number("save_steps")), ("save_steps", "save_strategy"))
    for name in ("save_steps", "save_strategy"):
        plan.drop(name, "about ten checkpoints are made in a run; `train.save_steps` sets their distance")
    if plan.on("save_total_limit"):
        plan.put("train.keep_checkpoints", int(plan.number("save_total_limit")), ("save_total_limit",))
    plan.drop("save_total_limit", "two checkpoints are kept; `train.keep_checkpoints` says how many")
    _trackers(plan)


def _evaluation(plan: Plan) -> None:
    strategy, steps = str(plan.value("eval_strategy")).lower(), plan.value("eval_steps")
    held_out = plan.tree.get("data.eval_sources") or plan.tree.get("data.eval_fraction")
    whole = steps not in OFF and plan.number("eval_steps") >= 1
    if held_out and strategy in ("steps", "none") and whole:
        plan.put("train.eval_steps", int(plan.number("eval_steps")), ("eval_steps", "eval_strategy"))
    best = plan.on("load_best_model_at_end") and "train.eval_steps" in plan.tree
    if best and str(plan.value("metric_for_best_model") or "loss").removeprefix("eval_") == "loss":
        plan.put("train.keep_best", "loss", ("load_best_model_at_end", "metric_for_best_model"))
    for name in ("early_stopping_patience", "early_stopping_steps"):
        if plan.on(name) and "train.eval_steps" in plan.tree:
            plan.put("train.early_stopping", int(plan.number(name)), (name,))
    why = "held-out lists are measured before and after training; `train.eval_steps` sets a distance within it"
    for name in ("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model"):
        plan.drop(name, why if held_out else "nothing is held out")


def _trackers(plan: Plan) -> None:
    value = plan.value("report_to")
    names = (
        [str(one) for one in value]
        if isinstance(value, list | tuple)
        else str(value or "none").replace(",", " ").split()
    )
    if [name.lower() for name in names] in (["none"], ["all"], []):
        plan.drop("report_to", "metrics are in the run's folder; `train.report_to` names trackers")
        return
    try:
        ours = list(checked_trackers(names))
    except ValueError as error:
        plan.drop("report_to", f"{error}, then set `train.report_to`")
        return
    plan.put("train.report_to", ours, ("report_to",))


def relative(path: str, file: Path) -> str:
    """A path of a file as it reads from here; a hub name stays what it is.

    Tried as written, then from the file's folder and those above it, as a tool is started from one of them.
    """
    if Path(path).is_absolute() or is_there(Path(path)):
        return path
    for folder in file.resolve().parents:
        if is_there(folder / path):
            return os.path.relpath(folder / path)
    return path
