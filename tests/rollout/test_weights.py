"""Folders that engines load: complete, named after their content, and refused where they would not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.export.served import adapter_rank, not_servable
from align.files import partial_folder
from align.model.adapters import AdaLora, Dora, Full, Ia3, Lora, Miss, Pissa, RsLora
from align.model.config import PolicySection
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.rollout.config import Transformers, Vllm
from align.rollout.engines import sync_kind
from align.rollout.weights import add_head, check_same_layout, shapes, write_weights

HEAD = "lm_head.weight"
IDS = torch.tensor([[1, 5, 9, 3, 7]])


def trained(base, folder, adapter=None):
    """An adapter whose weights are all random, saved as a run saves it."""
    policy = load_policy(
        PolicySection(model=str(base), adapter=adapter or Lora(rank=4, alpha=8)), LoadOptions(total_steps=10)
    )
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.save_adapter(folder)
    policy.tokenizer.save_pretrained(folder)
    return policy


def write(folder, output, kind, version=3):
    return write_weights(folder, output, kind=kind, version=version, dtype="float32")


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_merged_weights_are_the_policy_and_name_their_head(base, request, tmp_path):
    base = request.getfixturevalue(base)
    policy = trained(base, tmp_path / "adapter")
    weights = write(tmp_path / "adapter", tmp_path / "weights", "merged")
    assert shapes(tmp_path / "weights" / weights.name)[HEAD] == (64, 64)
    check_same_layout(tmp_path / "weights" / weights.name, base)
    merged = AutoModelForCausalLM.from_pretrained(weights.folder)
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=IDS).logits, policy.model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4
        )


def test_a_split_model_gets_its_head_into_the_index(tied, tmp_path):
    AutoModelForCausalLM.from_pretrained(tied).save_pretrained(tmp_path / "split", max_shard_size="40KB")
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 1 and HEAD not in shapes(tmp_path / "split")
    add_head(tmp_path / "split")
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(tmp_path / "split" / index[HEAD])
    assert torch.equal(tensors[HEAD], tensors["model.embed_tokens.weight"])


def test_adapter_weights_are_a_copy(untied, tmp_path):
    trained(untied, tmp_path / "adapter")
    weights = write(tmp_path / "adapter", tmp_path / "weights", "adapter")
    for a, b in zip(*(sorted(load_file(f"{path}/adapter_model.safetensors").items())
                      for path in (tmp_path / "adapter", weights.folder)), strict=True):  # fmt: skip
        assert a[0] == b[0] and torch.equal(a[1], b[1])


def test_names_follow_the_content_and_nothing_is_written_twice(untied, tmp_path):
    trained(untied, tmp_path / "one")
    trained(untied, tmp_path / "two")  # other random weights
    first = write(tmp_path / "one", tmp_path / "weights", "adapter")
    stamp = (tmp_path / "weights" / first.name / "adapter_model.safetensors").stat().st_mtime_ns
    assert write(tmp_path / "one", tmp_path / "weights", "adapter") == first
    assert (tmp_path / "weights" / first.name / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    others = [
        write(tmp_path / "two", tmp_path / "weights", "adapter"),
        write(tmp_path / "one", tmp_path / "w", "merged"),
    ]
    others.append(write(tmp_path / "one", tmp_path / "weights", "adapter", version=4))
    assert len({weights.name for weights in [first, *others]}) == 4


def test_what_a_kill_left_half_written_is_not_used(untied, tmp_path):
    trained(untied, tmp_path / "adapter")
    whole = write(tmp_path / "adapter", tmp_path / "weights", "merged")
    partial = partial_folder(tmp_path / "weights" / whole.name)
    (tmp_path / "weights" / whole.name).rename(partial)
    for name in ("model.safetensors", "stray.safetensors"):
        (partial / name).write_bytes(b"cut")
    again = write(tmp_path / "adapter", tmp_path / "weights", "merged")
    assert again == whole and not partial.exists()
    check_same_layout(tmp_path / "weights" / again.name, untied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(HEAD), "no lm_head.weight"),
        (lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"), "1 weights differ.*k_proj"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight"),
        (lambda tensors: tensors.update({"more": torch.zeros(3)}), "first more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_engine_sees_them(change, said, tied, tmp_path):
    trained(tied, tmp_path / "adapter")
    weights = write(tmp_path / "adapter", tmp_path / "weights", "merged")
    file = tmp_path / "weights" / weights.name / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=said):
        check_same_layout(file.parent, tied)


def test_the_rank_of_a_trained_adalora_is_what_it_has_kept(tmp_path):
    """PEFT stores which directions of a layer are kept where other kinds have a number."""
    pattern = {"q_proj": [True] * 5 + [False], "k_proj": [True, False, False, False, False, True]}
    config = {"peft_type": "ADALORA", "r": 4, "rank_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_rank(tmp_path) == 5
    assert not_servable(tmp_path) == "its type is ADALORA"


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (Lora(rank=4), ""),
        (RsLora(rank=4), ""),
        (Pissa(rank=4), ""),  # saved as a LoRA of twice the rank
        (Dora(rank=4), "it is a DoRA"),
        (Miss(rank=4), "its type is MISS"),
        (AdaLora(rank=2, initial_rank=3), "its type is ADALORA"),
        (Ia3(), "its type is IA3"),
        (Full(), "it is a whole model"),
    ],
)
def test_what_vllm_cannot_serve(adapter, why, untied, tmp_path, online_recipe):
    trained(untied, tmp_path / "adapter", adapter)
    assert not_servable(tmp_path / "adapter") == why
    recipe = online_recipe(policy={"adapter": adapter.model_dump()}, rollout={"engine": "vllm", "sync": "adapter"})
    assert sync_kind(recipe)[0] == ("merged" if why else "adapter")


def test_how_weights_travel(online_recipe, untied, tmp_path):
    def kind(**rollout):
        return sync_kind(online_recipe(rollout=rollout, policy={"adapter": {"name": "lora", "rank": 8}}))

    assert kind(engine=Vllm().model_dump()) == ("merged", 8)  # on a CPU
    assert kind(engine=Vllm().model_dump(), sync="adapter") == ("adapter", 8)
    assert kind(engine={"name": "vllm-server", "urls": ["http://x"]}) == ("adapter", 8)
    assert kind(engine=Transformers().model_dump(), sync="merged") == ("adapter", 8)
    pissa = {"adapter": {"name": "pissa", "rank": 8}}
    assert sync_kind(online_recipe(policy=pissa, rollout={"engine": "vllm", "sync": "adapter"})) == ("adapter", 16)
    wide = {"adapter": {"name": "lora", "rank": 600}}
    assert sync_kind(online_recipe(policy=wide, rollout={"engine": "vllm", "sync": "adapter"})) == ("merged", 600)
    trained(untied, tmp_path / "start", Dora(rank=4))
    start = {"start_adapter": str(tmp_path / "start"), "adapter": {"name": "lora"}}
    assert sync_kind(online_recipe(policy=start, rollout={"engine": "vllm", "sync": "adapter"})) == ("merged", 4)
