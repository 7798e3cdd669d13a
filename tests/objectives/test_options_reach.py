"""No option is decoration: whatever else is set, changing it changes the loss or its gradient, or it is refused.

Every field of every objective, score, regulariser and token weight is changed in a recipe, under every value that the
section's other fields of few values can have, and the loss of one batch is computed again.
"""

from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel

from align.errors import UserError
from align.model.reward import RewardBatch
from align.objectives import OBJECTIVE, SCORE, Objective
from align.objectives.divergence import AlphaDivergence
from align.objectives.robust_softmax import RobustSoftmax
from align.objectives.token_reg import Tgdpo, TokenReg
from align.packing.batch import collate
from align.recipe import parse_recipe
from align.runs.build import loss_of
from align.types import TokenStats
from rewards.head_config import Attributes, BradleyTerry

OBJECTIVES, SCORES = OBJECTIVE.classes.values(), SCORE.classes.values()
COLUMNS = {"strength_field", "deviation_field"}
"""Names of columns reach the loss where the rows are read; tests/training/test_reward.py reads them."""
BEYOND = {(RobustSoftmax, "weakest"): [4.9], (RobustSoftmax, "strongest"): [0.5]}
"""Bounds that the batch's lists do not reach by themselves."""


def few_values(config: type[BaseModel], field: str) -> list[Any]:
    annotation = config.model_fields[field].annotation
    return list(get_args(annotation)) if get_origin(annotation) is Literal else [True, False] * (annotation is bool)


def other_values(config: type[BaseModel], field: str) -> list[Any]:
    """Values that a field does not take by default; those that it may not take are refused, which is as good."""
    default = config.model_fields[field].default
    if few := few_values(config, field):
        return [value for value in few if value != default]
    if field == "score":
        return [{"name": "log_ratio", "beta": 0.7}, {"name": "likelihood_mean", "beta": 0.6}]
    if field == "divergence":
        return [{"name": "forward_kl"}, {"name": "alpha", "alpha": 0.3}]
    if (config, field) in BEYOND:
        return BEYOND[config, field]
    if field == "output":
        return ["b"]
    if default is None:
        return [0.7, 2]
    return [default + 1] if type(default) is int else [default * 0.5, default * 1.5] if default else [0.3]


def batch_of(size: int) -> RewardBatch:
    generator = torch.Generator().manual_seed(size)
    sizes = [2 + (3 * k) % 5 for k in range(size)]
    grades = [1.0, 0.25, 1.0, 0.75, 0.0][:size] if size > 2 else [1.0, 0.0]
    lists = [
        {"prompt_ids": [1], "completion_ids": [[5] * n for n in sizes], "grades": own, "key": key}
        for key, own in enumerate((grades, grades[::-1]))
    ]
    batch = collate(lists, pad_id=0)
    mask = batch.completion_mask
    rewards = (torch.rand(mask.shape, generator=generator) - 0.5) * mask
    ratings = torch.rand(len(mask), 2, generator=generator) * 3 + 1.2
    strengths = torch.tensor([2.0, 0.5])
    values = vars(batch) | {"token_rewards": rewards, "attributes": ratings, "strengths": strengths}
    return RewardBatch(**values)


def losses(sections: dict[str, Any], size: int) -> torch.Tensor | None:
    """The losses of a batch and their gradient, as one row of numbers; None where the recipe is refused."""
    tree = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["a"]}} | sections
    try:
        recipe = parse_recipe(tree, origin="test")
    except UserError:
        return None
    batch, loss, generator = batch_of(size), loss_of(recipe), torch.Generator().manual_seed(1)
    if recipe.task == "reward":
        leaf = torch.rand(len(batch.targets), 2, generator=generator).requires_grad_()
        value = loss(leaf, None, batch)
    else:
        shape = batch.targets.shape
        leaf = (-2 * torch.rand(shape, generator=generator) - 0.1).requires_grad_()
        squares = -0.5 * torch.rand(shape, generator=generator)
        reference = -2 * torch.rand(shape, generator=generator) - 0.1
        value = loss(TokenStats(leaf, log_sum_sq_probs=squares), reference, batch, torch.tensor(0.2))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return torch.cat([value.detach(), gradient.flatten()])


def assert_reaches(config: type[BaseModel], field: str, place: Any, *, size: int = 5) -> None:
    """Under every context: the default, and each other value of a field of few values."""
    name = config.model_fields["name"].default
    contexts = [{}] + [
        {other: value} for other in config.model_fields for value in few_values(config, other) if other != "name"
    ]
    contexts += {Attributes: [{"fidelity": 1.0}], TokenReg: [{"static_weight": 0.3}]}.get(config, [])
    changed_somewhere = False
    for context in (c for c in contexts if field not in c):
        before = losses(place({"name": name} | context), size)
        if before is None:
            continue
        for value in other_values(config, field):
            after = losses(place({"name": name} | context | {field: value}), size)
            assert after is None or not torch.equal(after, before), f"{name}.{field}: {value} with {context}"
            changed_somewhere |= after is not None
    assert changed_somewhere, f"{name}.{field} can only be refused"


def fields(configs: Any) -> list[Any]:
    return [
        pytest.param(config, field, id=f"{config.model_fields['name'].default}.{field}")
        for config in configs
        for field in config.model_fields
        if field != "name" and field not in COLUMNS
    ]


@pytest.mark.parametrize(("config", "field"), fields(OBJECTIVES))
def test_of_objectives(config: type[Objective], field: str):
    size = 2 if config.model_fields["name"].default == "apo_down" else 5
    assert_reaches(config, field, lambda own: {"objective": own}, size=size)


@pytest.mark.parametrize(("config", "field"), fields([BradleyTerry, Attributes]))
def test_of_objectives_of_rewards(config, field):
    head = {"task": "reward", "reward": {"outputs": ["a", "b"]}}
    assert_reaches(config, field, lambda own: head | {"objective": own})


@pytest.mark.parametrize(("config", "field"), fields(SCORES))
def test_of_scores(config, field):
    assert_reaches(config, field, lambda own: {"score": own, "objective": "logistic"})


def test_of_the_alpha_divergence():
    assert_reaches(
        AlphaDivergence, "alpha", lambda own: {"score": {"name": "log_ratio", "divergence": own}, "objective": "hinge"}
    )


@pytest.mark.parametrize(("config", "field"), fields([TokenReg]))
def test_of_the_regularizer(config, field):
    assert_reaches(config, field, lambda own: {"objective": "lambda", "regularizer": own})


def test_of_token_weights():
    assert_reaches(Tgdpo, "alpha", lambda own: {"objective": "logistic", "token_weights": own})


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"score": {"beta": 0.3}, "objective": ["aft", "sft"]}, "score: no objective reads it"),
        ({"score": {"beta": 0.3}, "task": "sft"}, "score: no objective reads it"),
        ({"score": "likelihood", "objective": "logistic", "dpop": 5.0}, "dpop: there is no reference to fall below"),
        ({"task": "sft", "wpo": "clamped"}, "wpo: `task: sft` weighs every list the same"),
        (
            {"objective": "logistic", "token_rewards": {"name": "contrast", "worse": "bad {prompt}"}},
            "token_rewards: set `regularizer`",
        ),
        ({"objective": {"name": "robust_softmax", "weakest": 6}}, "weakest: 6 is above `strongest`, 5; exchange them"),
        ({"task": "reward", "objective": "softmax", "z_penalty": 1e-4}, "z_penalty, .* about a policy's log-prob"),
        ({"objective": {"name": "aft", "variant": "plain", "margin": 0.3}}, "margin: `plain` has none"),
        (
            {"task": "reward", "objective": {"name": "attributes", "deviation": 0.3}},
            "deviation and deviation_field are read by",
        ),
    ],
)
def test_what_cannot_reach_the_loss_is_refused(sections, sentence):
    tree = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["a"]}} | sections
    with pytest.raises(UserError, match=sentence):
        parse_recipe(tree, origin="test")
