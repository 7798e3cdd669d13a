"""TRL: `trl dpo|kto|reward --config FILE`, or the same arguments in a shell script.

Source: TRL 1.16's configs, ScriptArguments and ModelConfig; arguments of older releases are known too
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.files import is_there
from align.importing.losses import write_loss
from align.importing.parts import relative, write_adapter, write_course, write_model, write_training
from align.importing.plan import OFF, Plan
from align.importing.templates import write_template

NAME = "TRL"
METHOD = "method"
METHODS = {"dpo": "dpo", "kto": "kto", "reward": "reward", "orpo": "orpo", "cpo": "cpo", "simpo": "simpo"}
GENERAL = {
    "model_name": "model_name_or_path",
    "torch_dtype": "dtype",
    "lora_target": "lora_target_modules",
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",  # as transformers 5.24 calls it
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "dataset_mixer": "dataset_mixer",
    "preprocessing_num_workers": "dataset_num_proc",
    "warmup_fraction": "warmup_ratio",
    "chat_template_path": "chat_template_path",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "max_seq_length": "max_length",
}
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "num_train_epochs": 3.0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "bf16": True,
    "seed": 42,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 500,
    "eval_strategy": "no",
    "dtype": "float32",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "max_length": 1024,
    "beta": 0.1,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "discopop_tau": 0.05,
    "f_alpha_divergence_coef": 0.5,
    "ref_model_sync_steps": 512,
    "ref_model_mixup_alpha": 0.6,
    "disable_dropout": True,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
}
KEYS = frozenset(
    """
    method model_name_or_path model_name model_revision dtype torch_dtype attn_implementation trust_remote_code use_peft
    lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type
    use_rslora use_dora load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    bnb_4bit_compute_dtype use_bnb_double_quant model_code_revision tokenizer_name_or_path
    dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming datasets dataset_mixer
    dataset_mixture dataset_splits dataset_configs streaming ignore_bias_buffers gradient_checkpointing_use_reentrant
    model_init_kwargs ref_model_init_kwargs router_aux_loss_coef disable_dropout dataset_num_proc max_length
    max_prompt_length max_completion_length truncation_mode padding_free pad_to_multiple_of precompute_ref_log_probs
    precompute_ref_batch_size loss_type loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing
    beta use_weighting discopop_tau activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    pad_token padding_value label_pad_token_id is_encoder_decoder generate_during_eval model_adapter_name
    ref_adapter_name reference_free rpo_alpha cpo_alpha simpo_gamma alpha desirable_weight undesirable_weight
    chat_template chat_template_path eos_token center_rewards_coefficient use_liger_loss use_logits_to_keep tools
    train_sampling_strategy force_use_ref_model preprocessing_num_workers auto_insert_empty_system_msg
    output_dir overwrite_output_dir run_name do_train do_eval do_predict
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio num_train_epochs max_steps optim
    optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm average_tokens_across_devices
    bf16 fp16 tf32 bf16_full_eval fp16_full_eval gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    activation_checkpointing activation_checkpointing_kwargs
    use_liger_kernel neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps logging_first_step
    logging_dir log_level log_level_replica disable_tqdm report_to project trackio_space_id eval_strategy
    evaluation_strategy eval_steps eval_on_start eval_delay save_strategy save_steps save_total_limit save_only_model
    save_safetensors load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip push_to_hub
    hub_model_id hub_model_revision hub_strategy hub_token hub_private_repo hub_always_push hub_revision
    resume_from_checkpoint seed data_seed full_determinism group_by_length length_column_name auto_find_batch_size
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor remove_unused_columns
    label_names ddp_timeout ddp_find_unused_parameters ddp_backend deepspeed fsdp fsdp_config accelerator_config debug
    include_num_input_tokens_seen prediction_loss_only callbacks benchmarks wandb_project wandb_entity env
    sanity_check batch_eval_metrics dataloader_in_order dataloader_multiprocessing_context dataloader_persistent_workers
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_static_graph enable_jit_checkpoint eval_do_concat_batches
    eval_use_gather_object include_for_metrics label_smoothing_factor liger_kernel_config local_rank log_on_each_node
    logging_nan_inf_filter optim_target_modules parallelism_config restore_callback_states_from_checkpoint
    save_on_each_node skip_memory_metrics torch_compile_backend torch_compile_mode trackio_bucket_id
    trackio_static_space_id use_cache use_cpu
    """.split()  # noqa: SIM905, a table
)
CUT = "prompt and completion together; a longer completion loses its end"
MIXTURE_KEYS = frozenset({"id", "path", "name", "config", "split", "columns", "weight", "data_dir", "data_files"})
SHARE = "a share below 1 takes the first rows there; here it is how often a row is seen in an epoch"
OLD_PROMPT = "TRL 1.16 has no such argument; a prompt beyond it loses its beginning, as it did"


def method_of(values: Mapping[str, Any]) -> str | None:
    """A configuration does not say which trainer reads it; its keys tell."""
    if values.get("method"):
        return str(values["method"])
    for name, keys in {
        "kto": ("desirable_weight", "undesirable_weight"),
        "reward": ("center_rewards_coefficient",),
        "cpo": ("cpo_alpha", "simpo_gamma"),
        "sft": ("packing", "completion_only_loss", "assistant_only_loss", "dataset_text_field"),
        "grpo": ("num_generations", "reward_funcs"),
    }.items():
        if any(key in values for key in keys):
            return name
    if str(values.get("loss_type")) in ("kto", "apo_zero_unpaired"):
        return "kto"
    return "reward" if values.get("lora_task_type") == "SEQ_CLS" else None


def write(plan: Plan, method: str) -> None:
    """The recipe of TRL's arguments."""
    if method == "reward":
        plan.defaults = {**plan.defaults, "learning_rate": 1e-4}
    if plan.on("fp16") and not plan.given("bf16"):
        plan.defaults = {**plan.defaults, "bf16": False}
    dtype = str(plan.value("dtype")).rpartition(".")[2]
    guessed = dtype in ("auto", "none")
    why = "the model's own, which is bfloat16 for most" if guessed else ""
    write_model(plan, "bfloat16" if guessed else dtype, ("dtype",), why)
    plan.drop("use_peft", "every weight trains") if not plan.on("use_peft") else None
    write_adapter(plan, "lora" if plan.on("use_peft") else "full", ("use_peft",))
    _template(plan)
    write_data(plan, method)
    write_loss(plan, method, honours_smoothing=False)
    write_training(plan)
    write_course(plan)


def _template(plan: Plan) -> None:
    path = plan.value("chat_template_path")
    if path and str(path).endswith((".jinja", ".j2")):
        plan.put("policy.chat_template", relative(str(path), plan.file), ("chat_template_path",))
    elif path:
        raise plan.mistake("chat_template_path", "is no Jinja file; save that tokenizer's template as one, and name it")
    if "{" in str(plan.value("chat_template")):
        plan.chat_template = str(plan.value("chat_template")) + "\n"
        plan.put("policy.chat_template", "chat_template.jinja", ("chat_template",), "written beside the recipe")
    else:
        write_template(plan, "chat_template")


def write_data(plan: Plan, method: str) -> None:
    """Rows, held-out rows and lengths."""
    held_out = str(plan.value("eval_strategy") or "no").rpartition(".")[2].lower() not in ("no", "false")
    sources, tests, of, why = _sources(plan)
    plan.put("data.sources", sources, of, why)
    names = ("dataset_test_split", "eval_dataset")
    if held_out and tests:
        plan.put("data.eval_sources", tests, names)
    else:
        plan.put("data.eval_fraction", 0.0, (), "eval_strategy is no: every row trains" if not held_out else "")
    plan.drop("dataset_test_split", "nothing is held out, as eval_strategy is no")
    if plan.value("max_length") in OFF:
        plan.put("data.max_length", 32768, ("max_length",), "no limit")
    else:
        plan.put("data.max_length", int(plan.number("max_length")), ("max_length",), CUT if method != "reward" else "")
    if method == "reward":
        plan.put("data.overlong", "drop_list", ())
    if plan.on("max_prompt_length"):
        plan.put("data.max_prompt_length", int(plan.number("max_prompt_length")), ("max_prompt_length",), OLD_PROMPT)
    plan.drop("max_prompt_length", "no limit, as here")
    mode = str(plan.value("truncation_mode") or "keep_start")
    plan.drop("truncation_mode", "the completion's end is cut", differs=mode != "keep_start")
    if plan.on("dataset_num_proc"):
        plan.put("data.workers", int(plan.number("dataset_num_proc")), ("dataset_num_proc",))


Sources = tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[str, ...], str]


def _sources(plan: Plan) -> Sources:
    """Training rows, held-out rows, the keys that say them, and what differs."""
    key = "dataset_mixture" if plan.on("dataset_mixture") else "datasets"
    mixture = plan.value(key)
    if isinstance(mixture, dict):
        mixture = mixture.get("datasets")
    if entries := plan.as_list(key, mixture):
        return [_of_mixture(plan, key, one) for one in entries], [], ("dataset_mixture", "datasets"), ""
    if mixer := plan.value("dataset_mixer"):
        return _of_mixer(plan, mixer)
    name = plan.value("dataset_name")
    if not name:
        raise UserError(f"{plan.file}: no `dataset_name`; name the rows that are trained on")
    config = {"config": str(plan.value("dataset_config"))} if plan.given("dataset_config") else {}
    path = relative(str(name), plan.file)
    file = is_there(Path(path), Path.is_file)

    def split(key: str) -> dict[str, Any]:
        return {"path": path, **({} if file else {"split": str(plan.value(key))}), **config}

    of = ("dataset_name", "dataset_config", "dataset_train_split")
    return [split("dataset_train_split")], [] if file else [split("dataset_test_split")], of, ""


def _of_mixture(plan: Plan, key: str, entry: Any) -> dict[str, Any]:
    path = (entry.get("path") or entry.get("id")) if isinstance(entry, dict) else None
    if not path or set(entry) - MIXTURE_KEYS:
        raise plan.mistake(key, f"has an entry without `path`, or with other keys than {', '.join(MIXTURE_KEYS)}")
    source: dict[str, Any] = {"path": relative(str(entry.get("data_files") or path), plan.file)}
    if entry.get("split"):
        source["split"] = str(entry["split"])
    if config := entry.get("config") or entry.get("name"):
        source["config"] = str(config)
    if entry.get("weight") not in (None, 1, 1.0):
        source["weight"] = plan.as_number(key, entry["weight"])
    return source


def _of_mixer(plan: Plan, mixer: Any) -> Sources:
    """The alignment handbook's {name: share}, with the splits of all."""
    splits = plan.as_list("dataset_splits", plan.value("dataset_splits")) or ["train", "test"]
    train = [one for one in splits if "test" not in str(one)] or ["train"]
    tests = [one for one in splits if "test" in str(one)]
    if not isinstance(mixer, dict) or len(train) > 1:
        raise plan.mistake(
            "dataset_mixer", "is no mapping of names to shares with one training split; import that alone"
        )
    shares = {str(name): plan.as_number("dataset_mixer", share) for name, share in mixer.items()}
    sources: list[dict[str, Any]] = [{"path": relative(name, plan.file), "split": train[0]} for name in shares]
    for source, share in zip(sources, shares.values(), strict=True):
        if share != 1:
            source["weight"] = share
    held_out = [{"path": source["path"], "split": tests[0]} for source in sources] if tests else []
    partial = any(share != 1 for share in shares.values())
    return sources, held_out, ("dataset_mixer", "dataset_splits"), SHARE if partial else ""
