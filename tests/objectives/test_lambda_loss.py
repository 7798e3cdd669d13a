"""LiPO-lambda against the paper's formula with the numbers written in, and against the usual slips."""

from math import exp, log, log2

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from align.errors import UserError
from align.objectives import OBJECTIVES, pair_weights

lambda_loss = OBJECTIVES["lambda"]


def test_is_the_formula_with_numbers():
    scores, grades = torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[2.0, 0.0, 1.0]])
    expected = (  # the ranks are 3, 1, 2
        (4 - 2) * (1 / log2(3) - 1 / log2(4)) * log(1 + exp(1 - 0))
        + (4 - 1) * (1 / log2(2) - 1 / log2(4)) * log(1 + exp(3 - 0))
        + (2 - 1) * (1 / log2(2) - 1 / log2(3)) * log(1 + exp(3 - 1))
    )
    assert_close(lambda_loss(scores, grades, grades >= 0), torch.tensor([expected]))


@pytest.mark.parametrize(("log_base", "discount_gap"), [(2.0, 1 - 1 / log2(3)), (exp(1), 1 / log(2) - 1 / log(3))])
@pytest.mark.parametrize("grades", [(1.0, 0.0), (0.75, 0.25)])
def test_on_pairs_it_is_dpo_times_the_gap_of_gains_and_discounts(grades, log_base, discount_gap):
    scores = torch.randn(16, 2).double()
    y = torch.tensor(grades).double().expand(16, 2)
    expected = -logsigmoid(scores[:, 0] - scores[:, 1]) * (2 ** grades[0] - 2 ** grades[1]) * discount_gap
    assert_close(lambda_loss(scores, y, y >= 0, log_base=log_base), expected)


def test_no_gradient_passes_through_the_weights():
    scores = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    grades = torch.randint(0, 4, (4, 5)).double()
    weights = pair_weights("lambda", scores, grades, grades >= 0)
    assert not weights.requires_grad
    margins = scores[:, :, None] - scores[:, None, :]
    expected = torch.autograd.grad((-weights * logsigmoid(margins)).sum(), scores)[0]
    assert_close(torch.autograd.grad(lambda_loss(scores, grades, grades >= 0).sum(), scores)[0], expected)


def test_before_the_first_step_all_scores_are_tied_and_the_better_pairs_still_weigh():
    grades = torch.tensor([[3.0, 1.0, 0.0]])
    discounts = [1 / log2(2), 1 / log2(3), 1 / log2(4)]
    gap = (abs(discounts[0] - discounts[1]) + abs(discounts[0] - discounts[2]) + abs(discounts[1] - discounts[2])) / 3
    expected = torch.tensor([[[0, 8 - 2, 8 - 1], [0, 0, 2 - 1], [0, 0, 0]]]) * gap
    assert_close(pair_weights("lambda", torch.zeros(1, 3), grades, grades >= 0), expected)


def test_pair_weights_of_lambda_follow_its_options():
    scores, grades = torch.tensor([[2.0, 1.0, torch.nan]]), torch.tensor([[0.0, 1.0, 5.0]])
    real = torch.tensor([[True, True, False]])
    delta = (2 - 1) * (1 / log(2) - 1 / log(3))
    expected = torch.zeros(1, 3, 3)
    expected[0, 1, 0] = delta / 2
    options = {"log_base": exp(1), "reduction": "list_mean"}
    assert_close(pair_weights("lambda", scores, grades, real, **options), expected)


def test_pair_weights_of_the_others_are_one_on_ordered_pairs():
    grades = torch.tensor([[1.0, 1.0, 0.0, 9.0]])
    real = torch.tensor([[True, True, True, False]])
    expected = torch.zeros(1, 4, 4)
    expected[0, 0, 2] = expected[0, 1, 2] = 1
    assert_close(pair_weights("logistic", torch.randn(1, 4), grades, real, label_smoothing=0.1), expected)


def test_pair_weights_refuse_an_unknown_name():
    with pytest.raises(UserError, match="no objective `lamda`"):
        pair_weights("lamda", torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


def test_rounding_does_not_rank():
    grades, real = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    noise = torch.tensor([[3e-7, -2e-7, 1e-7]])
    tied = pair_weights("lambda", torch.zeros(1, 3), grades, real)
    assert torch.equal(pair_weights("lambda", noise, grades, real), tied)
    assert not torch.equal(pair_weights("lambda", noise * 1e4, grades, real), tied)
