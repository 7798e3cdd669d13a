"""Models over packed rows against the same models over padded ones."""

import logging

import pytest
import small_configs
import torch
import transformers as t
from small_configs import SMALL, WITH_STATE
from torch.testing import assert_close

from align.model.adapters import Lora
from align.model.checkpointing import checkpoint_layers
from align.model.config import PolicySection
from align.model.forward import TokenScorer, score_tokens
from align.model.load import LoadOptions
from align.model.packing import enable_packing
from align.model.policy import load_policy
from align.packing import packed_collate
from align.packing.batch import collate
from align.packing.states import with_state
from rewards.logits import decoder_of

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
CONFIGS = small_configs.CONFIGS | {
    "llama dynamic rope": lambda: t.LlamaConfig(**SMALL, max_position_embeddings=8, rope_parameters=YARN)
}
REFUSED = {
    "bloom": lambda: t.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2),
    "qwen2 moe": lambda: t.Qwen2MoeConfig(
        **SMALL, use_sliding_window=True, sliding_window=64, max_window_layers=1, num_experts=2, num_experts_per_tok=1
    ),
}


def build(config, attention=None):
    torch.manual_seed(5)
    return t.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def gradients(model, batch, weights):
    values = score_tokens(model, batch).logprobs
    found = torch.autograd.grad((weights * values).sum(), list(model.parameters()), allow_unused=True)
    return values.detach(), found


SOFT_CAP_IN_SDPA = t.Gemma2ForCausalLM._supports_sdpa
"""Whether this transformers runs a soft-capped attention as sdpa, without its soft-cap; 5.24 refuses to."""
WITH_ATTENTION = [
    (n, a) for n in CONFIGS for a in ("sdpa", "eager") if (n, a) != ("gemma2", "sdpa") or SOFT_CAP_IN_SDPA
]


@pytest.mark.parametrize(("name", "attention"), WITH_ATTENTION)
@pytest.mark.parametrize("shape", ["ragged", "deep"])
def test_values_and_gradients_are_those_of_padded_rows(name, attention, shape, request):
    model = build(CONFIGS[name](), attention)
    lists = request.getfixturevalue(shape)
    padded, packed = collate(lists, pad_id=0), packed_collate(lists)
    weights = torch.randn(padded.targets.shape)
    expected, wanted = gradients(model, padded, weights)
    assert enable_packing(model, name=name)
    assert_close(score_tokens(model, padded).logprobs, expected, atol=1e-5, rtol=0)
    ours, found = gradients(model, packed, weights)
    assert_close(ours, expected, atol=1e-5, rtol=0)
    for gradient, want in zip(found, wanted, strict=True):
        if want is not None:
            assert (gradient - want).norm() <= 1e-5 * want.norm() + 1e-6


def build_with_state(name):
    """With weights so large that a state that is not the sequence's own shows; some initialisers make them small."""
    model = build(WITH_STATE[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


BY_SEQUENCE = ("rwkv", "minimax", "xlstm")
"""Models whose layers with a state read again what sequences share."""
SIBLINGS = ("falcon mamba", "qwen3.5 moe", "olmo hybrid", "bamba", "lfm2 moe", "minimax", "xlstm", "zamba2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in SIBLINGS else ()) for n in WITH_STATE])
def test_states_are_those_of_padded_rows(name, ragged, deep):
    model = build_with_state(name)
    padded, packed = collate([*ragged, *deep], pad_id=0), packed_collate([*ragged, *deep])
    weights = torch.randn(padded.targets.shape)
    expected, wanted = gradients(model, padded, weights)
    assert enable_packing(model, name=name)
    assert torch.equal(score_tokens(model, padded).logprobs, expected)
    layers = with_state(decoder_of(model))
    read = [0] * len(layers)

    def count(place, given):
        read[place] += given[0].shape[:-1].numel()

    for place, layer in enumerate(layers):
        projection = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
        projection.register_forward_pre_hook(lambda _, given, place=place: count(place, given))
    ours, found = gradients(model, packed, weights)
    assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (set(read) == {packed.input_ids.numel()}) == (name not in BY_SEQUENCE)
    assert sum(want is not None and bool(want.any()) for want in wanted) > 5
    whole = torch.cat([want.flatten() for want in wanted if want is not None]).norm()
    for gradient, want in zip(found, wanted, strict=True):
        if want is not None:  # a decay's gradient is a small difference of sums, rounded as the sums are
            assert (gradient - want).norm() <= 1e-5 * want.norm() + 1e-6 * whole


@pytest.mark.parametrize("name", ["mamba", "qwen3.5", "rwkv"])
def test_a_layer_that_computes_again_still_knows_its_tree(name, ragged):
    model = build_with_state(name).train()
    assert enable_packing(model, name=name)
    batch, other = packed_collate(ragged), packed_collate(ragged[:1])
    weights = torch.randn(batch.targets.shape)
    wanted = gradients(model, batch, weights)[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    values = score_tokens(model, batch).logprobs
    score_tokens(model, other)  # as a reference or the next micro-batch does before the backward pass
    found = torch.autograd.grad((weights * values).sum(), list(model.parameters()), allow_unused=True)
    for gradient, want in zip(found, wanted, strict=True):
        assert (gradient is None) == (want is None)
        assert want is None or torch.equal(gradient, want)


def test_soft_capped_attention_is_another_model_than_plain():
    """What the comparison above would not see if both sides left the soft-cap out."""
    if not SOFT_CAP_IN_SDPA:
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            build(CONFIGS["gemma2"](), "sdpa")
        return
    ids = torch.arange(3, 12)[None]
    plain, capped = (build(CONFIGS["gemma2"](), attention)(ids).logits for attention in ("sdpa", "eager"))
    assert (plain - capped).abs().max() > 1e-2


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_packed_says_so_and_is_left_alone(name, ragged, caplog):
    model = build(REFUSED[name]())
    before = score_tokens(model, collate(ragged, pad_id=0)).logprobs
    attention = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, logger="align"):
        assert not enable_packing(model, name=name)
    assert model.config._attn_implementation == attention
    assert torch.equal(score_tokens(model, collate(ragged, pad_id=0)).logprobs, before)
    (record,) = [r for r in caplog.records if r.name.startswith("align")]
    assert "separate padded rows" in record.getMessage()


@pytest.fixture
def policy(model_folder):
    torch.manual_seed(0)
    policy = load_policy(PolicySection(model=str(model_folder), adapter=Lora(rank=3)))
    assert policy.packing
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def adapter_gradients(policy, batch):
    scorer = TokenScorer(policy).train()
    policy.model.zero_grad()
    scorer(batch).logprobs.sum().backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def test_adapters_get_the_same_gradients_with_and_without_checkpointing(policy, ragged, deep):
    lists = [*ragged, *deep]
    wanted = adapter_gradients(policy, collate(lists, pad_id=policy.pad_id))
    plain = adapter_gradients(policy, policy.collate(lists))
    checkpoint_layers(policy.model)
    assert policy.model.is_gradient_checkpointing
    checkpointed = adapter_gradients(policy, policy.collate(lists))
    assert len(wanted) == 28 and plain.keys() == wanted.keys()
    for name, want in wanted.items():
        assert (plain[name] - want).norm() <= 1e-5 * want.norm(), name
        assert torch.equal(plain[name], checkpointed[name])


def test_autocast_gives_the_gradients_of_its_precision(policy, ragged):
    padded = collate(ragged, pad_id=policy.pad_id)
    exact, whole = adapter_gradients(policy, padded), policy.collate(ragged)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [
            sum((gradient - exact[name]).norm() for name, gradient in adapter_gradients(policy, batch).items())
            for batch in (whole, padded)
        ]
    assert 0 < errors[0] <= 1.5 * errors[1] < 0.2 * sum(gradient.norm() for gradient in exact.values())


def test_the_reference_is_the_same(policy, ragged):
    scorer = TokenScorer(policy)
    with policy.reference():
        packed, padded = (scorer(b).logprobs for b in (policy.collate(ragged), collate(ragged, pad_id=policy.pad_id)))
    assert_close(packed, padded, atol=1e-5, rtol=0)
    assert (scorer(policy.collate(ragged)).logprobs - packed).abs().max() > 1e-2


def test_half_precision_stays_within_its_rounding(model_folder, ragged):
    exact = load_policy(PolicySection(model=str(model_folder)), LoadOptions(packing=False))
    half = load_policy(PolicySection(model=str(model_folder), dtype="bfloat16"))
    assert half.packing and not exact.packing
    wanted = TokenScorer(exact).eval()(exact.collate(ragged)).logprobs
    packed = TokenScorer(half).eval()(half.collate(ragged)).logprobs
    padded = TokenScorer(half).eval()(collate(ragged, pad_id=half.pad_id)).logprobs
    assert (packed - wanted).abs().mean() <= 1.5 * (padded - wanted).abs().mean()


def test_twenty_steps_lead_to_the_same_adapter(model_folder, ragged):
    ends = []
    for packing in (True, False):
        policy = load_policy(
            PolicySection(model=str(model_folder), adapter=Lora(rank=3)), LoadOptions(packing=packing, seed=1)
        )
        scorer = TokenScorer(policy).train()
        optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for step in range(20):
            batch = policy.collate(ragged[step % 3 :])
            scores = batch.to_lists(scorer(batch).logprobs.sum(-1)).where(batch.list_mask, -torch.inf)
            loss = torch.nn.functional.cross_entropy(scores, batch.grades.where(batch.list_mask, -1.0).argmax(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ends.append((losses, torch.cat([p.detach().flatten() for p in policy.model.parameters() if p.requires_grad])))
    assert ends[0][0][-1] < ends[0][0][0]
    assert_close(torch.tensor(ends[0][0]), torch.tensor(ends[1][0]), atol=1e-4, rtol=1e-4)
    assert (ends[0][1] - ends[1][1]).norm() <= 1e-3 * ends[1][1].norm()
