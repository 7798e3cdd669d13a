"""What other trainers call our keys: TRL, PEFT, LLaMA-Factory, axolotl, ms-swift and Unsloth.

Names and meanings are of TRL 1.16, PEFT 0.21, LLaMA-Factory 0.9, axolotl 0.19, ms-swift 4.6 and Unsloth 2026.10. A test
holds every key and value here to the recipe's schema.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from align.objectives import REFUSED, TRL_NAMES


class Here(NamedTuple):
    """What stands for another tool's key."""

    write: str = ""
    """Our key, which takes the same value; or `key=value`, which stands for that tool's usual value; or nothing."""
    note: str = ""
    """How the value translates; of a key without a counterpart, what holds instead."""


_STEP = "count the lists (pairs) of a whole step: per-device batch x accumulation x devices"
_MEMORY = "it bounds a forward pass by tokens, not rows, and changes memory and speed, never the result"
_LAUNCH = "several processes are `accelerate launch -m align.cli train RECIPE`, with the same recipe"
_FILES = "a run's files are as they are: metrics.jsonl, events.log, checkpoints/ and the final adapter/"
_LOADING = "rows are tokenised before training, and loading them takes no tuning"
_HUB = "upload afterwards with `align export RUN OUTPUT --push HUB_NAME`"
_SHARED = "a list runs as one row with its prompt computed once, nothing padded"
_NO_QUANT = "only 4-bit: `policy.quantization=4bit`"
_ADAPTER = "`policy.adapter` has no such option"
_ALWAYS = "it is always so here"
_ROWS = 'name the columns as README\'s "Your model, your data" lists them'
_MARGIN = "objective.margin, for example `objective={name: logistic, margin: 0.5}`"

NAMES: Mapping[str, Here] = {
    # the model
    **dict.fromkeys(
        ("model_name_or_path", "model_name", "base_model", "model", "model_id", "model_path", "pretrained"),
        Here("policy.model"),
    ),
    **dict.fromkeys(("model_revision", "revision_of_model", "base_model_revision"), Here("policy.revision")),
    **dict.fromkeys(("torch_dtype", "model_dtype"), Here("policy.dtype", "float32, bfloat16 or float16; no `auto`")),
    "attn_implementation": Here("policy.attention"),
    "attn_impl": Here("policy.attention"),
    "flash_attn": Here("policy.attention", "transformers' name, such as flash_attention_2 or sdpa"),
    "flash_attention": Here("policy.attention=flash_attention_2"),
    "sdp_attention": Here("policy.attention=sdpa"),
    **dict.fromkeys(
        ("load_in_4bit", "use_qlora"), Here("policy.quantization=4bit", "for true; leave it out for false")
    ),
    "quantization_bit": Here("policy.quantization=4bit", "4 is the only width"),
    "quant_bits": Here("policy.quantization=4bit", "4 is the only width"),
    "load_in_8bit": Here("", _NO_QUANT),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage", "bnb_4bit_compute_dtype"),
        Here("", "4-bit weights are NF4, read in the training precision (`policy.quantization=4bit`)"),
    ),
    "tokenizer_name_or_path": Here("", "the tokenizer is the model's own, from `policy.model`"),
    "model_init_kwargs": Here("", "what can be set of the model is in `policy`: dtype, attention, revision"),
    "model_type": Here("", "the architecture is read from the model's config.json"),
    "use_hf": Here("", "a name that is no local folder is looked up on the Hugging Face hub"),
    "tokenizer_type": Here("", "the tokenizer is the model's own, from `policy.model`"),
    "template": Here("policy.chat_template", "the model's own by default; else a Jinja file"),
    "chat_template_path": Here("policy.chat_template"),
    "custom_chat_template": Here("policy.chat_template"),
    "trust_code": Here("policy.trust_remote_code"),
    **dict.fromkeys(("quantization_method", "quant_method"), Here("policy.quantization=4bit", "by bitsandbytes")),
    **dict.fromkeys(
        ("pad_token", "eos_token", "special_tokens", "tokens", "resize_vocab", "add_tokens"),
        Here("", "special tokens are the tokenizer's own; data.append_eos says whether a completion ends with one"),
    ),
    **dict.fromkeys(
        ("use_cache", "rope_scaling", "shift_attn", "upcast_layernorm", "ignore_bias_buffers", "base_model_config"),
        Here("", "the model runs as its own config.json says"),
    ),
    "xformers_attention": Here("policy.attention", "transformers' name, such as sdpa"),
    # adapters
    **dict.fromkeys(("lora_r", "lora_rank", "r", "rank", "adapter_rank"), Here("policy.adapter.rank")),
    **dict.fromkeys(("lora_alpha", "adapter_alpha", "alpha"), Here("policy.adapter.alpha")),
    **dict.fromkeys(("lora_dropout", "dropout"), Here("policy.adapter.dropout", "the model's own: train.dropout")),
    **dict.fromkeys(
        ("lora_target_modules", "target_modules", "lora_target", "lora_target_parameters"),
        Here("policy.adapter.targets", "a list of layer names, or all-linear (elsewhere `all`)"),
    ),
    "lora_target_linear": Here("policy.adapter.targets=all-linear", "the default"),
    "use_rslora": Here("policy.adapter=rslora"),
    "use_dora": Here("policy.adapter=dora"),
    "peft_use_rslora": Here("policy.adapter=rslora"),
    "peft_use_dora": Here("policy.adapter=dora"),
    "pissa_init": Here("policy.adapter=pissa"),
    "init_lora_weights": Here("policy.adapter.name", "pissa, olora, eva and loftq are adapters of their own"),
    "use_peft": Here("policy.adapter=lora", "LoRA is the default; without an adapter: policy.adapter=full"),
    **dict.fromkeys(
        ("finetuning_type", "train_type", "tuner_type", "sft_type", "peft_type"),
        Here("policy.adapter", "lora, dora, ... or full"),
    ),
    "adapter": Here("policy.adapter", "lora, dora, ... or full; qlora is lora with policy.quantization=4bit"),
    "full_finetuning": Here("policy.adapter=full"),
    "adalora_init_r": Here("policy.adapter.initial_rank"),
    "adalora_target_r": Here("policy.adapter.rank"),
    **dict.fromkeys(
        ("adapter_name_or_path", "lora_model_dir", "adapters", "adapter_path", "peft_model_id"),
        Here("policy.start_adapter", "it goes on training and is the reference"),
    ),
    "create_new_adapter": Here(
        "",
        "`policy.start_adapter` goes on with the same adapter; for a new one, export the old --to transformers first",
    ),
    **dict.fromkeys(
        ("modules_to_save", "lora_modules_to_save", "additional_target", "lora_bias", "bias", "lora_task_type")
        + ("task_type", "lora_fan_in_fan_out", "lora_ga_config", "layers_pattern", "fan_in_fan_out")
        + ("inference_mode", "loftq_config", "target_parameters"),
        Here("", _ADAPTER),
    ),
    **dict.fromkeys(
        ("layers_to_transform", "lora_layers_to_transform", "peft_layers_to_transform"), Here("policy.adapter.layers")
    ),
    "exclude_modules": Here("policy.adapter.exclude"),
    "rank_pattern": Here("policy.adapter.rank_pattern"),
    "alpha_pattern": Here("policy.adapter.alpha_pattern"),
    **dict.fromkeys(("loraplus_lr_ratio", "lorap_lr_ratio"), Here("train.groups", "`{lora_B: 16x}`")),
    **dict.fromkeys(
        ("embedding_lr", "embedding_lr_scale", "loraplus_lr_embedding"),
        Here("train.groups", "`{embeddings: 5e-5}`, or `{embeddings: 0.1x}`"),
    ),
    **dict.fromkeys(
        ("freeze_trainable_layers", "freeze_vision_tower", "freeze_vit", "freeze_llm", "unfrozen_parameters"),
        Here("policy.adapter.targets", "the layers that an adapter acts on; without one every weight trains"),
    ),
    "base_model_name_or_path": Here("policy.model"),
    "ref_model_adapters": Here("", "the reference is the policy as it starts: `policy.start_adapter`"),
    "ref_model": Here("", "the reference is the policy as it starts: see `policy.start_adapter` and `policy.adapter`"),
    "ref_model_name_or_path": Here("", "the reference is the policy as it starts; train from that model instead"),
    "reference_model": Here("", "the reference is the policy as it starts; train from that model instead"),
    "ref_adapters": Here("", "the reference is the policy as it starts: `policy.start_adapter`"),
    "reference_free": Here("score={name: likelihood}", "or likelihood_mean (SimPO)"),
    **dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_reference_log_probs"), Here("reference.cache", "on by default")
    ),
    "precompute_ref_batch_size": Here("train.tokens_per_batch", _MEMORY),
    "sync_ref_model": Here("reference={name: moving}", "with adapters too"),
    "ref_model_sync_steps": Here("reference.every", "where `reference.name` is `moving`"),
    "ref_model_mixup_alpha": Here("reference.mixture", "where `reference.name` is `moving`"),
    # data
    **dict.fromkeys(
        (
            "dataset_name",
            "dataset",
            "datasets",
            "dataset_path",
            "train_file",
            "train_dataset",
            "data_path",
            "train_data",
        ),
        Here("data.sources", "file, folder or hub name; a list of {path, split, weight} for several"),
    ),
    **dict.fromkeys(
        ("eval_dataset", "val_dataset", "test_datasets", "eval_file", "validation_file"), Here("data.eval_sources")
    ),
    **dict.fromkeys(("dataset_train_split", "train_split"), Here("data.sources.0.split")),
    **dict.fromkeys(("dataset_test_split", "eval_split", "test_split"), Here("data.eval_sources.0.split")),
    **dict.fromkeys(
        ("val_size", "val_set_size", "split_dataset_ratio", "test_size", "eval_ratio"),
        Here("data.eval_fraction", "a share of the prompts, from 0 to 1"),
    ),
    **dict.fromkeys(("max_samples", "max_train_samples", "num_samples"), Here("data.limit", "rows of each source")),
    "interleave_probs": Here("data.sources.0.weight", "one for each source"),
    **dict.fromkeys(
        ("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "model_max_length", "truncation_max_length"),
        Here("data.max_length"),
    ),
    "max_completion_length": Here("data.max_length", "of prompt and completion together; online: rollout.max_tokens"),
    **dict.fromkeys(
        ("truncation_mode", "truncation_strategy", "excess_length_strategy"),
        Here("data.overlong", "truncate (the completion's end), drop_completion or drop_list"),
    ),
    **dict.fromkeys(
        ("dataset_num_proc", "preprocessing_num_workers", "dataset_processes", "num_proc"), Here("data.workers")
    ),
    **dict.fromkeys(
        ("dataset_config", "dataset_dir", "dataset_streaming", "streaming", "overwrite_cache", "dataset_prepared_path")
        + ("load_from_cache_file", "tokenized_path", "dataset_kwargs"),
        Here("", "data.sources takes files, folders and hub names, read whole; token ids are cached by content"),
    ),
    **dict.fromkeys(
        ("columns", "field_messages", "field_chosen", "field_rejected", "dataset_text_field", "column_mapping"),
        Here("", _ROWS),
    ),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt", "assistant_only_loss", "completion_only_loss", "roles_to_train"),
        Here("", "only completions are learnt, never a prompt"),
    ),
    "shuffle_dataset": Here("train.seed", "lists are always shuffled, by this seed"),
    "dataset_shuffle": Here("train.seed", "lists are always shuffled, by this seed"),
    **dict.fromkeys(("mask_history", "loss_scale", "train_on_eos"), Here("", "only completions are learnt, whole")),
    "system": Here("", "a system text is a message of the row, or its `system` column"),
    "split": Here("data.sources.split"),
    "mix_strategy": Here("data.sources.0.weight", "how often a source's rows are seen"),
    # objective
    "beta": Here("score.beta"),
    **dict.fromkeys(("pref_beta", "dpo_beta", "rl_beta", "simpo_beta", "kto_beta"), Here("score.beta")),
    **dict.fromkeys(("orpo_alpha", "orpo_beta"), Here("objective.weight", "of odds_ratio in recipes/orpo.yaml")),
    **dict.fromkeys(
        ("loss_type", "pref_loss", "dpo_loss_type", "loss_types"), Here("objective", "TRL's names are translated")
    ),
    **dict.fromkeys(("rl", "rlhf_type", "trainer_type", "stage"), Here("objective", "and `task`")),
    "loss_weights": Here("objective.weight", "one for each objective"),
    **dict.fromkeys(
        ("pref_ftx", "rpo_alpha", "sft_weight", "cpo_alpha", "nll_weight"),
        Here("objective.weight", "of an `sft` term: `objective=[{name: logistic}, {name: sft, weight: 0.1}]`"),
    ),
    **dict.fromkeys(("simpo_gamma", "gamma", "gamma_beta_ratio"), Here("objective.margin", f"as {_MARGIN}")),
    **dict.fromkeys(
        ("dpo_label_smoothing", "cdpo_label_smoothing", "label_smoothing_factor"), Here("objective.label_smoothing")
    ),
    "label_smoothing": Here("objective.label_smoothing", "of logistic, robust or exo"),
    "ld_alpha": Here("score.alpha", "with `score.name=length_desensitised`"),
    "f_divergence_type": Here("score.divergence.name", "reverse_kl, forward_kl, js or alpha"),
    "f_alpha_divergence_coef": Here("score.divergence.alpha"),
    "discopop_tau": Here("objective.temperature", "of `objective=discopop`"),
    **dict.fromkeys(("use_weighting", "dpo_use_weighting"), Here("wpo=clamped")),
    **dict.fromkeys(("dpop_lambda", "dpop_coef"), Here("dpop")),
    **dict.fromkeys(
        ("kto_chosen_weight", "kto_desirable_weight", "desirable_weight"),
        Here("objective.desirable_weight", "of `objective=kto`"),
    ),
    **dict.fromkeys(
        ("kto_rejected_weight", "kto_undesirable_weight", "undesirable_weight"),
        Here("objective.undesirable_weight", "of `objective=kto`"),
    ),
    "center_rewards_coefficient": Here("objective.center", "of bradley_terry, with `task=reward`"),
    "num_generations": Here("rollout.completions"),
    **{
        name: Here(f"rollout.{name}", "of the table at the end: `sampling`")
        for name in ("temperature", "top_p", "top_k")
    },
    "min_p": Here("rollout.min_p"),
    "max_tokens": Here("rollout.max_tokens", "the table at the end has sampling.max_tokens"),
    **dict.fromkeys(("fast_inference", "vllm_mode"), Here("rollout.engine=vllm")),
    "gpu_memory_utilization": Here("rollout.engine.options", "{gpu_memory_utilization: ...}"),
    "max_new_tokens": Here("rollout.max_tokens", "the table at the end has sampling.max_tokens"),
    "use_vllm": Here("rollout.engine=vllm"),
    "vllm_server_base_url": Here("rollout.engine.urls", "with `rollout.engine.name=vllm-server`"),
    "vllm_gpu_memory_utilization": Here("rollout.engine.options", "{gpu_memory_utilization: ...}"),
    "reward_model": Here("rollout.reward"),
    "reward_model_path": Here("rollout.reward"),
    "reward_funcs": Here("rollout.reward"),
    # optimisation
    **dict.fromkeys(("lr", "peak_lr", "base_lr", "max_lr", "step_size"), Here("train.learning_rate")),
    **dict.fromkeys(("max_steps", "num_steps", "total_steps", "train_steps", "num_train_steps"), Here("train.steps")),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs", "max_epochs"), Here("train.epochs")),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "train_batch_size", "batch_size", "global_batch_size")
        + ("gradient_accumulation_steps", "per_gpu_train_batch_size", "micro_train_batch_size", "grad_accum"),
        Here("train.lists_per_step", _STEP),
    ),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size", "eval_accumulation_steps"),
        Here("train.tokens_per_batch", _MEMORY),
    ),
    "auto_find_batch_size": Here("train.tokens_per_batch=auto", _MEMORY),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"), Here("train.schedule")),
    "lr_scheduler_kwargs": Here("train.schedule", "as keys of `{name: ..., min_lr_rate: 0.1}`"),
    "cosine_min_lr_ratio": Here("train.schedule", "`{name: cosine_with_min_lr, min_lr_rate: ...}`"),
    **dict.fromkeys(
        ("warmup_steps", "lr_warmup_steps", "num_warmup_steps"),
        Here("train.warmup_ratio", "the share of all steps: warmup steps / steps"),
    ),
    "warmup_fraction": Here("train.warmup_ratio"),
    "optim": Here("train.optimizer"),
    "optim_args": Here("train.optimizer", "as keys of `{name: ..., rank: 64}`"),
    "optim_target_modules": Here("", "an optimizer acts on all that trains, which `policy.adapter.targets` says"),
    **dict.fromkeys(
        ("use_galore", "use_badam", "use_apollo"),
        Here("train.optimizer", "such as `galore`, on `policy.adapter: full`"),
    ),
    "average_tokens_across_devices": Here("", _ALWAYS),
    "adam_epsilon": Here("train.optimizer", "`{name: adamw_torch, eps: 1e-8}`, which is the default"),
    **dict.fromkeys(("max_grad_norm_clip", "gradient_clipping", "grad_clip", "clip_grad"), Here("train.max_grad_norm")),
    **dict.fromkeys(("bf16", "pure_bf16", "bf16_full_eval", "bfloat16"), Here("train.precision=bfloat16")),
    **dict.fromkeys(("fp16", "fp16_full_eval", "float16"), Here("train.precision=float16")),
    "tf32": Here("", "set by torch: torch.set_float32_matmul_precision"),
    "mixed_precision": Here("train.precision"),
    **dict.fromkeys(("use_gradient_checkpointing", "activation_checkpointing"), Here("train.gradient_checkpointing")),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        Here("", "train.gradient_checkpointing has no options"),
    ),
    "activation_offloading": Here("train.activation_offload", "on GPUs"),
    "disable_dropout": Here("train.dropout", "the other way round, and off by default"),
    "disable_gradient_checkpointing": Here("train.gradient_checkpointing=false"),
    **dict.fromkeys(("seed", "random_state", "data_seed", "manual_seed", "random_seed"), Here("train.seed")),
    "full_determinism": Here("train.seed", "everything random follows from it"),
    **dict.fromkeys(
        ("padding_free", "sample_packing", "group_by_length", "packing_strategy", "eval_packing", "neat_packing")
        + ("eval_sample_packing",),
        Here("train.packing", _SHARED),
    ),
    "pad_to_sequence_len": Here("train.packing", _SHARED),
    "pad_to_multiple_of": Here("train.packing", _SHARED),
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel", "enable_liger_kernel", "use_unsloth", "unsloth", "torch_compile")
        + ("liger_kernel_config", "torch_compile_backend", "torch_compile_mode", "use_logits_to_keep", "plugins"),
        Here("", "our own kernels run wherever they can; `align doctor` says which"),
    ),
    "neftune_noise_alpha": Here("", "embeddings are trained on without noise"),
    # course of the run
    **dict.fromkeys(("output_dir", "out_dir", "save_dir"), Here("output")),
    "logging_dir": Here("", _FILES),
    "run_name": Here("output", "a run is named after its folder"),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "do_eval", "evals_per_epoch"),
        Here("train.eval_steps", "held-out lists are also measured before and after training"),
    ),
    "eval_on_start": Here("", _ALWAYS),
    **dict.fromkeys(
        ("save_strategy", "saves_per_epoch", "save_interval"), Here("train.save_steps", "it counts in steps")
    ),
    **dict.fromkeys(("save_total_limit", "max_checkpoints"), Here("train.keep_checkpoints")),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        Here("train.keep_best", "loss, pair_accuracy, ndcg, kendall_tau or top1_agreement"),
    ),
    **dict.fromkeys(
        ("early_stopping_patience", "early_stopping_steps"), Here("train.early_stopping", "counted in evaluations")
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "overwrite_output_dir", "auto_resume_from_checkpoints"),
        Here("", "the same command on the same `output` goes on; another run needs another `output`"),
    ),
    "compute_accuracy": Here("", "held-out pair accuracy is always measured"),
    **dict.fromkeys(
        ("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "label_names", "skip_memory_metrics"),
        Here("", "what is measured is fixed; every figure is in summary.json"),
    ),
    **dict.fromkeys(
        ("log_level_replica", "log_on_each_node", "disable_tqdm", "debug"), Here("", "see train.logging_steps")
    ),
    "logging_nan_inf_filter": Here("", "nothing is filtered from the metrics"),
    "eval_delay": Here("train.eval_steps"),
    "strict": Here("", "an unknown key is always refused"),
    "log_level": Here("", "a run prints one line a step at most; see train.logging_steps"),
    "logging_strategy": Here("train.logging_steps"),
    **dict.fromkeys(
        ("logging_first_step", "plot_loss", "include_num_input_tokens_seen", "save_safetensors", "save_only_model")
        + ("save_on_each_node", "add_version", "model_author", "resume_only_model", "ignore_data_skip"),
        Here("", _FILES),
    ),
    **dict.fromkeys(("use_wandb", "wandb_mode", "wandb_log_model"), Here("train.report_to", "[wandb]")),
    **dict.fromkeys(("wandb_project", "trackio_project"), Here("train.project")),
    **dict.fromkeys(("wandb_name", "wandb_run_id"), Here("output", "a run is named after its folder")),
    **dict.fromkeys(
        ("wandb_entity", "wandb_watch", "trackio_space_id"), Here("", "by the tracker's environment variables")
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_token",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        Here("", _HUB),
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_drop_last", "dataloader_pin_memory", "remove_unused_columns")
        + ("dataloader_persistent_workers", "dataloader_prefetch_factor", "torch_empty_cache_steps"),
        Here("", _LOADING),
    ),
    **dict.fromkeys(("do_train", "do_predict"), Here("", "`align train` trains; `align evaluate rows` measures")),
    **dict.fromkeys(
        ("num_gpus", "num_processes", "ddp_timeout", "ddp_backend", "local_rank", "accelerator_config")
        + ("ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
        Here("", _LAUNCH),
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config"),
        Here("", "`accelerate launch --config_file FILE -m align.cli train RECIPE` shards it: docs/distributed.md"),
    ),
    **dict.fromkeys(
        ("sequence_parallel_size", "context_parallel_size", "tensor_parallel_size"),
        Here("", f"neither sequences nor layers are split over devices; {_LAUNCH}"),
    ),
    # what a configuration also holds, and `align import` answers
    "callbacks": Here("train.callbacks", "`[file.py:Class]`"),
    **dict.fromkeys(
        ("loss_watchdog_threshold", "loss_watchdog_patience"),
        Here("train.on_bad_step", "a loss that is no number stops the run; none is too large"),
    ),
    **dict.fromkeys(
        ("cache_dir", "use_fast_tokenizer", "tokenizer_config", "tokenizer_legacy", "tokenizer_use_fast")
        + ("added_tokens_overrides", "eot_tokens", "is_llama_derived_model", "is_mistral_derived_model")
        + ("is_qwen_derived_model", "hf_use_auth_token", "padding_side", "padding_value", "label_pad_token_id")
        + ("is_encoder_decoder", "model_code_revision", "num_labels", "use_exact_model_name", "low_cpu_mem_usage")
        + ("experimental_skip_move_to_device", "max_memory", "ref_model_type", "ref_model_revision")
        + ("ref_model_init_kwargs", "ref_model_quantization_bit", "force_use_ref_model", "model_author"),
        Here("", "model and tokenizer are loaded as their own files say, from `policy.model`"),
    ),
    **dict.fromkeys(
        ("double_quantization", "quantization_type", "bnb_4bit_use_double_quant", "use_bnb_double_quant")
        + ("load_in_16bit", "use_onebitllms"),
        Here("", "4-bit weights are NF4, read in the training precision (`policy.quantization=4bit`)"),
    ),
    **dict.fromkeys(
        ("pissa_iter", "lora_dtype", "target_regex", "relora", "peft")
        + ("model_adapter_name", "ref_adapter_name", "adapter_random_state", "max_lora_rank", "ensure_weight_tying"),
        Here("", _ADAPTER),
    ),
    **dict.fromkeys(
        ("freeze_multi_modal_projector", "freeze_aligner", "finetune_language_layers", "image_max_pixels")
        + ("image_min_pixels", "video_max_pixels", "video_min_pixels", "video_maxlen", "max_pixels", "media_dir")
        + ("vit_gradient_checkpointing", "freeze_trainable_modules"),
        Here("", "rows are text alone; a vision model's language part is what trains"),
    ),
    **dict.fromkeys(
        ("freeze_parameters", "freeze_parameters_ratio", "trainable_parameters"),
        Here("policy.adapter.targets", "the layers that an adapter acts on; without one every weight trains"),
    ),
    **dict.fromkeys(
        ("default_system", "default_system_message", "auto_insert_empty_system_msg"),
        Here("", "a system text is a message of the row, or its `system` column"),
    ),
    **dict.fromkeys(
        ("tool_format", "agent_template", "response_prefix", "template_backend", "use_chat_template", "tools")
        + ("chat_template", "chat_template_jinja"),
        Here("policy.chat_template", "the model's own by default; else a Jinja file"),
    ),
    "enable_thinking": Here("data.template_options", "{enable_thinking: false}"),
    **dict.fromkeys(
        ("disable_shuffling", "train_dataloader_shuffle", "shuffle_merged_datasets", "val_dataset_shuffle")
        + ("train_sampling_strategy",),
        Here("train.seed", "lists are always shuffled, by this seed"),
    ),
    **dict.fromkeys(
        ("preprocessing_batch_size", "dataset_keep_in_memory", "push_dataset_to_hub", "lazy_tokenize")
        + ("custom_dataset_info", "length_column_name", "cached_dataset", "cached_val_dataset"),
        Here("", "data.sources takes files, folders and hub names, read whole; token ids are cached by content"),
    ),
    "dataset_exact_deduplication": Here("data.stop_on", "rows that are there twice are counted by the audit"),
    **dict.fromkeys(("dataset_mixer", "dataset_mixture", "dataset_splits", "dataset_configs"), Here("data.sources")),
    "interleave_prob": Here("data.sources.0.weight", "one for each source"),
    **dict.fromkeys(("eval_sequence_len", "max_prompt_len"), Here("data.max_prompt_length", "of the prompt at most")),
    "packing_length": Here("train.packing", _SHARED),
    "pref_bco_weight": Here(
        "objective.weight", "of a `bco` term: `objective=[{name: logistic}, {name: bco, weight: 0.1}]`"
    ),
    **dict.fromkeys(
        ("router_aux_loss_coef", "moe_aux_loss_coef"),
        Here("", "a recipe has no term for the balance of a mixture's experts here; the trainers of align.trl have it"),
    ),
    **dict.fromkeys(
        ("use_adam_mini", "use_muon", "optimizer", "galore_rank"), Here("train.optimizer", "of those that train here")
    ),
    "cosine_constant_lr_ratio": Here(
        "train.schedule", "`{name: cosine_with_min_lr, min_lr_rate: ...}` does not fall to 0"
    ),
    "process_reward_model": Here("", "`task: reward` judges whole completions"),
    **dict.fromkeys(
        ("print_param_status", "include_effective_tokens_per_second", "include_tkps", "include_tokens_per_second")
        + ("profiler_steps", "save_first_step", "create_checkpoint_symlink", "safe_serialization", "sanity_check")
        + ("ignore_args_error", "benchmarks", "env", "enable_jit_checkpoint", "eval_do_concat_batches")
        + ("eval_use_gather_object", "restore_callback_states_from_checkpoint", "dataloader_in_order")
        + ("dataloader_multiprocessing_context",),
        Here("", _FILES),
    ),
    "generate_during_eval": Here("sampling.prompts", "completions are written before and after training"),
    "hub_model_revision": Here("", _HUB),
    **dict.fromkeys(
        ("use_swanlab", "use_mlflow", "use_comet", "use_tensorboard"), Here("train.report_to", "[the tracker's name]")
    ),
    **dict.fromkeys(
        ("swanlab_api_key", "swanlab_mode", "swanlab_workspace", "swanlab_lark_webhook_url", "swanlab_lark_secret")
        + ("swanlab_web_host", "swanlab_api_host", "swanlab_token", "swanlab_log_model", "swanlab_log_completions")
        + ("swanlab_completion_log_interval", "swanlab_completion_max_buffer", "swanlab_description")
        + ("mlflow_tracking_uri", "trackio_bucket_id", "trackio_static_space_id"),
        Here("", "by the tracker's environment variables"),
    ),
    **dict.fromkeys(("swanlab_project", "mlflow_experiment_name"), Here("train.project")),
    **dict.fromkeys(
        ("swanlab_run_name", "swanlab_experiment_name", "swanlab_exp_name", "mlflow_run_name"),
        Here("output", "a run is named after its folder"),
    ),
    **dict.fromkeys(
        ("cut_cross_entropy", "use_kernels", "use_scattermoe", "use_sonicmoe", "dpo_use_liger_kernel", "use_liger_loss")
        + (
            "liger_fused_linear_cross_entropy",
            "liger_glu_activation",
            "liger_layer_norm",
            "liger_rms_norm",
            "liger_rope",
        )
        + ("lora_embedding_kernel", "lora_mlp_kernel", "lora_o_kernel", "lora_qkv_kernel", "flash_attn_cross_entropy")
        + ("tuner_backend", "unsloth_tiled_mlp"),
        Here("", "our own kernels run wherever they can; `align doctor` says which"),
    ),
    **dict.fromkeys(
        ("flex_attention", "eager_attention"), Here("policy.attention", "transformers' name, such as sdpa")
    ),
    "dpo_padding_free": Here("train.packing", _SHARED),
    "gradient_checkpointing_use_reentrant": Here("", "train.gradient_checkpointing has no options"),
    **dict.fromkeys(
        (
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "parallelism_config",
            "ddp",
            "dp_replicate_size",
            "dp_shard_size",
            "fsdp_version",
            "sequence_parallel_degree",
        ),
        Here("", _LAUNCH),
    ),
    "trl": Here("", "its keys are for online training: `rollout` and `online`"),
    "model_max_seq_length": Here("data.max_length", "the trainer's own max_length counts"),
    **dict.fromkeys(("use_cpu", "no_cuda", "device", "device_map"), Here("", "a GPU is used where there is one")),
    "num_threads": Here("train.threads"),
    **dict.fromkeys(("config", "config_file", "recipe"), Here("", "the recipe's path stands by itself")),
    "reference.model": Here(
        "", "the reference is the policy as it starts: see `policy.start_adapter` and `policy.adapter`"
    ),
}
"""Another tool's key -> ours."""

VALUES: Mapping[str, Mapping[str, str]] = {
    "train.precision": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "False": "float32"},
    "policy.dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": "float32"},
    "policy.quantization": {"True": "4bit", "4": "4bit", "nf4": "4bit", "bnb": "4bit", "int4": "4bit"},
    "policy.adapter.name": {"qlora": "lora", "none": "full", "freeze": "full", "all": "full", "bone": "miss"},
    "task": {"dpo": "preference", "rlhf": "preference", "rm": "reward", "reward_model": "reward"},
    "data.overlong": {"keep_start": "truncate", "keep_end": "truncate", "drop": "drop_list", "delete": "drop_list"},
    "policy.adapter.targets": {"all": "all-linear"},
    "objective.name": {
        "dpo": "logistic",
        "cdpo": "logistic",
        "lipo": "lambda",
        "slic": "hinge",
        "rrhf": "partial_order",
    }
    | {"listnet": "softmax", "listmle": "list_mle", "bt": "bradley_terry", "lambda_rank": "lambda"},
}
"""Our key -> what another tool calls a value of it -> our value."""

TELLTALES: Mapping[str, frozenset[str]] = {
    "TRL": frozenset(
        {
            *("model_name_or_path", "dataset_name", "dataset_train_split", "loss_type", "use_peft"),
            *("lora_target_modules", "beta", "ld_alpha", "precompute_ref_log_probs", "per_device_train_batch_size"),
            *("attn_implementation", "lora_r", "output_dir", "max_length"),
        }
    ),
    "LLaMA-Factory": frozenset(
        {
            *("stage", "do_train", "finetuning_type", "template", "cutoff_len", "dataset_dir", "pref_beta"),
            *("pref_loss", "pref_ftx", "lora_target", "plot_loss", "overwrite_cache", "preprocessing_num_workers"),
            *("quantization_bit", "val_size", "flash_attn", "max_samples", "model_name_or_path", "dataset"),
            *("lora_rank",),
        }
    ),
    "axolotl": frozenset(
        {
            *("base_model", "sequence_len", "micro_batch_size", "val_set_size", "rl", "datasets", "adapter"),
            *("sample_packing", "num_epochs", "lora_target_linear", "pad_to_sequence_len", "dataset_prepared_path"),
            *("evals_per_epoch", "saves_per_epoch", "lora_r", "chat_template", "train_on_inputs", "dpo_beta"),
            *("optimizer", "lr_scheduler", "output_dir"),
        }
    ),
    "ms-swift": frozenset(
        {
            *("rlhf_type", "train_type", "tuner_type", "torch_dtype", "split_dataset_ratio", "model", "dataset"),
            *("target_modules", "lora_rank", "template", "rpo_alpha", "attn_impl", "swift_version", "quant_bits"),
            *("load_from_cache_file", "val_dataset", "system"),
        }
    ),
    "Unsloth": frozenset(
        {
            *("model_name", "max_seq_length", "load_in_4bit", "r", "use_gradient_checkpointing", "random_state"),
            *("lora_alpha", "full_finetuning", "use_rslora", "loftq_config"),
        }
    ),
}
"""Keys at the top of a tool's own recipe."""


def foreign_recipe(tree: Mapping[str, Any], keys: frozenset[str]) -> str | None:
    """What to say of another tool's recipe; None of what has too few of a tool's keys.

    Args:
        tree: a file's contents that has none of our sections.
        keys: the dotted keys of a recipe.
    """
    foreign = {key for key in map(str, tree) if key not in keys or not isinstance(tree[key], dict)}
    counts = {tool: len(foreign & telltales) for tool, telltales in TELLTALES.items()}
    tool = max(counts, key=lambda tool: counts[tool])
    if counts[tool] < 3:
        return None
    said = [f"`{name}` is `{ours}`" for name in map(str, tree) if (ours := _key(name, keys))]
    return f"this is a recipe of {tool}, not of Align; let `align init` write one, and carry its settings over" + (
        ": " + ", ".join(said) if said else ""
    )


def _key(name: str, keys: frozenset[str]) -> str:
    """Our key for another tool's, or for the end of one of ours; empty if there is none."""
    if name in NAMES:
        return NAMES[name].write
    return next(iter(_ends(name, keys)), "")


def _ends(name: str, keys: frozenset[str]) -> list[str]:
    """The dotted keys that a name is, or is the end of: the shortest first."""
    ends = [key for key in keys if key == name or key.endswith(f".{name.split('.')[-1]}")]
    return sorted(ends, key=lambda key: (key != name, key.count("."), key))


def counterpart(name: str, value: object = None) -> str:
    """What to say of another tool's key; empty for a name that no tool has.

    Args:
        name: with or without its section.
        value: what it was set to, where that decides the answer.
    """
    here = NAMES.get(name) or NAMES.get(name.split(".")[-1])
    if here is None:
        return ""
    name = name.split(".")[-1]
    if here.write == "objective" and isinstance(value, str):
        return _objective(value, here)
    if not here.write:
        return f"`{name}` has no counterpart: {here.note}"
    return f"`{name}` is `{here.write}` here" + (f" ({here.note})" if here.note else "")


def _objective(value: str, here: Here) -> str:
    """A loss by its name elsewhere."""
    if value in ("sft", "rm", "reward"):
        return f"write `task: {'sft' if value == 'sft' else 'reward'}`"
    if value in REFUSED:
        return REFUSED[value]
    name = VALUES["objective.name"].get(value)
    ours = f"{{objective: {{name: {name}}}}}" if name else TRL_NAMES.get(value)
    return f"`{value}` is {ours} here" if ours else f"it is `objective` here ({here.note})"


def override(flag: str, value: str | None, keys: frozenset[str]) -> str | None:
    """The override that an option of another tool's command line stands for, such as `--learning_rate 5e-6`.

    Args:
        flag: with its dashes.
        value: what follows it, if anything.
        keys: the dotted keys of a recipe.

    Returns:
        What to write, with a note where the value translates; None if nothing is like it.
    """
    path = flag.lstrip("-").replace("-", "_")
    last = path.split(".")[-1]
    given = "VALUE" if value is None else value
    exact = _ends(path, keys)
    if exact and (exact[0] == path or last not in NAMES):
        return f"`{exact[0]}={given}`"
    if last not in NAMES:
        return None
    here = NAMES[last]
    if here.write == "objective" or not here.write:
        return counterpart(last, value)
    if "=" in here.write:
        return f"`{here.write}`" + (f" ({here.note})" if here.note else "")
    if here.note:
        return f"`{here.write}=...` ({here.note})"
    return f"`{here.write}={given}`"
