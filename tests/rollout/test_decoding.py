"""Decodings without vLLM: which rows they change, what they need of a prompt, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from align.errors import UserError
from align.rollout.decoding import CONFIG, Request, open_decoding
from align.rollout.prompts import read_prompts
from align.rollout.sample import Sampler


def request(output, **extra):
    return Request(SimpleNamespace(extra_args=extra or None), [1], output)


def contrast(**options):
    return open_decoding({CONFIG: {"name": "contrast", **options}})


def test_only_pairs_are_contrasted_and_both_sides_get_the_same():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    requests = [
        request([3], pair="a", against=True),
        request([4]),
        request([5, 6], pair="b", against=False),
        request([3], pair="a", against=False),
        request([5, 6], pair="b", against=True),
    ]
    before = logits.clone()
    altered = contrast(strength=0.5, plausible=0.2).alter(logits, requests)
    assert torch.equal(logits, before) and torch.equal(altered[1], logits[1])
    for own, against in ((3, 0), (2, 4)):
        z, other = logits[own].double(), logits[against].double()
        expected = torch.where(z.exp() >= 0.2 * z.exp().max(), 1.5 * z - 0.5 * other, -torch.inf)
        assert torch.allclose(altered[own].double(), expected, atol=1e-6) and torch.equal(
            altered[own], altered[against]
        )
    assert contrast().alter(logits, requests[1:2] * 5) is logits


@pytest.mark.parametrize("other", [None, request([3, 4], pair="a", against=True)])
def test_a_side_that_is_missing_or_ahead_is_no_contrast(other):
    requests = [request([3], pair="a", against=False), other or request([])]
    with pytest.raises(RuntimeError, match="out of step"):
        contrast().alter(torch.zeros(2, 5), requests)


def decoding_recipe(online_recipe, **decoding):
    return online_recipe(rollout={"engine": "vllm", "decoding": {"name": "contrast", **decoding}})


def test_the_worse_context_is_the_prompt_in_its_template(online_recipe):
    prompts = read_prompts(decoding_recipe(online_recipe, worse="w9 w8 {prompt} w7"))
    assert prompts.contexts == [[9, 8, *ids, 7] for ids in prompts.ids]  # this tokenizer adds no start token
    chosen = prompts.choose([2, 0])
    assert chosen.contexts == [prompts.contexts[2], prompts.contexts[0]]
    assert read_prompts(decoding_recipe(online_recipe, against="base")).contexts == prompts.ids
    assert read_prompts(online_recipe()).contexts is None


def test_a_prompt_that_the_template_makes_too_long_is_counted(online_recipe):
    plain = read_prompts(online_recipe())
    template = "{prompt} " + "w9 " * 21  # 24 tokens are left beside the completion
    prompts = read_prompts(decoding_recipe(online_recipe, worse=template))
    dropped = sum(len(ids) + 21 > 24 for ids in plain.ids)
    assert prompts.left_out["prompt that rollout.decoding makes longer than 24 tokens"] >= dropped > 0
    assert len(prompts.ids) == len(plain.ids) - dropped
    assert sum(prompts.left_out.values()) == sum(plain.left_out.values()) + dropped


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"engine": "transformers"}, "contrast needs `engine: vllm`, not transformers"),
        ({"decoding": {"name": "contrast", "worse": "no place"}}, r"needs `\{prompt\}` where the prompt goes"),
    ],
)
def test_a_decoding_that_cannot_be_is_refused(online_recipe, sections, sentence):
    tree = {"engine": "vllm", "decoding": {"name": "contrast"}} | sections
    with pytest.raises(UserError, match=sentence):
        online_recipe(rollout=tree)


def test_policy_and_base_go_to_the_engine_as_two_adapters(online_recipe, untied, trained, tmp_path):
    trained(untied, tmp_path / "own", 1)
    recipe = decoding_recipe(online_recipe, against="base")
    weights = Sampler(recipe, tmp_path)._write_weights(tmp_path / "own", 3)
    own, base = (load_file(f"{folder}/adapter_model.safetensors") for folder in (weights.folder, weights.against))
    assert weights.kind == "adapter" and weights.version == 3 and own.keys() == base.keys()
    assert all(own[name].any() and not base[name].any() for name in own)
    with pytest.raises(UserError, match="the policy is the base model itself"):
        Sampler(recipe, tmp_path)._write_weights(None, 0)


def test_a_base_policy_is_held_against_an_adapter(online_recipe, untied, trained, tmp_path):
    trained(untied, tmp_path / "other", 1)
    recipe = decoding_recipe(online_recipe, against=str(tmp_path / "other"))
    weights = Sampler(recipe, tmp_path)._write_weights(None, 0)
    own, other = (load_file(f"{folder}/adapter_model.safetensors") for folder in (weights.folder, weights.against))
    assert not any(tensor.any() for tensor in own.values())
    there = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert other.keys() == there.keys() and all(torch.equal(other[name], there[name]) for name in there)
