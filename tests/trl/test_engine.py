"""Models whose parts another program has given a forward, as Unsloth does: kept, said, with the same losses."""

from types import MethodType

import pytest
from peft import LoraConfig
from same_script import assert_same_lines, pairs, trainer
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from align.model.fusing import has_foreign_forward

SAID = "run by another library's forward"


@pytest.fixture
def train(tiny_policy, tmp_path):
    """Trains a model, and gives it and the log."""

    def run(change=lambda model: None) -> tuple:
        model = AutoModelForCausalLM.from_pretrained(tiny_policy)
        change(model)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        options = {"max_steps": 4, "learning_rate": 1e-3}
        given = {"train_dataset": pairs(12), "peft_config": adapter}
        one = trainer("align.trl", "DPO", tmp_path, model, options, **given)
        one.train()
        return model, one.state.log_history

    return run


def test_forwards_of_others_stay_and_are_said(train, caplog, monkeypatch):
    _, expected = train()
    assert SAID not in caplog.text
    calls = []

    def fast(self, x):
        calls.append(x.shape)
        return type(self).forward(self, x)

    def patch_each(model):
        for layer in model.model.layers:
            layer.mlp.forward = MethodType(fast, layer.mlp)

    model, log = train(patch_each)
    assert has_foreign_forward(model.model.layers[0].mlp) and len(calls) > 8
    assert f"LlamaMLP {SAID}" in caplog.text
    assert_same_lines(expected, log)


def test_forwards_put_into_a_class_are_said(train, caplog, monkeypatch):
    _, expected = train()
    plain = LlamaAttention.forward

    def fast(self, *args, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", fast)
    assert_same_lines(expected, train()[1])
    assert f"LlamaAttention {SAID}" in caplog.text


def test_a_class_that_unsloth_wrote_is_said(train, caplog):
    def change(model):
        for layer in model.model.layers:
            written = {"__module__": "unsloth_compiled_cache.unsloth_compiled_module_llama", "forward": fast}
            layer.mlp.__class__ = type("UnslothMLP", (type(layer.mlp),), written)

    def fast(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    fast.__module__ = "unsloth_compiled_cache.unsloth_compiled_module_llama"
    train(change)
    assert f"UnslothMLP {SAID}" in caplog.text
