"""Models of 4-bit weights beside TRL's trainer."""

import pytest
import torch
from peft import LoraConfig
from same_script import pairs, trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from align.errors import UserError

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture
def load(save_llama, tmp_path):
    folder = save_llama(tmp_path / "wide", hidden_size=64, intermediate_size=128, initializer_range=0.1)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, dtype="float32")


def test_steps_of_a_four_bit_model_are_trls(load, tmp_path):
    """The adapter is bfloat16, as TRL makes it, and so are its steps; evaluation in between changes nothing of ours."""
    logs = {}
    for package in ("trl", "align.trl"):
        options = {"max_steps": 4, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
        evaluated = {"eval_strategy": "steps", "eval_steps": 2} if package == "align.trl" else {}
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        given = {"train_dataset": pairs(22), "eval_dataset": pairs(4), "peft_config": adapter}
        one = trainer(package, "DPO", tmp_path, load(), options | evaluated, **given)
        one.train()
        logs[package] = [line for line in one.state.log_history if "loss" in line]
    for theirs, ours in zip(*logs.values(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)


def test_weights_packed_for_inference_are_refused(load, tmp_path):
    model = load()
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu = True
    with pytest.raises(UserError, match="packed for inference"):
        trainer("align.trl", "DPO", tmp_path, model, {}, train_dataset=pairs(4), peft_config=LoraConfig())
