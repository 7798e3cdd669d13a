"""Every schedule of transformers takes the options that we list, and a refined one follows a run's gradients."""

import inspect
import json
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from transformers.trainer_utils import SchedulerType

from align.errors import UserError
from align.recipe.schedules import BY_FIGURE, OPTIONS, REFINED, Name
from align.recipe.settings import TrainSection
from align.report.refine import refined, write_refined
from align.training.schedules import check_schedule, make_schedule, rates
from align.training.train import train

OURS = {"warmup_stable_decay": {"decay_ratio"}}
PASSED = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps", "mode", "verbose"}
"""What the trainer gives."""
CLASSES = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
GIVEN = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"decay_ratio": 0.2},
    "greedy": {"min_lr": 1e-6},
}


def section(name: str, **options) -> TrainSection:
    return TrainSection(schedule={"name": name} | options, learning_rate=0.01, eval_steps=2)


def test_names_and_options_are_transformers():
    assert set(get_args(Name)) == {kind.value for kind in SchedulerType} | {"refined"} == set(OPTIONS)
    for name in SchedulerType:
        made = CLASSES.get(name.value) or TYPE_TO_SCHEDULER_FUNCTION[name]
        takes = set(inspect.signature(made).parameters) - PASSED
        assert set(OPTIONS[name.value].split()) == takes | OURS.get(name.value, set()), name


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_a_schedule_is_made_and_runs(name):
    keys = section(name, **GIVEN.get(name, {}))
    check_schedule(keys)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler = make_schedule(keys, optimizer, steps=10)
    for step in range(10):
        optimizer.step()
        scheduler.step(1.0 / (1 + step)) if name in BY_FIGURE else scheduler.step()
    assert optimizer.param_groups[0]["lr"] >= 0


def test_warm_up_stable_decay_by_its_formula():
    """20 steps: 2 of warm-up, 14 at the rate, 4 along half a cosine."""
    keys = TrainSection(schedule={"name": "warmup_stable_decay", "decay_ratio": 0.2, "decay_type": "linear"})
    found = rates(keys, total=20, steps=20)
    assert found == pytest.approx([0, 0.5, *[1.0] * 14, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("linear", {"power": 2}, "`power` is no option of `linear`; it takes none"),
        ("warmup_stable_decay", {}, "needs decay_ratio or num_decay_steps"),
        ("greedy", {}, "needs min_lr"),
        ("cosine_with_min_lr", {}, "needs min_lr or min_lr_rate"),
        ("refined", {}, "needs path"),
    ],
)
def test_options_that_it_has_not_or_needs_are_said(name, options, said):
    with pytest.raises(ValidationError, match=said):
        section(name, **options)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"name": "reduce_lr_on_plateau"}, "acts by held-out figures; set train.eval_steps"),
        ({"name": "polynomial", "power": "much"}, "train.schedule: `polynomial`: "),
        ({"name": "warmup_stable_decay", "decay_ratio": 0.2, "decay_type": "steep"}, "Unknown decay type: steep"),
        ({"name": "refined", "path": "nowhere"}, "nowhere: there is no refined schedule; `align report RUN --refine`"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run_directory(schedule, said, make_recipe, tmp_path):
    with pytest.raises(UserError, match=said) as told:
        train(make_recipe(train={"schedule": schedule, "steps": 4}))
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


def by_hand(norms: list[float]) -> list[float]:
    """arXiv:2310.07831: w = G^-2, eta_t = w_t times the sum of the weights behind it, over its maximum."""
    w = [norm**-2 for norm in norms]
    eta = [w[t] * sum(w[t + 1 :]) for t in range(len(w))]
    return [one / max(eta) for one in eta]


def test_a_refined_schedule_is_the_papers():
    norms = [3.0, 1.0, 2.0, 5.0, 4.0, 1.5, 2.5, 3.5]
    assert refined(norms, smoothed=0) == pytest.approx(by_hand(norms))
    medians = [1.0, 2.0, 2.0, 4.0, 4.0, 2.5, 2.5, 2.5]  # of three, the ends mirrored
    assert refined(norms, smoothed=3 / 8) == pytest.approx(by_hand(medians))
    line = refined([2.0] * 50)
    assert line == pytest.approx([(49 - t) / 49 for t in range(50)])  # equal norms: falls in a line, from the start
    bump = refined([2.0] * 20 + [4.0] * 10 + [2.0] * 20)
    assert max(bump[22:28]) < 0.3 < min(bump[:15]) and bump[33] > bump[25]


def test_a_run_follows_the_schedule_that_another_left(make_recipe, tmp_path):
    with pytest.raises(UserError, match="there is no recipe.yaml"):
        write_refined(tmp_path)
    first = train(make_recipe("first", train={"steps": 12, "lists_per_step": 2}, sampling={"prompts": 0}))
    factors = json.loads(write_refined(first.path).read_text())["factors"]
    lines = [json.loads(line) for line in (first.path / "metrics.jsonl").read_text().splitlines()]
    assert factors == refined([line["grad_norm"] for line in lines if "grad_norm" in line])
    keys = {"steps": 12, "lists_per_step": 2, "schedule": {"name": "refined", "path": str(first.path / REFINED)}}
    second = train(make_recipe("second", train=keys, sampling={"prompts": 0}))
    lines = [json.loads(line) for line in (second.path / "metrics.jsonl").read_text().splitlines()]
    seen = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert seen[:11] == pytest.approx([1e-2 * factor for factor in factors[:11]])
    longer = rates(TrainSection(**keys), total=23, steps=23)
    assert longer is not None and longer[::2] == pytest.approx(factors)
    assert longer[1] == pytest.approx((factors[0] + factors[1]) / 2)
