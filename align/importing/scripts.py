"""A script's settings as a recipe: TRL's arguments, with Unsloth's own words for the model."""

from typing import Any

from align.importing import trl
from align.importing.parts import relative
from align.importing.plan import Plan

NAME = "a script"
GENERAL = {
    **trl.GENERAL,
    "adapter_random_state": "adapter_random_state",
    "lora_target_modules": "lora_target_modules",
}
KEYS = trl.KEYS | frozenset(
    """
    dataset_split eval_dataset_name eval_dataset_split eval_dataset_config adapter_random_state model_max_seq_length
    bias task_type loftq_config full_finetuning use_gradient_checkpointing fast_inference load_in_16bit max_lora_rank
    start_adapter
    gpu_memory_utilization use_exact_model_name modules_to_save layers_to_transform init_lora_weights low_cpu_mem_usage
    layers_pattern rank_pattern alpha_pattern inference_mode exclude_modules fan_in_fan_out use_cache unsloth_tiled_mlp
    bnb_4bit_use_double_quant num_labels revision finetune_language_layers ensure_weight_tying packing
    """.split()  # noqa: SIM905, a table
)
UNSLOTH_DEFAULTS: dict[str, Any] = {"load_in_4bit": True, "lora_alpha": 16, "lora_dropout": 0.0}
"""Where Unsloth's calls differ from TRL's and PEFT's."""
PEFT_DEFAULTS: dict[str, Any] = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}


def write(plan: Plan, method: str, unsloth: bool, notes: dict[str, str]) -> None:
    """The recipe of a script's calls."""
    plan.defaults = {**plan.defaults, **PEFT_DEFAULTS}
    if unsloth:
        plan.defaults = {**plan.defaults, **UNSLOTH_DEFAULTS, "dtype": "bfloat16", "lora_r": 16}
        if "use_gradient_checkpointing" in plan.values and "gradient_checkpointing" not in plan.values:
            plan.values["gradient_checkpointing"] = plan.values.pop("use_gradient_checkpointing") or False
            plan.spelled = {**plan.spelled, "gradient_checkpointing": "use_gradient_checkpointing"}
    if plan.given("revision"):
        plan.values["model_revision"] = plan.values.pop("revision")
    if plan.on("max_steps") and plan.number("max_steps") <= 0:
        plan.values.pop("max_steps")
    name, split, config = (plan.values.pop(key, None) for key in ("dataset_name", "dataset_split", "dataset_config"))
    tests = [plan.values.pop(f"eval_{key}", None) for key in ("dataset_name", "dataset_split", "dataset_config")]
    plan.values["dataset_mixture"] = [_entry(name, split, config)]
    plan.spelled = {**plan.spelled, "dataset_mixture": "train_dataset"}
    trl.write(plan, method)
    if note := notes.get("dataset_name"):
        _note(plan, "data.sources", note)
    if tests[0]:
        source = {key: own for key, own in _entry(*tests).items() if own is not None}
        plan.tree.pop("data.eval_fraction", None)
        plan.values["eval_dataset"] = relative(str(tests[0]), plan.file)
        plan.put("data.eval_sources", [{**source, "path": relative(str(tests[0]), plan.file)}], ("eval_dataset",))


def _entry(name: Any, split: Any, config: Any) -> dict[str, Any]:
    entry = {"path": name, "split": split, "config": config}
    return {key: own for key, own in entry.items() if own is not None}


def _note(plan: Plan, key: str, note: str) -> None:
    plan.comments[key] = f"{plan.comments.get(key, '')}; {note}".lstrip("; ")
    for place, line in enumerate(plan.lines):
        if line.ours.startswith(f"{key}:"):
            plan.lines[place] = line._replace(verdict="changed", why=note, differs=True)
