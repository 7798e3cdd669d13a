"""Decodings without vLLM: which rows they change, what they need of a prompt, and what is refused."""

import json
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from align.errors import UserError
from align.model.load import load_tokenizer
from align.rollout.config import TransferQ
from align.rollout.engines import _check_baseline, check_engine
from align.rollout.inside_vllm import open_decoding
from align.rollout.inside_vllm.request import CONFIG, Request
from align.rollout.inside_vllm.transfer_q import Guided
from align.rollout.prompts import read_prompts
from align.rollout.sample import Sampler


def request(output, **extra):
    return Request(SimpleNamespace(extra_args=extra or None), [1], output)


def contrast(**options):
    return open_decoding({CONFIG: {"section": {"name": "contrast", **options}}})


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


@pytest.mark.parametrize("other", [None, request([3, 4], pair="a", against=True), request([4], pair="a", against=True)])
def test_a_side_that_is_missing_ahead_or_another_is_no_contrast(other):
    requests = [request([3], pair="a", against=False), other or request([])]
    with pytest.raises(RuntimeError, match="out of step"):
        contrast().alter(torch.zeros(2, 5), requests)


class Words:
    """Rewards by texts: the mean number in the words, by a factor."""

    def __init__(self, factor):
        self.factor, self.seen = factor, []

    def score(self, prompts, completions):
        self.seen += zip(prompts, completions, strict=True)
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [self.factor * sum(int(word[1:]) for word in text.split()) / 50 for text in texts]


def goes_on(texts, ends):
    """The baseline: the next two numbers."""
    assert len(set(texts)) == len(texts) and not any(ids[-1] in ends for ids in texts)
    return {ids: [3 + (ids[-1] + 1) % 60, 3 + (ids[-1] + 2) % 60] for ids in texts}


@pytest.mark.parametrize("indirect", [False, True])
def test_transfer_q_weighs_the_likeliest_tokens_by_what_follows(untied, indirect):
    config = TransferQ(reward={"name": "length", "min": 1}, candidates=4, strength=0.7, baseline="b")
    other = Words(-0.3) if indirect else None
    decoding = Guided(config, load_tokenizer(str(untied)), goes_on, Words(1.0), other)
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    logits[0, 2] = 5.0  # the end token is a candidate of the first row
    logits[2] = logits[0]  # two completions of one prompt, so far the same
    extra = {"stop_token_ids": [2], "stop": [], "extra_args": {"prompt": "w9"}}
    rows = [Request(SimpleNamespace(**extra), [9], [7]), request([]), Request(SimpleNamespace(**extra), [9], [7])]
    altered = decoding.alter(logits, rows)
    assert torch.equal(altered[1], logits[1]) and torch.equal(altered[0], altered[2])
    expected = torch.full((64,), -torch.inf)
    for token in logits[0].topk(4).indices.tolist():
        ids = [7] if token == 2 else [7, token, 3 + (token + 1) % 60, 3 + (token + 2) % 60]
        reward = sum(ids) / 50
        if indirect:
            reward *= math.exp((reward + 0.3 * reward) / 2)
        expected[token] = logits[0, token] + 0.7 * reward
    assert torch.allclose(altered[0], expected, atol=1e-5)
    assert {prompt for prompt, _ in decoding.reward.seen} == {"w9"}
    assert decoding.alter(logits, [request([])] * 3) is logits


def test_transfer_q_gives_scorers_a_conversation_as_they_know_it(untied):
    config = TransferQ(reward={"name": "length", "min": 1}, candidates=1, baseline="b")
    decoding = Guided(config, load_tokenizer(str(untied)), goes_on, Words(1.0))
    chat = [{"role": "user", "content": "w9"}]
    params = SimpleNamespace(stop_token_ids=[2], stop=[], extra_args={"prompt": chat})
    logits = torch.zeros(1, 64)
    logits[0, 20] = 1.0
    decoding.alter(logits, [Request(params, [9], [])])
    assert decoding.reward.seen == [(chat, [{"role": "assistant", "content": " w20 w24 w25"}])]


def test_transfer_q_reads_prompts_as_scorers_do(online_recipe):
    recipe = online_recipe(
        rollout={
            "engine": "vllm",
            "decoding": {"name": "transfer_q", "reward": {"name": "length", "min": 1}, "baseline": "b"},
        }
    )
    prompts = read_prompts(recipe)
    assert prompts.contexts == [row.prompt for row in prompts.rows]


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
        (
            {"decoding": {"name": "transfer_q", "reward": {"name": "length", "min": 1}}},
            "baseline: missing; name the folder of an aligned model",
        ),
        (
            {"decoding": {"name": "transfer_q", "reward": {"name": "answer"}}},
            "answer needs a reference answer or a whole list",
        ),
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


def test_a_base_policy_is_held_against_an_adapter(online_recipe, untied, trained, tmp_path):
    trained(untied, tmp_path / "other", 1)
    recipe = decoding_recipe(online_recipe, against=str(tmp_path / "other"))
    weights = Sampler(recipe, tmp_path)._write_weights(None, 0)
    own, other = (load_file(f"{folder}/adapter_model.safetensors") for folder in (weights.folder, weights.against))
    assert not any(tensor.any() for tensor in own.values())
    there = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert other.keys() == there.keys() and all(torch.equal(other[name], there[name]) for name in there)


def test_a_baseline_of_another_vocabulary_is_refused(online_recipe, untied, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(untied, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["another"] = content["model"]["vocab"].pop("w40")
    (other / "tokenizer.json").write_text(json.dumps(content))
    decoding = {"name": "transfer_q", "reward": {"name": "length", "min": 1}}
    for baseline, fits in ((untied, True), (other, False)):
        recipe = online_recipe(rollout={"engine": "vllm", "decoding": decoding | {"baseline": str(baseline)}})
        with nullcontext() if fits else pytest.raises(UserError, match="has another vocabulary than"):
            _check_baseline(recipe)


@pytest.mark.parametrize(
    ("against", "policy", "sentence"),
    [
        ("base", {}, "the policy starts as the base model; give it policy.start_run"),
        ("nowhere", {}, "there is no folder nowhere; name an adapter's, `base` or `prompt`"),
        ("MODEL", {}, "is no adapter that vLLM can serve, since it is a whole model"),
        ("MODEL", {"adapter": {"name": "dora", "rank": 4}}, "cannot serve the policy as an adapter, since its kind is"),
    ],
)
def test_weights_that_cannot_be_held_against_each_other(online_recipe, untied, monkeypatch, against, policy, sentence):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if vLLM were installed
    against = str(untied) if against == "MODEL" else against
    rollout = {"engine": "vllm", "decoding": {"name": "contrast", "against": against}}
    with pytest.raises(UserError, match=sentence):
        check_engine(online_recipe(rollout=rollout, policy=policy))


def test_transfer_q_scores_what_a_stop_text_leaves(untied):
    decoding = Guided(
        TransferQ(reward={"name": "length", "min": 1}, candidates=1, baseline="b"),
        load_tokenizer(str(untied)),
        goes_on,
        Words(1.0),
    )
    params = SimpleNamespace(stop_token_ids=[2], stop=["w24"], extra_args={"prompt": "w9"})
    decoding.alter(torch.eye(64)[20:21], [Request(params, [9], [7])])
    assert decoding.reward.seen == [("w9", " w7 w20 ")]


@pytest.mark.parametrize("key", ["rollout.reward", "sampling.reward", "rollout.decoding.reward"])
def test_a_reward_model_that_is_not_there_is_named_before_anything_is_sampled(online_recipe, untied, monkeypatch, key):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if vLLM were installed
    missing = {"name": "sequence_classifier", "model": "no/where"}
    sections = {
        "rollout.reward": {"rollout": {"reward": missing}},
        "sampling.reward": {"sampling": {"reward": missing}},
        "rollout.decoding.reward": {
            "rollout": {
                "engine": "vllm",
                "decoding": {"name": "transfer_q", "reward": missing, "baseline": str(untied)},
            }
        },
    }[key]
    with pytest.raises(UserError, match=f"{key}: no/where: cannot be loaded"):
        check_engine(online_recipe(**sections))


def test_a_run_directory_is_its_adapter(online_recipe, untied, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    trained(untied, tmp_path / "run" / "adapter", 1)
    (tmp_path / "run" / "recipe.yaml").write_text("")
    check_engine(decoding_recipe(online_recipe, against=str(tmp_path / "run")))


def test_a_baseline_that_is_not_there(online_recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    decoding = {"name": "transfer_q", "reward": {"name": "length", "min": 1}, "baseline": "no/where"}
    with pytest.raises(UserError, match="rollout.decoding.baseline: there is no folder no/where"):
        check_engine(online_recipe(rollout={"engine": "vllm", "decoding": decoding}))
