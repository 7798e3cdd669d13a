"""Token log-probabilities against the models' own logits, one unpadded row at a time."""

import pytest
import small_configs
import torch
import transformers as t
from small_configs import SMALL
from torch.testing import assert_close

from align.model.adapters import Lora
from align.model.checks import check_forward
from align.model.config import PolicySection
from align.model.forward import STATES, TokenScorer, hidden_diversity, score_tokens
from align.model.policy import load_policy
from align.packing.batch import collate

CONFIGS = small_configs.CONFIGS | {"llama tied": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=True)}
del CONFIGS["qwen3 moe"]  # its experts' kernel knows no float64


def own_logprobs(model, lists):
    """log_softmax of the model's logits, of every completion alone and unpadded."""
    values = []
    for example in lists:
        prompt = example["prompt_ids"]
        for ids in example["completion_ids"]:
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            values.append(logits.double().log_softmax(-1)[range(len(ids)), ids])
    return torch.cat(values)


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(5)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def test_values_and_gradients_are_those_of_the_models_own_logits(model, lists):
    batch = collate(lists, pad_id=0)
    expected = own_logprobs(model, lists)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((weights * expected).sum(), list(model.parameters()), allow_unused=True)
    ours = score_tokens(model, batch).logprobs
    assert_close(ours[batch.completion_mask].double(), expected, atol=1e-5, rtol=1e-5)
    assert (ours[~batch.completion_mask] == 0).all()
    loss = (weights * ours[batch.completion_mask]).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (want is None)
        if want is not None:
            assert_close(gradient, want, atol=1e-5, rtol=1e-4)


def test_log_z_and_its_gradient_are_those_of_the_models_own_logits(model, lists):
    """Beside the log-probabilities' own gradient, as a penalty on log^2 Z has it."""
    model.get_output_embeddings().requires_grad_(False)
    batch, example = collate(lists[:1], pad_id=0), lists[0]
    prompt, weights = example["prompt_ids"], [p for p in model.parameters() if p.requires_grad]
    rows = [model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0] for ids in example["completion_ids"]]
    log_z = torch.cat([own[len(prompt) - 1 : -1] for own in rows]).logsumexp(-1)
    wanted = torch.autograd.grad((log_z**2 + own_logprobs(model, lists[:1])).sum(), weights, allow_unused=True)
    stats = score_tokens(model, batch, ("logprob", "logsumexp"))
    assert_close(stats.logsumexp[batch.completion_mask].double(), log_z, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((stats.logsumexp**2 + stats.logprobs).sum(), weights, allow_unused=True)
    for gradient, want in zip(found, wanted, strict=True):
        assert_close(gradient, want, atol=1e-5, rtol=1e-4)


def test_padding_is_never_seen(model, lists):
    first, second = (score_tokens(model, collate(lists, pad_id=pad)).logprobs for pad in (0, 7))
    assert torch.equal(first, second)


def test_entropy_and_sum_of_squares_are_those_of_the_distribution(model, lists):
    batch = collate(lists[:1], pad_id=0)
    stats = score_tokens(model, batch, ("logprob", "entropy", "log_sum_sq_probs"))
    prompt, ids = lists[0]["prompt_ids"], lists[0]["completion_ids"][0]
    p = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
    assert_close(stats.entropy[0, : len(ids)].double(), -(p * p.log()).sum(-1), atol=1e-4, rtol=1e-4)
    assert_close(stats.log_sum_sq_probs[0, : len(ids)].double(), (p * p).sum(-1).log(), atol=1e-4, rtol=1e-4)


def test_a_head_that_is_not_plain_is_refused(model):
    check_forward(model, name="tiny")
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: 2 * logits)
    with pytest.raises(ValueError, match="not supported"):
        check_forward(model, name="tiny")


def test_a_lora_on_the_head_is_part_of_it(model_folder, lists):
    policy = load_policy(PolicySection(model=str(model_folder), adapter=Lora(targets=("lm_head", "q_proj"), rank=3)))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    scorer, batch = TokenScorer(policy), collate(lists, pad_id=0)
    assert_close(
        scorer(batch).logprobs[batch.completion_mask].double(), own_logprobs(policy.model, lists), atol=1e-5, rtol=1e-5
    )
    scorer(batch).logprobs.sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    own_logprobs(policy.model, lists).sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name
    with policy.reference():
        reference = scorer(batch).logprobs
    with policy.model.disable_adapter():
        assert_close(reference[batch.completion_mask].double(), own_logprobs(policy.model, lists), atol=1e-5, rtol=1e-5)


def test_hidden_diversity_is_the_nuclear_norm_of_the_states_directions(model_folder, lists):
    """In float64 by singular values, from the states that predict each completion."""
    model = t.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    batch = collate(lists, pad_id=0)
    found = score_tokens(model, batch, ("logprob", "hidden_diversity")).hidden_diversity
    expected = []
    for row in lists:
        for own in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + own])
            states = model.model(ids).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1].double()
            directions = states / states.square().sum(dim=1, keepdim=True).sqrt()
            expected.append(torch.linalg.svdvals(directions).sum().item() / len(own))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert not found.requires_grad and score_tokens(model, batch).hidden_diversity is None


def test_hidden_diversity_of_states_whose_angles_are_known():
    axes = torch.eye(8)[[0, 0, 0, 3, 3, 5]] * torch.arange(1.0, 7)[:, None]
    assert hidden_diversity(axes).item() == pytest.approx((3**0.5 + 2**0.5 + 1) / 6), (
        "the paper's sum of columns' norms"
    )
    assert hidden_diversity(torch.eye(8)).item() == pytest.approx(1)
    assert hidden_diversity(torch.ones(4, 8) / 8).item() == pytest.approx(1 / 2), "one direction, across all axes"
    assert hidden_diversity(torch.ones(500, 2)).item() == pytest.approx(STATES**-0.5), "no more of them are looked at"
    assert hidden_diversity(torch.ones(0, 8)).isnan() and hidden_diversity(torch.full((2, 8), torch.nan)).isnan()
