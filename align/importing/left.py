"""The keys of a file that no part of a recipe reads: dropped with a reason, or, if nobody knows them, refused."""

import difflib

from align.errors import UserError
from align.importing.plan import Plan
from align.recipe.other_tools import NAMES, Here

DIFFERS = frozenset(
    """
    load_in_8bit lora_modules_to_save modules_to_save additional_target bias lora_bias layers_to_transform
    peft_layers_to_transform rank_pattern alpha_pattern layers_pattern target_parameters lora_target_parameters
    loraplus_lr_ratio lorap_lr_ratio loraplus_lr_embedding embedding_lr embedding_lr_scale loftq_config relora
    freeze_parameters trainable_parameters freeze_parameters_ratio freeze_trainable_layers unfrozen_parameters
    neftune_noise_alpha router_aux_loss_coef moe_aux_loss_coef rope_scaling shift_attn resize_vocab add_tokens tokens
    special_tokens added_tokens_overrides eot_tokens tokenizer_name_or_path system default_system
    default_system_message lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio optim_args adam_epsilon
    optimizer use_galore use_badam use_apollo use_adam_mini use_muon train_on_inputs train_on_prompt mask_history
    loss_scale early_stopping_patience early_stopping_steps loss_watchdog_threshold shuffle_dataset dataset_shuffle
    train_dataloader_shuffle disable_shuffling max_prompt_len response_prefix reference_free columns
    dataset_exact_deduplication ref_adapters ref_model_adapters create_new_adapter use_onebitllms base_model_config
    target_regex train_sampling_strategy tool_format agent_template plugins
    """.split()  # noqa: SIM905, a table
)
"""Dropped keys that, where they are set, change what is learnt."""
REFUSED = {
    "reference_free": "the score would be `likelihood`; import it without the key, and set `score: {name: likelihood}`",
    "train_on_prompt": "only completions are learnt here, never a prompt; remove it if you can do without",
    "ref_adapters": "the reference here is the policy's start: give the same adapter to `adapters` alone",
    "ref_model_adapters": "the reference here is the policy's start: give it to `adapter_name_or_path` alone",
}
"""Keys that, where they are on, make another training than any recipe can say -> the remedy."""

OURS = {
    "packing": Here("train.packing", "a list runs as one row with its prompt computed once, nothing padded"),
    "trust_remote_code": Here("policy.trust_remote_code"),
    **{name: Here(f"train.{name}") for name in ("adam_beta1", "adam_beta2", "max_grad_norm", "gradient_checkpointing")},
    **{name: Here(f"train.{name}") for name in ("warmup_ratio", "eval_steps", "project")},
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), Here("policy.quantization")),
}
"""Keys that a recipe has by the same name, where no part of it was made of them."""


def drop_left(plan: Plan, keys: frozenset[str]) -> None:
    """Drop what is left with its reason.

    Args:
        keys: what the tool has.

    Raises:
        UserError: a key that it does not have, or that cannot be left out.
    """
    for name in plan.left():
        spelled = plan.spell(name)
        here = NAMES.get(spelled) or NAMES.get(name) or OURS.get(spelled)
        if here is None or spelled not in keys:
            near = difflib.get_close_matches(spelled, keys, n=1)
            remedy = f"did you mean `{near[0]}`?" if near else f"remove it, or say what {plan.tool} does with it"
            raise UserError(f"{plan.file}: `{spelled}` is no key of {plan.tool} that `align import` knows; {remedy}")
        if plan.on(name) and REFUSED.get(spelled):
            raise plan.mistake(name, f"cannot be imported: {REFUSED[spelled]}")
        if plan.values[name] is None or (spelled in OURS and not plan.on(name)):
            plan.drop(name, "not set" if plan.values[name] is None else "off, as here")
            continue
        why = here.note or f"set `{here.write}` yourself"
        why = f"{why} (`{here.write}`)" if here.note and here.write and here.write not in here.note else why
        plan.drop(name, why, differs=spelled in DIFFERS)
