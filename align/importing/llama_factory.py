"""LLaMA-Factory: `llamafactory-cli train FILE`, its data sets by `dataset_info.json`.

Source: LLaMA-Factory of August 2026, hparams/*.py, data/parser.py and train/*/workflow.py
"""

from pathlib import Path
from typing import Any

from align.data.dataset_info import COLUMNS, INFO, SAME, descriptions
from align.errors import UserError
from align.importing.losses import write_loss
from align.importing.parts import relative, write_adapter, write_course, write_model, write_training
from align.importing.plan import Plan
from align.importing.templates import write_template

NAME = "LLaMA-Factory"
METHOD = "stage"
METHODS = {"dpo": "dpo", "kto": "kto", "rm": "reward", "orpo": "orpo"}
GENERAL = {
    "stage": "method",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "pref_ftx": "rpo_alpha",
    "pref_bco_weight": "bco_weight",
    **{f"{method}_beta": "beta" for method in ("dpo", "kto", "orpo")},  # of its releases before 0.8
    **{f"{method}_ftx": "rpo_alpha" for method in ("dpo", "kto")},
    "dpo_loss": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "pissa_init": "pissa_init",
    "adapter_name_or_path": "start_adapter",
    "flash_attn": "attn_implementation",
    "cutoff_len": "max_length",
    "preprocessing_num_workers": "dataset_num_proc",
}
"""Its names -> the general ones."""
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "num_train_epochs": 3.0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "seed": 42,
    "save_strategy": "steps",
    "save_steps": 500,
    "eval_strategy": "no",
    "finetuning_type": "lora",
    "lora_r": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": "all",
    "max_length": 2048,
    "beta": 0.1,
    "loss_type": "sigmoid",
    "simpo_gamma": 0.5,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "disable_dropout": True,
    "val_size": 0.0,
    "dataset_dir": "data",
}
KEYS = frozenset(
    """
    stage do_train do_eval do_predict finetuning_type lora_rank lora_alpha lora_dropout lora_target use_rslora use_dora
    pissa_init pissa_iter additional_target create_new_adapter loraplus_lr_ratio loraplus_lr_embedding
    model_name_or_path adapter_name_or_path model_revision trust_remote_code cache_dir use_fast_tokenizer resize_vocab
    rope_scaling flash_attn shift_attn use_unsloth enable_liger_kernel disable_gradient_checkpointing upcast_layernorm
    quantization_bit quantization_method quantization_type double_quantization print_param_status moe_aux_loss_coef
    image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_maxlen
    template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt mask_history streaming mix_strategy
    interleave_probs overwrite_cache preprocessing_batch_size preprocessing_num_workers max_samples val_size packing
    neat_packing tool_format default_system enable_thinking tokenized_path
    dpo_beta kto_beta orpo_beta dpo_ftx kto_ftx dpo_loss pref_beta pref_ftx pref_bco_weight pref_loss
    dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ld_alpha
    ref_model ref_model_adapters ref_model_quantization_bit reward_model
    use_galore use_badam use_apollo use_adam_mini use_muon pure_bf16 freeze_vision_tower freeze_multi_modal_projector
    freeze_trainable_layers freeze_trainable_modules compute_accuracy disable_shuffling early_stopping_steps plot_loss
    include_effective_tokens_per_second use_swanlab swanlab_project swanlab_run_name swanlab_mode swanlab_api_key
    output_dir overwrite_output_dir logging_steps save_steps save_only_model report_to run_name
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate num_train_epochs
    max_steps lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps bf16 fp16 tf32 optim optim_args
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed data_seed ddp_timeout deepspeed fsdp fsdp_config
    resume_from_checkpoint eval_strategy evaluation_strategy eval_steps save_strategy save_total_limit
    load_best_model_at_end metric_for_best_model greater_is_better logging_first_step dataloader_num_workers
    dataloader_drop_last dataloader_pin_memory remove_unused_columns group_by_length gradient_checkpointing
    ddp_find_unused_parameters include_num_input_tokens_seen push_to_hub hub_model_id hub_token hub_strategy
    neftune_noise_alpha torch_compile save_safetensors logging_dir disable_tqdm log_level ignore_data_skip
    """.split()  # noqa: SIM905, a table
)
"""What such a file may hold."""
BASE = "adapters train in float32 on a base in bfloat16, there and here"


def write(plan: Plan, method: str) -> None:
    """The recipe of a LLaMA-Factory file."""
    kind = str(plan.value("finetuning_type"))
    half = "bfloat16" if plan.on("bf16") or plan.on("pure_bf16") else "float16" if plan.on("fp16") else "float32"
    full = kind == "full" and not plan.on("pure_bf16")
    if plan.given("quantization_bit"):
        _quantised(plan)
    write_model(plan, "float32" if full else half, (), "its float32 copy is what trains" if full else BASE)
    if plan.value("lora_alpha") is None and kind == "lora":
        plan.defaults = {**plan.defaults, "lora_alpha": 2 * int(plan.number("lora_r"))}
    if plan.on("pissa_init"):
        plan.values["init_lora_weights"] = "pissa"
        plan.done.add("init_lora_weights")
    write_adapter(plan, kind, ("finetuning_type", "pissa_init"))
    write_template(plan, "template")
    _data(plan)
    loss = "orpo" if method == "orpo" else str(plan.value("loss_type"))
    method = "dpo" if method == "orpo" else method  # which a stage of its own used to be
    write_loss(plan, loss if method == "dpo" and loss in ("orpo", "simpo") else method, honours_smoothing=True)
    if plan.on("pure_bf16"):
        plan.values.setdefault("bf16", True)
    if plan.on("disable_gradient_checkpointing"):
        plan.put("train.gradient_checkpointing", False, ("disable_gradient_checkpointing",))
        plan.values["gradient_checkpointing"] = False
    if method == "reward":
        plan.defaults = {**plan.defaults, "disable_dropout": False}
    write_training(plan)
    plan.drop("pure_bf16", "policy.dtype and train.precision say it")
    plan.drop("disable_gradient_checkpointing", "train.gradient_checkpointing says it")
    write_course(plan)


def _quantised(plan: Plan) -> None:
    if int(plan.number("quantization_bit")) != 4:
        raise plan.mistake("quantization_bit", "cannot be imported: 4 is the only width here")
    plan.put("policy.quantization", "4bit", ("quantization_bit", "quantization_method"))


def _data(plan: Plan) -> None:
    """The data sets, each by its entry in dataset_info.json."""
    limit = int(plan.number("max_samples")) if plan.on("max_samples") else None
    sources = [_source(plan, name) for name in _names(plan, "dataset")]
    plan.put("data.sources", sources, ("dataset", "dataset_dir", "interleave_probs", "mix_strategy"))
    if plan.given("eval_dataset"):
        plan.put("data.eval_sources", [_source(plan, name) for name in _names(plan, "eval_dataset")], ("eval_dataset",))
        plan.drop("val_size", "eval_dataset is held out")
    else:
        size = plan.number("val_size")
        if size > 1:
            raise plan.mistake("val_size", "is a number of rows; give a share of them, from 0 to 1")
        plan.put("data.eval_fraction", float(size), ("val_size",), "shares are of prompts" if size else "")
    if limit:
        plan.put("data.limit", limit, ("max_samples",))
    cut = "the completion's end is cut; LLaMA-Factory cuts prompt and completion by their lengths"
    plan.put("data.max_length", int(plan.number("max_length")), ("max_length",), cut)
    if plan.on("dataset_num_proc"):
        plan.put("data.workers", int(plan.number("dataset_num_proc")), ("dataset_num_proc",))
    if plan.given("enable_thinking"):
        plan.put("data.template_options", {"enable_thinking": plan.on("enable_thinking")}, ("enable_thinking",))


def _names(plan: Plan, key: str) -> list[str]:
    value = plan.value(key)
    if not value:
        raise plan.mistake(key, "is missing; name the rows that are trained on")
    return [str(one).strip() for one in (value if isinstance(value, list) else str(value).split(","))]


def _source(plan: Plan, name: str) -> dict[str, Any]:
    """One data set's source."""
    folder = Path(relative(str(plan.value("dataset_dir")), plan.file))
    found = descriptions(folder)
    if not found:
        remedy = "run `align import` where LLaMA-Factory ran, or set dataset_dir"
        raise UserError(f"{plan.file}: `dataset: {name}`: there is no {INFO} in {folder}; {remedy}")
    if name not in found:
        raise UserError(
            f"{plan.file}: `dataset: {name}` is none of {INFO} in {folder}; it has {', '.join(sorted(found))}"
        )
    own = found[name]
    if "images" in (own.get("columns") or {}):
        raise UserError(f"{folder / INFO}: `{name}` has images; rows of text alone are trained on")
    turns = {} if own.get("formatting") == "sharegpt" else {"turns": True}
    if own.get("file_name"):
        return {"path": str(folder), "split": name, **turns}
    place = own.get("hf_hub_url") or own.get("ms_hub_url")
    if not place:
        raise UserError(f"{folder / INFO}: `{name}` is made by a script or in a cloud; save its rows as a file first")
    source: dict[str, Any] = {"path": place, "split": own.get("split") or "train", **turns}
    if own.get("subset"):
        source["config"] = own["subset"]
    renamed = {
        COLUMNS.get(part, part): at for part, at in (own.get("columns") or {}).items() if part in (*COLUMNS, *SAME)
    }
    if columns := {part: at for part, at in renamed.items() if part != at}:
        source["columns"] = columns
    return source
