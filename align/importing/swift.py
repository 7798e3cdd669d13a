"""ms-swift: `swift rlhf ...` in a shell script, or the same arguments as YAML or JSON.

Source: ms-swift of August 2026, swift/arguments/*.py and swift/trainers/arguments.py
"""

from typing import Any

from align.importing.losses import write_loss
from align.importing.parts import relative, write_adapter, write_course, write_model, write_training
from align.importing.plan import Plan
from align.importing.templates import write_template

NAME = "ms-swift"
METHOD = "rlhf_type"
METHODS = {"dpo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "cpo": "cpo", "rm": "reward"}
GENERAL = {
    "rlhf_type": "method",
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
    "attn_impl": "attn_implementation",
    "lora_rank": "lora_r",
    "target_modules": "lora_target_modules",
    "init_weights": "init_lora_weights",
    "adapters": "start_adapter",
    "split_dataset_ratio": "val_size",
    "train_type": "tuner_type",
    "sft_type": "tuner_type",
}
DEFAULTS: dict[str, Any] = {
    "method": "dpo",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.0,
    "num_train_epochs": 3.0,
    "optim": "adamw_torch",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": True,
    "seed": 42,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 500,
    "tuner_type": "lora",
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": "all-linear",
    "adalora_target_r": 8,
    "adalora_init_r": 12,
    "dtype": "bfloat16",
    "simpo_gamma": 1.0,
    "cpo_alpha": 1.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "discopop_tau": 0.05,
    "f_alpha_divergence_coef": 1.0,
    "disable_dropout": True,
    "val_size": 0.0,
    "max_length": 32768,
}
KEYS = frozenset(
    """
    rlhf_type model model_type model_revision torch_dtype attn_impl task_type num_labels tuner_type train_type sft_type
    tuner_backend adapters lora_rank lora_alpha lora_dropout lora_bias lora_dtype lorap_lr_ratio target_modules
    target_regex modules_to_save use_rslora use_dora init_weights adalora_target_r adalora_init_r
    freeze_llm freeze_vit freeze_aligner freeze_parameters freeze_parameters_ratio trainable_parameters
    quant_method quant_bits bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage
    template system max_length truncation_strategy max_pixels agent_template loss_scale template_backend
    enable_thinking response_prefix padding_side padding_free use_chat_template
    dataset val_dataset cached_dataset cached_val_dataset split_dataset_ratio data_seed dataset_num_proc
    load_from_cache_file dataset_shuffle val_dataset_shuffle streaming interleave_prob columns strict model_name
    model_author custom_dataset_info remove_unused_columns lazy_tokenize packing packing_length
    beta label_smoothing rpo_alpha ld_alpha discopop_tau loss_type loss_weights cpo_alpha simpo_gamma desirable_weight
    undesirable_weight center_rewards_coefficient f_divergence_type reference_free precompute_ref_log_probs
    ref_model ref_adapters ref_model_type ref_model_revision max_completion_length temperature
    output_dir add_version create_checkpoint_symlink report_to swanlab_project swanlab_exp_name swanlab_mode
    swanlab_token logging_steps logging_first_step logging_dir eval_steps eval_strategy save_steps save_strategy
    save_total_limit save_only_model save_safetensors safe_serialization load_best_model_at_end metric_for_best_model
    greater_is_better per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate
    num_train_epochs max_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps optim
    optimizer weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm gradient_checkpointing
    gradient_checkpointing_kwargs vit_gradient_checkpointing use_liger_kernel neftune_noise_alpha router_aux_loss_coef
    bf16 fp16 seed deepspeed fsdp ddp_timeout ddp_backend ddp_find_unused_parameters sequence_parallel_size
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    train_dataloader_shuffle group_by_length resume_from_checkpoint resume_only_model ignore_data_skip push_to_hub
    hub_model_id hub_token use_hf device_map ignore_args_error disable_dropout use_logits_to_keep galore_rank use_galore
    """.split()  # noqa: SIM905, a table
)
SCOPE = "ms-swift reads names at ModelScope, Align at Hugging Face's hub: look whether it is the same there"


def write(plan: Plan, method: str) -> None:
    """The recipe of an ms-swift command."""
    if plan.given("cached_dataset"):
        raise plan.mistake("cached_dataset", "is tokenised already; give the data set that it was made of as `dataset`")
    kind = str(plan.value("tuner_type"))
    _defaults(plan, method, kind)
    if plan.given("quant_bits"):
        if int(plan.number("quant_bits")) != 4:
            raise plan.mistake("quant_bits", "cannot be imported: 4 is the only width here")
        plan.put("policy.quantization", "4bit", ("quant_bits", "quant_method"))
    dtype = str(plan.value("dtype"))
    why = "" if plan.given("dtype") else "it takes the model's own, which is bfloat16 for most"
    write_model(plan, dtype, ("dtype",), why)
    _at_model_scope(plan)
    write_adapter(plan, {"longlora": "lora"}.get(kind, kind), ("tuner_type",))
    write_template(plan, "template")
    _data(plan)
    write_loss(plan, method, honours_smoothing=False)
    write_training(plan)
    write_course(plan)


def _defaults(plan: Plan, method: str, kind: str) -> None:
    """What depends on other settings there."""
    batch = max(1, int(plan.number("per_device_train_batch_size")) * plan.devices)
    computed = {
        "beta": 2.0 if method == "simpo" else 0.1,
        "learning_rate": 1e-5 if kind == "full" else 1e-4,
        "gradient_accumulation_steps": max(1, -(-16 // batch)),
        "bf16": str(plan.value("dtype")) == "bfloat16",
        "fp16": str(plan.value("dtype")) == "float16",
        "output_dir": f"output/{str(plan.value('model_name_or_path')).rpartition('/')[2]}",
        "disable_dropout": method != "reward",
    }
    plan.defaults = {**plan.defaults, **computed}
    if plan.given("max_epochs"):
        plan.values["num_train_epochs"] = plan.values["max_epochs"]
        plan.drop("max_epochs", "it is the number of epochs")


def _at_model_scope(plan: Plan) -> None:
    if plan.on("use_hf") or not plan.given("model_name_or_path"):
        plan.drop("use_hf", "names are looked up there")
        return
    organisation = str(plan.value("model_name_or_path")).partition("/")[0]
    if organisation in ("LLM-Research", "AI-ModelScope", "modelscope", "swift"):
        why = f"`{organisation}` is an organisation of ModelScope's; {SCOPE}"
        plan.comments["policy.model"] = f"model: {why}"


def _data(plan: Plan) -> None:
    found = [_source(plan, one) for one in _words(plan, "dataset")]
    limits = {limit for _, limit in found}
    hub = not plan.on("use_hf") and any("/" in source["path"] and not _is_local(source["path"]) for source, _ in found)
    plan.put("data.sources", [source for source, _ in found], ("dataset",), SCOPE if hub else "")
    if limits != {None}:
        if len(limits) > 1:
            raise plan.mistake("dataset", "takes `#` numbers of rows that differ; give the same for all, or none")
        plan.tree["data.limit"] = limits.pop()
        plan.comments["data.limit"] = "dataset: the number behind #; the first rows, where ms-swift samples them"
    if plan.given("val_dataset"):
        plan.put("data.eval_sources", [_source(plan, one)[0] for one in _words(plan, "val_dataset")], ("val_dataset",))
        plan.drop("val_size", "val_dataset is held out")
    else:
        size = plan.number("val_size")
        plan.put("data.eval_fraction", float(size), ("val_size",), "shares are of prompts" if size else "")
    unset = "" if plan.given("max_length") else "it takes the model's own length"
    plan.put("data.max_length", int(plan.number("max_length")), ("max_length",), unset)
    strategy = str(plan.value("truncation_strategy") or "delete")
    ours = {"delete": "drop_list", "right": "truncate", "left": "truncate"}.get(strategy, "drop_list")
    why = "the completion's end is cut" if strategy == "left" else ""
    plan.put("data.overlong", ours, ("truncation_strategy",), why, differs=strategy == "left")
    if plan.on("dataset_num_proc"):
        plan.put("data.workers", int(plan.number("dataset_num_proc")), ("dataset_num_proc",))
    if plan.given("enable_thinking"):
        plan.put("data.template_options", {"enable_thinking": plan.on("enable_thinking")}, ("enable_thinking",))


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.endswith((".jsonl", ".json", ".csv", ".parquet"))


def _words(plan: Plan, key: str) -> list[str]:
    value = plan.value(key)
    if not value:
        raise plan.mistake(key, "is missing; name the rows that are trained on")
    return [str(one) for one in value] if isinstance(value, list) else str(value).split()


def _source(plan: Plan, text: str) -> tuple[dict[str, Any], int | None]:
    """A data set as ms-swift writes it, [HF:: | MS::]id[:subset[/subset]][#number]."""
    name, _, number = text.partition("#")
    name = name.removeprefix("HF::").removeprefix("MS::")
    path, colon, subset = name.partition(":")
    if "/" in subset:
        raise plan.mistake("dataset", "names several subsets; write the data set once for each")
    source: dict[str, Any] = {"path": relative(path, plan.file), "turns": True}
    return {**source, **({"config": subset} if colon and subset else {})}, int(number) if number.isdecimal() else None
