"""Score functions against their formulas on Python floats, and what padding, precision and links must not break."""

from math import exp, log

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.testing import assert_close

from align.objectives import REFERENCE_FREE, SCORES, ScoreConfig

LENGTHS, LIST_INDEX = [3, 1, 4, 2, 2], [0, 0, 1, 1, 1]


def tokens():
    """Five completions of two lists, NaN beyond their ends."""
    policy, reference = -torch.rand(2, 5, 6, dtype=torch.float64) * 3
    mask = torch.arange(6)[None, :] < torch.tensor(LENGTHS)[:, None]
    return policy.where(mask, torch.nan), reference.where(mask, torch.nan), mask, torch.tensor(LIST_INDEX)


def ratios(policy, reference):
    """lp_t - ref_t of each completion, as lists of floats."""
    return [(p[:n] - r[:n]).tolist() for p, r, n in zip(policy, reference, LENGTHS, strict=True)]


def by_hand(name, policy, reference):
    u, shortest = ratios(policy, reference), [1, 1, 2, 2, 2]
    return {
        "log_ratio": [0.2 * sum(x) for x in u],
        "log_ratio_mean": [0.2 * sum(x) / len(x) for x in u],
        "length_desensitised": [0.2 * (sum(x[:n]) + 0.5 * sum(x[n:])) for x, n in zip(u, shortest, strict=True)],
        "likelihood": [0.2 * sum(p[:n].tolist()) for p, n in zip(policy, LENGTHS, strict=True)],
        "likelihood_mean": [0.2 * sum(p[:n].tolist()) / n for p, n in zip(policy, LENGTHS, strict=True)],
    }[name]


@pytest.mark.parametrize("name", SCORES)
def test_is_the_formula_and_padding_is_inert(name):
    policy, reference, mask, list_index = tokens()
    policy.requires_grad_()
    scores = SCORES[name](policy, None if name in REFERENCE_FREE else reference, mask, list_index, beta=0.2)
    assert_close(scores, torch.tensor(by_hand(name, policy.detach(), reference), dtype=torch.float64))
    gradient = torch.autograd.grad(scores.sum(), policy)[0]
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] > 0).all()


@pytest.mark.parametrize("power", [0.85, 0.0])
def test_the_sum_may_be_divided_by_a_power_of_the_length(power):
    """Rescue: sum / T^0.85; a power of 0 is the sum itself."""
    policy, _, mask, list_index = tokens()
    scores = SCORES["likelihood_mean"](policy, None, mask, list_index, beta=1.0, length_power=power)
    expected = [sum(p[:n].tolist()) / n**power for p, n in zip(policy, LENGTHS, strict=True)]
    assert_close(scores, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", SCORES)
def test_an_empty_completion_scores_zero(name):
    empty = torch.full((1, 3), torch.nan)
    assert SCORES[name](empty, empty, torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, dtype=torch.long)).item() == 0


@pytest.mark.parametrize("name", sorted(set(SCORES) - REFERENCE_FREE))
def test_a_score_against_the_reference_needs_one(name):
    policy, _, mask, list_index = tokens()
    with pytest.raises(ValueError, match="reference_logprobs"):
        SCORES[name](policy, None, mask, list_index)


def test_alpha_one_is_the_log_ratio_and_lists_do_not_see_each_other():
    policy, reference, mask, list_index = tokens()
    desensitised = SCORES["length_desensitised"]
    whole = desensitised(policy, reference, mask, list_index, beta=0.3, alpha=1.0)
    assert_close(whole, SCORES["log_ratio"](policy, reference, mask, list_index, beta=0.3))
    together = desensitised(policy, reference, mask, list_index, alpha=0.1)
    apart = [desensitised(policy[i], reference[i], mask[i], list_index[i], alpha=0.1) for i in (slice(2), slice(2, 5))]
    assert_close(together, torch.cat(apart))


def test_the_reference_is_taken_off_before_the_sum():
    """Sums of 4096 tokens are near -10000, where float32 has steps of 0.001; the difference is far smaller."""
    policy = torch.full((1, 4096), -2.5)
    reference = policy - 1e-6
    mask, one = torch.ones(1, 4096, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    exact = (policy.double() - reference.double()).sum(dim=1)
    assert_close(SCORES["log_ratio"](policy, reference, mask, one, beta=1.0).double(), exact, rtol=1e-5, atol=0)


LINKS = {
    "reverse_kl": lambda u: u,
    "forward_kl": lambda u: 1 - exp(-u),
    "js": lambda u: log(2) + log(1 / (1 + exp(-u))),
    "alpha": lambda u: (exp((0.3 - 1) * u) - 1) / (0.3 - 1),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("name", "divisors"), [("log_ratio", [1] * 5), ("log_ratio_mean", LENGTHS)])
def test_links_act_on_the_unscaled_sum(name, divisors, link):
    policy, reference, mask, list_index = tokens()
    divergence = {"name": link} | ({"alpha": 0.3} if link == "alpha" else {})
    expected = [0.2 / n * LINKS[link](sum(u)) for u, n in zip(ratios(policy, reference), divisors, strict=True)]
    scores = SCORES[name](policy, reference, mask, list_index, beta=0.2, divergence=divergence)
    assert_close(scores, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("divergence", [{"name": "forward_kl"}, {"name": "alpha", "alpha": 0.0}, {"name": "js"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_links_stay_finite_at_extreme_ratios(divergence, dtype):
    policy = torch.tensor([[-3000.0], [3000.0]], dtype=dtype, requires_grad=True)
    mask, index = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    scores = SCORES["log_ratio"](policy, torch.zeros_like(policy), mask, index, divergence=divergence)
    assert scores.isfinite().all()
    assert torch.autograd.grad(scores.sum(), policy)[0].isfinite().all()


def test_alpha_one_is_the_reverse_link():
    completions = tokens()
    alpha_one = SCORES["log_ratio"](*completions, divergence={"name": "alpha", "alpha": 1.0})
    assert_close(alpha_one, SCORES["log_ratio"](*completions))


@pytest.mark.parametrize("name", SCORES)
def test_a_recipe_section_gives_the_arguments_of_its_function(name):
    config = TypeAdapter(ScoreConfig).validate_python({"name": name})
    policy, reference, mask, list_index = tokens()
    options = config.model_dump(exclude={"name"})
    from_recipe = SCORES[name](policy, reference, mask, list_index, **options)
    assert_close(from_recipe, SCORES[name](policy, reference, mask, list_index))


def test_a_recipe_cannot_name_a_link_without_its_place():
    with pytest.raises(ValidationError, match="divergence"):
        TypeAdapter(ScoreConfig).validate_python({"name": "likelihood_mean", "divergence": {"name": "js"}})
