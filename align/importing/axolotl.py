"""axolotl: `axolotl train FILE`.

Source: axolotl of July 2026, utils/schemas/*.py, core/builders/*.py and prompt_strategies/{dpo,kto,orpo,bradley_terry}
"""

from collections.abc import Mapping
from typing import Any

from align.errors import UserError
from align.importing.losses import write_loss
from align.importing.parts import relative, write_adapter, write_course, write_model, write_training
from align.importing.plan import Plan, brief
from align.importing.templates import write_template

NAME = "axolotl"
METHOD = "rl"
METHODS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "reward": "reward"}
GENERAL = {
    "rl": "method",
    "base_model": "model_name_or_path",
    "revision_of_model": "model_revision",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "orpo_alpha": "orpo_alpha",
    "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_use_weighting": "use_weighting",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "lora_model_dir": "start_adapter",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "sequence_len": "max_length",
    "val_set_size": "val_size",
    "dataset_processes": "dataset_num_proc",
}
DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "num_train_epochs": 1.0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "seed": 42,
    "max_length": 512,
    "beta": 0.1,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "disable_dropout": True,
    "val_size": 0.0,
    "output_dir": "./model-out",
    "reference_free": False,
    "discopop_tau": 0.05,
}
KEYS = frozenset(
    """
    base_model base_model_config revision_of_model model_type num_labels tokenizer_type trust_remote_code
    tokenizer_config is_llama_derived_model is_mistral_derived_model is_qwen_derived_model tokenizer_use_fast
    tokenizer_legacy
    load_in_8bit load_in_4bit bf16 fp16 bfloat16 float16 tf32 rl rl_beta dpo_beta dpo_loss_type dpo_loss_weights
    dpo_label_smoothing dpo_use_weighting orpo_alpha simpo_gamma cpo_alpha rpo_alpha kto_desirable_weight
    kto_undesirable_weight reward_model process_reward_model center_rewards_coefficient precompute_ref_log_probs
    dpo_padding_free dpo_use_liger_kernel trl datasets test_datasets dataset_prepared_path dataset_processes
    dataset_num_proc dataset_exact_deduplication dataset_keep_in_memory shuffle_merged_datasets val_set_size
    remove_unused_columns chat_template chat_template_jinja default_system_message special_tokens tokens
    added_tokens_overrides eot_tokens sequence_len eval_sequence_len sample_packing eval_sample_packing
    pad_to_sequence_len pad_to_multiple_of group_by_length train_on_inputs excess_length_strategy max_prompt_len
    adapter lora_model_dir lora_r lora_alpha lora_dropout lora_target_linear lora_target_modules lora_target_parameters
    lora_modules_to_save lora_fan_in_fan_out peft_use_dora peft_use_rslora peft_init_lora_weights peft
    peft_layers_to_transform loraplus_lr_ratio lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel
    relora unfrozen_parameters output_dir hub_model_id hub_strategy push_dataset_to_hub hf_use_auth_token
    use_wandb wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model wandb_mode
    use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name use_comet use_tensorboard
    use_swanlab swanlab_project swanlab_experiment_name swanlab_run_name swanlab_description swanlab_mode
    swanlab_workspace swanlab_api_key swanlab_log_model swanlab_log_completions swanlab_completion_log_interval
    swanlab_completion_max_buffer swanlab_lark_webhook_url swanlab_lark_secret swanlab_web_host swanlab_api_host
    plugins gradient_accumulation_steps micro_batch_size batch_size eval_batch_size num_epochs max_steps optimizer
    optim_args lr_scheduler lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio learning_rate
    embedding_lr embedding_lr_scale weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm gradient_clipping
    gradient_checkpointing gradient_checkpointing_kwargs activation_offloading resume_from_checkpoint
    auto_resume_from_checkpoints logging_steps flash_attention xformers_attention sdp_attention flex_attention
    eager_attention attn_implementation flash_attn_cross_entropy warmup_steps warmup_ratio evals_per_epoch eval_steps
    eval_strategy saves_per_epoch save_steps save_strategy save_total_limit save_safetensors save_first_step
    save_only_model early_stopping_patience load_best_model_at_end metric_for_best_model greater_is_better
    neftune_noise_alpha loss_watchdog_threshold loss_watchdog_patience debug deepspeed fsdp fsdp_config fsdp_version
    dp_shard_size dp_replicate_size tensor_parallel_size context_parallel_size sequence_parallel_degree ddp_timeout
    ddp_find_unused_parameters accelerator_config torch_compile torch_compile_backend seed strict device local_rank
    dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor liger_rope liger_rms_norm
    liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy cut_cross_entropy use_kernels
    use_scattermoe use_sonicmoe use_onebitllms experimental_skip_move_to_device low_cpu_mem_usage profiler_steps
    include_tokens_per_second max_memory ddp include_tkps
    """.split()  # noqa: SIM905, a table
)
CHATML = {"chatml": "chatml", "llama3": "llama3", "zephyr": "zephyr"}
"""First word of a type -> the template that it writes."""
TYPES: Mapping[str, Mapping[str, str]] = {
    "intel": {"prompt": "question"},
    "icr": {"prompt": "input"},
    "argilla_chat": {},
    "prompt_pairs": {},
    "ultra": {},
    "argilla": {},
    "default": {},
    "nectar": {},
    "": {},
}
"""Second word of a type -> where our columns are in its rows, where they have other names."""
NECTAR = "all seven ranked answers are trained on; axolotl folds them into one pair of the two worst"
USER_FIELDS = {
    "field_prompt": "prompt",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}
SOURCE_KEYS = frozenset(
    """
    path split type name revision data_files ds_type field_messages field_chosen field_rejected chat_template roles
    message_property_mappings message_field_role message_field_content trust_remote_code shards
    """.split()  # noqa: SIM905, a table
)


def method_of(values: Mapping[str, Any]) -> str | None:
    """What the file trains: `rl`, or a reward model by a key of its own."""
    if values.get("process_reward_model"):
        return "prm"
    if values.get("reward_model"):
        return "reward"
    return str(values["rl"]) if values.get("rl") else "pretrain" if values.get("pretraining_dataset") else "sft"


def write(plan: Plan, method: str) -> None:
    """The recipe of an axolotl file."""
    for own, general in (("bfloat16", "bf16"), ("float16", "fp16")):
        if plan.on(own) and not plan.given(general):
            plan.values[general] = True
        plan.drop(own, f"it is {general}")
    plan.drop("reward_model", "task says it")
    half = "bfloat16" if plan.on("bf16") else "float16" if plan.on("fp16") else "float32"
    write_model(plan, half, (), "axolotl holds every weight in the precision it trains in")
    kind = str(plan.value("adapter") or "full")
    if kind == "qlora" and not plan.on("load_in_4bit"):
        plan.put("policy.quantization", "4bit", ("adapter",))
    if plan.on("lora_target_linear"):
        _all_linear(plan)
    write_adapter(plan, {"qlora": "lora"}.get(kind, kind), ("adapter", "lora_target_linear"))
    _loss(plan, method)
    _data(plan)
    write_training(plan)
    write_course(plan)


def _all_linear(plan: Plan) -> None:
    """axolotl acts on every linear layer and on those that are named, which are among them."""
    plan.drop("lora_target_modules", "lora_target_linear takes every linear layer, those among them")
    plan.values["lora_target_modules"] = "all-linear"


def _loss(plan: Plan, method: str) -> None:
    trl = plan.values.get("trl") or {}
    if isinstance(trl, dict) and trl.get("beta") is not None:
        plan.values["beta"] = trl["beta"]
        plan.spelled = {**plan.spelled, "beta": "trl.beta"}
    if method == "orpo" and not plan.given("beta") and plan.given("orpo_alpha"):
        plan.values["beta"] = plan.values.pop("orpo_alpha")
        plan.spelled = {**plan.spelled, "beta": "orpo_alpha"}
    if plan.values.get("method") == "ipo":
        plan.values["loss_type"] = "ipo"
        plan.spelled = {**plan.spelled, "loss_type": "rl"}
    write_loss(plan, method, honours_smoothing=False)


def _data(plan: Plan) -> None:
    entries = plan.value("datasets")
    if not isinstance(entries, list) or not entries:
        raise plan.mistake("datasets", "is no list of data sets; name the rows that are trained on")
    found = [_source(plan, "datasets", entry) for entry in entries]
    notes = "; ".join(dict.fromkeys(note for _, _, note in found if note))
    templates = {template for _, template, _ in found if template}
    if len(templates) > 1:
        raise plan.mistake(
            "datasets", f"use several chat templates ({', '.join(sorted(templates))}); import each alone"
        )
    if templates:
        plan.drop("chat_template", "the data set's `type` writes its own")
        plan.values["type"] = templates.pop()
        plan.spelled = {**plan.spelled, "type": "datasets.type"}
    write_template(plan, "type" if "type" in plan.values else "chat_template")
    plan.put("data.sources", _once(plan, [source for source, _, _ in found]), ("datasets",), notes, differs=bool(notes))
    tests = plan.as_list("test_datasets", plan.value("test_datasets"))
    if tests:
        plan.put("data.eval_sources", [_source(plan, "test_datasets", one)[0] for one in tests], ("test_datasets",))
    size = plan.number("val_size") if plan.value("val_size") is not None else 0
    if size > 1:
        raise plan.mistake("val_size", "is a number of rows; give a share of them, from 0 to 1")
    if not tests:
        plan.put("data.eval_fraction", float(size), ("val_size",), "shares are of prompts" if size else "")
    plan.put("data.max_length", int(plan.number("max_length")), ("max_length",))
    strategy = str(plan.value("excess_length_strategy") or "drop")
    overlong = "truncate" if strategy == "truncate" else "drop_list"
    plan.put("data.overlong", overlong, ("excess_length_strategy",), "" if plan.given("excess_length_strategy") else "")
    if plan.on("dataset_num_proc"):
        plan.put("data.workers", int(plan.number("dataset_num_proc")), ("dataset_num_proc",))


def _once(plan: Plan, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources, each once where axolotl removes rows that it has already."""
    if not plan.on("dataset_exact_deduplication"):
        return sources
    kept = [one for place, one in enumerate(sources) if one not in sources[:place]]
    plan.drop("dataset_exact_deduplication", f"{len(sources) - len(kept)} sources that are there twice are left out")
    return kept


def _source(plan: Plan, key: str, entry: Any) -> tuple[dict[str, Any], str | None, str]:
    """A source, the template that its type writes, and what differs."""
    where = f"{plan.file}: `{key}`"
    if not isinstance(entry, dict) or not entry.get("path"):
        raise UserError(f"{where}: an entry has no `path`; name a file or a hub data set")
    if unknown := sorted(set(entry) - SOURCE_KEYS):
        raise UserError(f"{where}: `{unknown[0]}` of {entry['path']} is not known here; remove it, or name the columns")
    files = entry.get("data_files")
    path = (
        files[0] if isinstance(files, list) and len(files) == 1 else files if isinstance(files, str) else entry["path"]
    )
    if isinstance(files, list) and len(files) > 1:
        raise UserError(f"{where}: {entry['path']} has several `data_files`; give each an entry of its own")
    local = entry.get("ds_type") or files
    source: dict[str, Any] = {"path": relative(str(path), plan.file)}
    if entry.get("split") and not local:
        source["split"] = _split(where, str(entry["split"]))
    source |= {
        ours: entry[theirs] for theirs, ours in (("name", "config"), ("revision", "revision")) if entry.get(theirs)
    }
    columns, template, note = _type(where, entry)
    if template or str(entry.get("type")).startswith("bradley_terry"):
        source["turns"] = True
    return {**source, **({"columns": columns} if columns else {})}, template, note


def _split(where: str, split: str) -> str:
    name, bracket, _ = split.partition("[")
    if bracket:
        raise UserError(f"{where}: `split: {split}` takes a part of it; name the split, and set data.limit")
    return name


def _type(where: str, entry: Mapping[str, Any]) -> tuple[dict[str, str], str | None, str]:
    """Our columns, the template and what differs, by a data set's `type`."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        if formats := [name for name in kind if name.endswith("_format") and kind[name]]:
            problem = f"`{formats[0]}: {brief(kind[formats[0]])}` writes a text of its own"
            raise UserError(f"{where}: {problem}; give rows of messages, and that text as policy.chat_template")
        named = {USER_FIELDS[name]: str(kind[name]) for name in kind if name in USER_FIELDS and kind[name]}
        return {ours: theirs for ours, theirs in named.items() if ours != theirs}, None, ""
    first, _, second = str(kind or "chat_template.default").partition(".")
    if first == "chat_template":
        asked = {"prompt": "field_messages", "chosen": "field_chosen", "rejected": "field_rejected"}
        named = {ours: str(entry[theirs]) for ours, theirs in asked.items() if entry.get(theirs)}
        if not named.get("prompt") and second == "default":
            named["prompt"] = "messages"
        return {ours: at for ours, at in named.items() if ours != at}, None, ""
    if first in ("bradley_terry", "passthrough"):
        system = "bradley_terry" in first and second == "chat_template"
        return ({"prompt": "input"} if system else {}), None, ""
    if first not in CHATML or second not in TYPES:
        known = ", ".join(f"{one}.*" for one in ("chat_template", *CHATML, "bradley_terry"))
        raise UserError(f"{where}: `type: {brief(kind)}` of {entry['path']} is not known here; {known} are")
    return dict(TYPES[second]), CHATML[first], NECTAR if second == "nectar" else ""
