"""What other trainers call our keys: each name leads to a key that a recipe has, wherever it is written."""

import re

import pytest
import yaml

from align.cli import main
from align.errors import UserError
from align.recipe import load_recipe, parse_recipe, recipe_keys
from align.recipe.other_tools import NAMES, TELLTALES, VALUES

KEYS = recipe_keys()
SMALL = {
    "output": "runs/x",
    "policy": {"model": "m"},
    "data": {"sources": ["rows.jsonl"]},
    "objective": {"name": "lambda"},
    "rollout": {"reward": {"name": "length", "max": 9}},
}
WANTED = {
    "policy.model": "model_name_or_path base_model model_name",
    "policy.dtype": "torch_dtype",
    "policy.revision": "model_revision",
    "policy.attention": "attn_implementation attn_impl flash_attn",
    "policy.attention=flash_attention_2": "flash_attention",
    "policy.quantization=4bit": "load_in_4bit quantization_bit quant_bits",
    "policy.chat_template": "template chat_template_path",
    "policy.adapter.rank": "lora_r lora_rank r",
    "policy.adapter.alpha": "lora_alpha",
    "policy.adapter.dropout": "lora_dropout",
    "policy.adapter.targets": "lora_target_modules target_modules lora_target",
    "policy.adapter.targets=all-linear": "lora_target_linear",
    "policy.adapter=rslora": "use_rslora",
    "policy.adapter=dora": "use_dora",
    "policy.adapter": "finetuning_type train_type tuner_type adapter",
    "policy.start_adapter": "adapter_name_or_path lora_model_dir adapters",
    "data.sources": "dataset_name dataset datasets",
    "data.eval_sources": "eval_dataset val_dataset test_datasets",
    "data.eval_fraction": "val_size val_set_size split_dataset_ratio",
    "data.limit": "max_samples",
    "data.max_length": "cutoff_len max_seq_length sequence_len",
    "data.overlong": "truncation_mode",
    "data.workers": "dataset_num_proc preprocessing_num_workers",
    "score.beta": "beta pref_beta dpo_beta",
    "objective": "loss_type pref_loss rl rlhf_type stage",
    "objective.weight": "loss_weights pref_ftx rpo_alpha",
    "objective.margin": "simpo_gamma",
    "objective.label_smoothing": "label_smoothing",
    "objective.desirable_weight": "kto_chosen_weight",
    "score.alpha": "ld_alpha",
    "score.divergence.name": "f_divergence_type",
    "reference.cache": "precompute_ref_log_probs",
    "train.learning_rate": "lr",
    "train.steps": "max_steps",
    "train.epochs": "num_train_epochs num_epochs",
    "train.lists_per_step": "per_device_train_batch_size gradient_accumulation_steps micro_batch_size batch_size",
    "train.tokens_per_batch": "per_device_eval_batch_size",
    "train.tokens_per_batch=auto": "auto_find_batch_size",
    "train.schedule": "lr_scheduler_type lr_scheduler",
    "train.warmup_ratio": "warmup_steps",
    "train.optimizer": "optim",
    "train.precision=bfloat16": "bf16",
    "train.precision=float16": "fp16",
    "train.gradient_checkpointing": "use_gradient_checkpointing",
    "train.dropout": "disable_dropout",
    "train.seed": "random_state data_seed",
    "train.packing": "padding_free sample_packing group_by_length",
    "train.eval_steps": "eval_strategy evals_per_epoch",
    "train.save_steps": "save_strategy saves_per_epoch",
    "train.keep_checkpoints": "save_total_limit",
    "train.keep_best": "load_best_model_at_end metric_for_best_model",
    "output": "output_dir",
    "rollout.completions": "num_generations",
    "rollout.max_tokens": "max_new_tokens",
}
"""Our key -> other tools' names of it, as their documentation has them."""
PAIRS = [(name, key) for key, names in WANTED.items() for name in names.split()]


COMMON = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
    label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
    liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy
    logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start include_for_metrics batch_eval_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip full_determinism seed data_seed use_cpu
    accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor remove_unused_columns label_names
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics
    do_train do_eval do_predict resume_from_checkpoint local_rank model_init_kwargs trust_remote_code
    router_aux_loss_coef disable_dropout dataset_num_proc max_length max_prompt_length max_completion_length
    truncation_mode padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type
    loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau
    activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token chat_template_path
    eos_token center_rewards_coefficient dataset_text_field dataset_kwargs shuffle_dataset packing packing_strategy
    eval_packing completion_only_loss assistant_only_loss model_name_or_path model_revision dtype
    attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters
    lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type
    use_bnb_nested_quant bnb_4bit_quant_storage dataset_name dataset_config dataset_train_split dataset_test_split
    dataset_streaming ignore_bias_buffers task_type peft_type base_model_name_or_path revision inference_mode r
    target_modules exclude_modules fan_in_fan_out bias modules_to_save init_lora_weights layers_to_transform
    layers_pattern rank_pattern alpha_pattern loftq_config target_parameters desirable_weight undesirable_weight
    stage finetuning_type lora_rank lora_target pref_beta pref_loss pref_ftx simpo_gamma dpo_label_smoothing
    kto_chosen_weight kto_rejected_weight template cutoff_len max_samples overwrite_cache preprocessing_num_workers
    plot_loss overwrite_output_dir val_size dataset dataset_dir eval_dataset quantization_bit quantization_method
    flash_attn adapter_name_or_path create_new_adapter ref_model ref_model_adapters reward_model enable_liger_kernel
    use_unsloth rope_scaling shift_attn additional_target loraplus_lr_ratio pissa_init use_galore use_badam
    freeze_trainable_layers freeze_vision_tower mix_strategy interleave_probs train_on_prompt mask_history streaming
    neat_packing pure_bf16 upcast_layernorm compute_accuracy resize_vocab disable_gradient_checkpointing base_model
    base_model_config model_type tokenizer_type adapter lora_model_dir sequence_len sample_packing
    pad_to_sequence_len eval_sample_packing micro_batch_size eval_batch_size num_epochs lr_scheduler optimizer
    evals_per_epoch saves_per_epoch val_set_size datasets test_datasets dataset_prepared_path rl rl_beta dpo_beta
    dpo_use_weighting cpo_alpha rpo_alpha orpo_alpha kto_desirable_weight kto_undesirable_weight lora_target_linear
    lora_fan_in_fan_out peft_use_dora peft_use_rslora wandb_project wandb_entity wandb_name wandb_watch
    wandb_log_model flash_attention xformers_attention sdp_attention group_by_length train_on_inputs strict
    special_tokens tokens early_stopping_patience chat_template gradient_clipping save_safetensors
    auto_resume_from_checkpoints unfrozen_parameters liger_kernel plugins bfloat16 float16 rlhf_type model
    train_type tuner_type torch_dtype split_dataset_ratio val_dataset attn_impl quant_bits quant_method
    num_generations use_vllm vllm_mode system dataset_shuffle truncation_strategy loss_scale use_logits_to_keep
    add_version model_author use_hf ddp_backend adapters resume_only_model freeze_llm freeze_vit model_name
    max_seq_length full_finetuning random_state use_gradient_checkpointing fast_inference gpu_memory_utilization
    epochs batch_size lr grad_accum
"""
"""Arguments of TRL's DPO, KTO and reward trainers, PEFT's LoraConfig, LLaMA-Factory, axolotl, ms-swift and Unsloth."""


def said(tree: dict) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(SMALL | tree, origin="r")
    return str(caught.value)


def test_there_are_enough():
    assert len(PAIRS) >= 70 and len(NAMES) > 200


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_a_name_leads_to_its_key_wherever_it_stands(name, key):
    value = {"rl": "grpo", "stage": "ppo"}.get(name, 3)
    for place, tree in ((name, {name: value}), (f"train.{name}", {"train": {name: value}})):
        message = said(tree)
        assert message.startswith(f"r: unknown key `{place}`; ") and f" `{key}` here" in message, message
    assert f" `{key}` here" in said({"data": {"sources": ["rows.jsonl"], name: value}})


@pytest.mark.parametrize("name", [name for name in COMMON.split() if name not in {key.split(".")[0] for key in KEYS}])
def test_a_common_name_is_answered(name):
    """By the table, or by a key of ours that is called the same."""
    message = said({name: 1})
    same = re.search(r"did you mean `([\w.]+)`", message)
    assert " here" in message or "has no counterpart: " in message or (same and same[1].endswith(f".{name}")), message


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_to_a_key_that_a_recipe_has_or_says_what_holds(name, tmp_path):
    here = NAMES[name]
    assert here.write or here.note
    assert here.write or not {f"{part}.{name}" for part in ("train", "policy", "policy.adapter")} & set(KEYS)
    key, fixed, value = here.write.partition("=")
    if key:
        assert re.sub(r"\.\d", "", key) in KEYS
    if fixed:
        check_value(key, value, tmp_path)
    for note in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)[`=]", here.note):
        assert note in KEYS, note


@pytest.mark.parametrize(("key", "elsewhere"), [(key, word) for key, words in VALUES.items() for word in words])
def test_every_value_is_one_that_its_key_takes(key, elsewhere, tmp_path):
    ours = VALUES[key][elsewhere]
    check_value(key, ours, tmp_path)
    try:
        load(key, elsewhere, tmp_path)
    except UserError as error:
        assert f"did you mean `{ours}`?" in str(error)


def load(key: str, value: str, folder) -> None:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL | ({"online": {}} if key.startswith("online") else {})))
    load_recipe(path, [f"{key}={value}"])


def check_value(key: str, value: str, folder) -> None:
    """The key takes the value; the recipe may still need another to go with it."""
    try:
        load(key, value, folder)
    except UserError as error:
        assert not re.search("unknown key|input should|there is no|is missing", str(error)), error


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ipo", "`ipo` is {objective: {name: squared}, score: {name: log_ratio_mean}} here"),
        ("simpo", "`simpo` is {objective: {name: logistic, margin: 0.5}, score: {name: likelihood_mean, beta: 2.0}}"),
        ("dpo", "`dpo` is {objective: {name: logistic}} here"),
        ("aot", "it sorts across the batch"),
        ("sft", "write `task: sft`"),
        ("rm", "write `task: reward`"),
    ],
)
def test_a_loss_by_its_name_elsewhere(value, message):
    assert message in said({"loss_type": value})


def test_the_nearest_value_is_one_of_the_key_at_hand():
    assert "did you mean `cosine`?" in said({"train": {"schedule": "cosin"}})
    assert "did you mean `bfloat16`?" in said({"train": {"precision": "bf16"}})
    assert "did you mean" not in said({"train": {"precision": "linear"}})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "5e-6"], "`--learning_rate 5e-6`: .* `train.learning_rate=5e-6`"),
        (["--learning_rate=5e-6"], "`--learning_rate=5e-6`: .* `train.learning_rate=5e-6`"),
        (["--learning-rate", "5e-6"], "`train.learning_rate=5e-6`"),
        (["--train.lr", "1e-3"], "`train.learning_rate=1e-3`"),
        (["-lr", "1e-3"], "`train.learning_rate=1e-3`"),
        (["--policy.model", "m"], "`policy.model=m`"),
        (["--lora_r", "8"], "`policy.adapter.rank=8`"),
        (["--bf16", "train.steps=3"], "`--bf16`: .* `train.precision=bfloat16`"),
        (["--warmup_steps", "10"], r"`train.warmup_ratio=...` \(the share of all steps"),
        (["--push_to_hub"], "align export RUN OUTPUT --push"),
        (["--nothing.like.it", "1"], "such as `train.learning_rate=1e-4`"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_an_option_is_answered_with_its_override(words, message, first, capsys, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(SystemExit) as end:
        main(["train", *words, str(path)] if first else ["train", str(path), *words])
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)


FOREIGN = {
    "TRL": "model_name_or_path: m\ndataset_name: d\nlearning_rate: 5.0e-7\nloss_type: [sigmoid]\noutput_dir: o\n"
    "per_device_train_batch_size: 8\nuse_peft: true\nlora_r: 16\n",
    "LLaMA-Factory": "model_name_or_path: m\nstage: dpo\ndo_train: true\nfinetuning_type: lora\nlora_target: all\n"
    "pref_beta: 0.1\ndataset: d\ntemplate: qwen3\ncutoff_len: 2048\noutput_dir: o\n",
    "axolotl": "base_model: m\nrl: dpo\ndatasets:\n  - path: d\n    split: train\nadapter: qlora\nlora_r: 32\n"
    "sequence_len: 2048\nmicro_batch_size: 2\nnum_epochs: 1\noutput_dir: o\n",
    "ms-swift": '{"rlhf_type": "dpo", "model": "m", "train_type": "lora", "dataset": ["d"], "lora_rank": 8,'
    ' "torch_dtype": "bfloat16", "target_modules": ["all-linear"], "output_dir": "o"}',
    "Unsloth": "model_name: m\nmax_seq_length: 2048\nload_in_4bit: true\nr: 16\nrandom_state: 3407\n"
    "use_gradient_checkpointing: unsloth\n",
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_a_recipe_of_another_tool_is_recognised_in_one_line(tool, tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(FOREIGN[tool])
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["train.steps=3"])
    message = str(caught.value)
    assert message.startswith(f"{path}: this is a recipe of {tool}, not of Align; ") and "\n" not in message
    for name in yaml.safe_load(FOREIGN[tool]):
        if name in NAMES and NAMES[name].write:
            assert f"`{name}` is `{NAMES[name].write}`" in message
    assert set(FOREIGN) == set(TELLTALES)


def test_a_recipe_of_ours_with_some_of_their_names_stays_ours():
    theirs = {"num_epochs": 1, "micro_batch_size": 2, "lora_r": 8, "rl": "dpo", "sequence_len": 9}
    assert "unknown key `num_epochs`" in said(theirs) and "axolotl" not in said(theirs)
