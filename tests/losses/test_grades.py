"""Rewards that differ as float64 numbers stay in order on the whole way to the figures; equal ones stay tied."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.data.schema import Row
from align.data.select import reduce_row
from align.losses.list_loss import build_loss
from align.losses.ranking import ranking_metrics
from align.objectives import pair_weights
from align.objectives.chosen_rejected import Bco
from align.objectives.lists import best_graded, ordered_pairs
from align.objectives.pairwise import Logistic
from align.objectives.scores import Likelihood
from align.packing.batch import collate
from align.packing.collate import packed_collate
from align.types import TokenStats
from rewards.grading import grades_from_rewards
from rewards.heads import bradley_terry


@st.composite
def close_rewards(draw) -> list[float]:
    """Far apart, as close as float64 allows, equal, tiny and huge."""
    values = [draw(st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1.0, 1e-300, -2.5, 1e6])))]
    for step in draw(st.lists(st.sampled_from(["same", "next", "near", "far"]), min_size=1, max_size=6)):
        near = {"same": values[-1], "next": math.nextafter(values[-1], math.inf), "near": values[-1] + 3e-9}
        values.append(near[step] if step in near else draw(st.floats(-50, 50)))
    return draw(st.permutations(values))


def order(values) -> list[list[int]]:
    """The sign of each difference."""
    return [[(a > b) - (a < b) for b in values] for a in values]


@pytest.mark.parametrize("method", ["win_probability", "rank", "quantile", "raw"])
@given(rewards=close_rewards())
def test_grades_are_in_the_order_of_the_rewards(method, rewards):
    assert order(grades_from_rewards(rewards, method)) == order(rewards)


@given(rewards=close_rewards())
def test_what_is_trained_and_measured_has_the_order_of_the_rewards(rewards):
    signs = torch.tensor(order(rewards))
    example = {"prompt_ids": [1], "completion_ids": [[2]] * len(rewards), "grades": rewards}
    for batch in (collate([example], pad_id=0), packed_collate([example])):
        grades, mask = batch.grades, batch.list_mask
        assert torch.equal(ordered_pairs(grades, mask)[0], signs > 0)
        assert torch.equal(best_graded(grades, mask)[0], ~(signs < 0).any(1))
        scores = (signs > 0).sum(1).float()[None]
        found = ranking_metrics(scores, grades, mask)
        if (signs != 0).any():
            assert found["pair_accuracy"] == found["top1_agreement"] == 1 and found["kendall_tau"] > 0
    texts = tuple(map(str, range(len(rewards))))
    row = Row("a", "p", texts, tuple(rewards), None, {}, "file", 1)
    kept = reduce_row(row, select="best_worst", list_size=None, seed=0).grades or ()
    assert {max(kept), min(kept)} == {max(rewards), min(rewards)}


def test_a_gap_of_a_few_nano_grades_is_a_pair_and_weighs_what_it_should():
    """Lambda's weight against the formula; losses against those of the same order far apart."""
    close, far = [0.5 + 4e-9, 0.5], [1.0, 0.0]
    examples = [{"prompt_ids": [1], "completion_ids": [[2], [3]], "grades": grades} for grades in (close, far)]
    batch = collate(examples, pad_id=0)
    scores = torch.tensor([[0.3, -0.2]] * 2)
    weights = pair_weights("lambda", scores[:1], batch.grades[:1], batch.list_mask[:1])[0]
    gap = (2 ** close[0] - 2 ** close[1]) * (1 - 1 / math.log2(3))
    assert weights[0, 1].item() == pytest.approx(gap, rel=1e-6)
    logprobs = torch.tensor([[-1.0], [-2.0]] * 2)
    for objective in (Logistic(), Bco()):
        loss = build_loss(Likelihood(beta=1.0), [objective])(TokenStats(logprobs), None, batch)
        assert loss.dtype == torch.float32 and loss[0] == loss[1] != 0
    losses = bradley_terry(scores, batch.grades, batch.list_mask, torch.full((2,), torch.nan))
    assert losses.dtype == torch.float32 and losses[0] == losses[1] != 0
