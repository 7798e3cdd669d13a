"""Metrics of a batch by hand."""

import math

import pytest
import torch
from accelerate import Accelerator

from align.losses.metrics import Sums, list_metrics
from align.packing.batch import collate
from align.types import TokenStats


@pytest.mark.parametrize(("change", "fell"), [(0.5, 0.0), (-2e-4, 0.0), (-4e-3, 1.0)])
def test_a_completion_that_moved_by_rounding_has_not_fallen(change, fell):
    """The best completion has two tokens; each moves by half of `change`."""
    batch = collate([{"prompt_ids": [1], "completion_ids": [[3, 4], [5]], "grades": [1.0, 0.0]}], pad_id=0)
    reference = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    logprobs = reference + torch.tensor([[change / 2, change / 2], [7.0, 0.0]])
    values = list_metrics(batch, TokenStats(logprobs), reference, torch.zeros(1, 2))
    assert values["best_fell_share"].tolist() == [fell]
    assert values["best_logprob_change"].item() == pytest.approx(change, abs=1e-6)


def test_a_token_is_saturated_where_float32_has_its_probability_at_1():
    """Half a step below 1 is 2^-25: less is lost, more is seen."""
    batch = collate([{"prompt_ids": [1], "completion_ids": [[3, 4, 5], [5]], "grades": [1.0, 0.0]}], pad_id=0)
    logprobs = torch.tensor([[0.0, -(2.0**-26), -(2.0**-23)], [-3.0, 0.0, 0.0]])
    values = list_metrics(batch, TokenStats(logprobs), None, torch.zeros(1, 2))
    assert values["saturated_share"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_list_without_an_order_is_left_out_and_one_without_a_loss_is_not():
    """Kendall's tau of a list of ties is undefined; a loss that is NaN is a fault, whatever the other lists give."""
    nan = math.nan
    sums = Sums()
    sums.add({"loss": torch.tensor([1.0, 3.0]), "kendall_tau": torch.tensor([0.5, nan])})
    assert sums.means(Accelerator(cpu=True)) == {"loss": (1.0 + 3.0) / 2, "kendall_tau": 0.5}
    sums.add({"loss": torch.tensor([1.0, nan]), "kendall_tau": torch.tensor([nan, nan])})
    assert sums.means(Accelerator(cpu=True)) == {"loss": math.inf, "kendall_tau": 0.5}
