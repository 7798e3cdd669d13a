"""Whatever reads a run finds the policy that was trained, with every kind of adapter."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.errors import UserError
from align.evaluate.rows import evaluate_rows, load_run
from align.export.export import export
from align.model.adapters import Full
from align.model.config import PolicySection
from align.model.forward import TokenScorer, score_tokens
from align.model.policy import load_policy
from align.packing.batch import collate
from align.rollout.sample import load_trained
from align.training.train import train

ADAPTERS = {
    "lora": {"rank": 4, "alpha": 8},
    "lora, ranks": {"name": "lora", "rank": 4, "ranks": "sensitivity"},
    "rslora": {"rank": 4},
    "dora": {"rank": 4},
    "pissa": {"rank": 4},
    "olora": {"rank": 4},
    "eva": {"rank": 4, "rho": 2.0},
    "adalora": {"rank": 2, "initial_rank": 4},
    "lora_sb": {"rank": 4},
    "sorsa": {"rank": 4},
    "svfit": {"rank": 4},
    "nlora": {"rank": 4},
    "lora_ldu": {"rank": 4},
    "s2ft": {"heads": 1, "channels": 4},
    "lofit": {"share": 0.5},
    "miss": {"rank": 4},
    "ia3": {},
    "full": {},
}


LONG = ("lora, ranks", "lora_sb", "sorsa", "svfit", "nlora", "lora_ldu", "s2ft", "lofit")
"""What is exported, and what goes on, as one that is tried by default."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in ADAPTERS])
def test_every_reader_of_a_run_has_the_policy_that_was_trained(name, make_recipe, ragged, tmp_path, rows_file):
    adapter = {"name": name} | ADAPTERS[name]
    base = make_recipe().policy.model
    recipe = make_recipe(policy={"adapter": adapter}, train={"steps": 3, "epochs": 1}, sampling={"prompts": 0})
    run = train(recipe).path
    batch = collate(ragged, pad_id=0)
    if name == "full":
        trained = AutoModelForCausalLM.from_pretrained(run / "adapter")
    else:
        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    expected = score_tokens(trained.eval(), batch).logprobs.detach()
    start = score_tokens(AutoModelForCausalLM.from_pretrained(base), batch).logprobs.detach()
    assert (expected - start).abs().max() > 1e-3, "it has moved"

    measured, _ = load_run(run, None, "cpu")
    with torch.no_grad():
        assert_close(TokenScorer(measured).eval()(batch).logprobs, expected, atol=2e-5, rtol=0)
        with measured.reference():
            assert_close(TokenScorer(measured)(batch).logprobs, start, atol=2e-5, rtol=0)
        rolled = load_trained(recipe, run)
        assert_close(TokenScorer(rolled).eval()(batch).logprobs, expected, atol=2e-5, rtol=0)
    evaluate_rows(str(rows_file), model=str(run), json_path=str(tmp_path / "rows.json"))
    figures = json.loads((tmp_path / "rows.json").read_text())["metrics"]
    assert "pair_accuracy" in figures

    if name == "lofit":  # this model's layers have no biases
        with pytest.raises(UserError, match="no place for it .*no bias.*--to peft"):
            export(run, tmp_path / "merged", merge=True)
    else:
        merged = export(run, tmp_path / "merged", merge=True, dtype="float32")
        again = load_policy(PolicySection(model=str(merged), adapter=Full()), keep_reference=False)
        with torch.no_grad():
            assert_close(TokenScorer(again).eval()(batch).logprobs, expected, atol=2e-5, rtol=0)

    further = make_recipe(
        "further",
        policy={"adapter": adapter, "start_run": str(run)},
        train={"steps": 3, "learning_rate": 1e-9},
        sampling={"prompts": 0},
    )
    again, _ = load_run(train(further).path, None, "cpu")
    with torch.no_grad():
        assert_close(TokenScorer(again).eval()(batch).logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_a_start_adapter_with_weights_of_the_base_is_refused_and_can_be_merged(options, tmp_path, save_llama, ragged):
    folder = save_llama(tmp_path / "base", attention_bias=True, tie_word_embeddings=False)
    base = AutoModelForCausalLM.from_pretrained(folder)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **options)).eval()
    with torch.no_grad():
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"policy.start_adapter: .* has `{next(iter(options))}: .*merge it"):
        load_policy(PolicySection(model=str(folder), start_adapter=str(tmp_path / "adapter")))
    ids = torch.tensor([ragged[0]["prompt_ids"] + ragged[0]["completion_ids"][0]])
    merged = export(tmp_path / "adapter", tmp_path / "merged", merge=True)
    assert_close(AutoModelForCausalLM.from_pretrained(merged)(ids).logits, wrapped(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_peft_reads_only_in_part_is_refused(tiny_policy, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    load_policy(PolicySection(model=str(tiny_policy), start_adapter=str(tmp_path)))
    original = PeftModel.load_adapter

    def in_part(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        with torch.no_grad():
            next(p for n, p in self.named_parameters() if "lora_B" in n).zero_()
        return result

    monkeypatch.setattr(PeftModel, "load_adapter", in_part)
    with pytest.raises(UserError, match="PEFT does not read .*lora_B"):
        load_policy(PolicySection(model=str(tiny_policy), start_adapter=str(tmp_path)))
