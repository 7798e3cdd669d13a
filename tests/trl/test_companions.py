"""RewardTrainer and KTOTrainer beside TRL's, and the names that patch puts into an installed TRL."""

import subprocess
import sys

import pytest
from peft import LoraConfig
from same_script import assert_same_lines, log_histories, pairs
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from align.errors import UserError

EVALUATED = {"eval_strategy": "steps", "eval_steps": 7, "per_device_eval_batch_size": 3}


PAIRS_FOR_OURS = {"train_dataset": pairs(9), "packages": ("align.trl",)}


def lora(**more) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **more)


def lora_with_head() -> LoraConfig:
    return lora(modules_to_save=["score"], task_type="SEQ_CLS")


def same(name, tiny_policy, tmp_path, options, **given):
    theirs, ours = log_histories(name, tmp_path, str(tiny_policy), options, train_dataset=pairs(22), **given)
    assert_same_lines(theirs, ours)


@pytest.mark.parametrize("adapter", [None, lora_with_head])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_rewards_steps_are_trls(tiny_policy, tmp_path, adapter, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "center_rewards_coefficient": 0.01, "learning_rate": 1e-3}
    more = {"peft_config": adapter} if adapter else {}
    same("Reward", tiny_policy, tmp_path, options | EVALUATED, eval_dataset=pairs(7, seed=1), **more)


def test_a_reward_is_read_where_transformers_reads_it(tiny_policy, tmp_path):
    """With a padding token that ends every text too, before that token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.pad_token = tokenizer.eos_token
    same("Reward", tiny_policy, tmp_path, {"max_length": 14}, processing_class=tokenizer)


@pytest.mark.parametrize("adapter", [None, lora])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_ktos_steps_are_trls(tiny_policy, tmp_path, adapter, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-3, "beta": 0.3}
    options |= {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    more = {"peft_config": adapter} if adapter else {}
    same("KTO", tiny_policy, tmp_path, options | EVALUATED, eval_dataset=pairs(7, seed=1), **more)


@pytest.mark.parametrize(("adapter", "loss"), [(None, "kto"), (lora, "kto"), (lora, "apo_zero_unpaired")])
def test_ktos_reference_computed_beforehand_is_trls(tiny_policy, tmp_path, adapter, loss):
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 5, "loss_type": loss}
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_length": 14}
    more = {"peft_config": adapter} if adapter else {}
    same("KTO", tiny_policy, tmp_path, options | EVALUATED, eval_dataset=pairs(7, seed=1), **more)


def test_ktos_other_loss_is_trls(tiny_policy, tmp_path):
    same("KTO", tiny_policy, tmp_path, {"loss_type": "apo_zero_unpaired", "learning_rate": 1e-3}, peft_config=lora)


def test_patch_replaces_names_and_nothing_else():
    script = (
        "import align.trl; found = align.trl.patch(); import trl; from trl import DPOTrainer, KTOConfig, SFTTrainer;"
        "assert DPOTrainer is align.trl.DPOTrainer and KTOConfig is align.trl.KTOConfig;"
        "from trl.experimental.cpo import CPOTrainer; from trl.experimental.orpo import ORPOConfig;"
        "assert CPOTrainer is align.trl.CPOTrainer and ORPOConfig is align.trl.ORPOConfig;"
        "assert SFTTrainer.__module__.startswith('trl.') and 'trl.trainer.RewardTrainer' in found"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward"])
def test_rows_with_images_are_refused_with_the_remedy(tiny_policy, tmp_path, name):
    rows = pairs(3).add_column("images", [["a.png"]] * 3)
    given = {"train_dataset": rows, "packages": ("align.trl",)}
    with pytest.raises(UserError, match=rf"rows with images are not supported; use trl\.{name}Trainer"):
        next(log_histories(name, tmp_path, str(tiny_policy), {}, **given))


@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward"])
def test_rows_that_are_all_too_long_are_refused(tiny_policy, tmp_path, name):
    with pytest.raises(UserError, match="train_dataset: no row is left: all are too long for max_length=2"):
        next(log_histories(name, tmp_path, str(tiny_policy), {"max_length": 2}, **PAIRS_FOR_OURS))


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_a_model_with_an_encoder_is_refused(tmp_path, tiny_policy, name):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
    given = PAIRS_FOR_OURS | {"processing_class": AutoTokenizer.from_pretrained(tiny_policy)}
    with pytest.raises(UserError, match=f"{name}Trainer: T5ForConditionalGeneration: encoder-decoder"):
        next(log_histories(name, tmp_path, model, {}, **given))
