"""Checkpoints that see: their language part trains on text, and all of them is exported."""

import json
import logging

import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from small_configs import SMALL
from torch.testing import assert_close

from align.export.export import export
from align.model.adapters import Full, Lora
from align.model.checkpoint import export_tokenizer
from align.model.config import PolicySection
from align.model.forward import TokenScorer
from align.model.policy import load_policy

EYE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
EYE |= {"image_size": 8, "patch_size": 4}
MODELS = {
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=t.LlamaConfig(**SMALL, attention_dropout=0.1),
            vision_config=t.CLIPVisionConfig(**EYE, projection_dim=16),
            image_token_index=39,
        )
    ),
    "qwen2 vl": lambda: t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(
            text_config=SMALL
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
            image_token_id=37,
            video_token_id=38,
            vision_start_token_id=36,
            vision_end_token_id=35,
        )
    ),
    "gemma3": lambda: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config=t.Gemma3TextConfig(**SMALL, head_dim=8),
            vision_config=t.SiglipVisionConfig(**EYE),
            mm_tokens_per_image=4,
            image_token_index=39,
            boi_token_index=37,
            eoi_token_index=38,
        )
    ),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path, save_tokenizer):
    torch.manual_seed(5)
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", eos_token="</s>")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    tokens = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps(tokens | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return tmp_path / "model"


def sees(name):
    return "vis" in name or "projector" in name


def step(policy, lists):
    batch = policy.collate(lists)
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (-TokenScorer(policy).train()(batch).logprobs.sum()).backward()
        optimizer.step()
    return TokenScorer(policy).eval()(batch).logprobs.detach()


def without_dtype(config):
    if not isinstance(config, dict):
        return config
    return {key: without_dtype(value) for key, value in config.items() if key != "dtype"}


def check_whole(base, exported):
    """Same class, same config, the same weights of what sees, and others of what reads."""
    old, new = (json.loads((f / "config.json").read_text()) for f in (base, exported))
    assert old["architectures"] == new["architectures"]
    assert without_dtype(old) == without_dtype(new)
    assert (exported / "preprocessor_config.json").exists()
    before, after = (load_file(f / "model.safetensors") for f in (base, exported))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(sees(name) for name in moved) and any(sees(name) for name in before)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")], ids=["all", "named"])
def test_adapters_act_in_the_language_part_and_a_merge_is_the_whole_model(folder, targets, ragged, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="align"):
        policy = load_policy(PolicySection(model=str(folder), adapter=Lora(rank=2, targets=targets)))
    assert any("reads more than text" in record.getMessage() for record in caplog.records)
    trainable = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trainable and not any(sees(name) for name in trainable)
    values = step(policy, ragged)
    policy.save_adapter(tmp_path / "adapter")
    export_tokenizer(policy.tokenizer, tmp_path / "adapter")
    merged = export(tmp_path / "adapter", tmp_path / "merged", merge=True)
    check_whole(folder, merged)
    again = load_policy(PolicySection(model=str(merged), adapter=Full()), keep_reference=False)
    assert_close(TokenScorer(again).eval()(again.collate(ragged)).logprobs.detach(), values, atol=2e-5, rtol=0)


def test_full_training_keeps_what_sees(folder, ragged, tmp_path):
    policy = load_policy(PolicySection(model=str(folder), adapter=Full()))
    step(policy, ragged)
    policy.save_adapter(tmp_path / "trained")
    export_tokenizer(policy.tokenizer, tmp_path / "trained", source=policy.folder)
    check_whole(folder, tmp_path / "trained")


def test_values_are_the_models_own(folder, ragged):
    policy = load_policy(PolicySection(model=str(folder), adapter=Lora(rank=2)))
    own = t.AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = policy.collate(ragged)
    expected = []
    for example in ragged:
        for ids in example["completion_ids"]:
            row, start = torch.tensor([[*example["prompt_ids"], *ids]]), len(example["prompt_ids"]) - 1
            logits = own(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, start:-1]
            expected.append(logits.log_softmax(-1)[range(len(ids)), ids])
    assert_close(
        TokenScorer(policy).eval()(batch).logprobs[batch.completion_mask], torch.cat(expected), atol=1e-5, rtol=0
    )
