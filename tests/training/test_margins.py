"""A row's `margin`: read in every objective that has a place for it, refused by the others, never ignored."""

import json
from math import exp, log

import pytest
import torch

from align.errors import UserError
from align.losses.list_loss import build_loss
from align.objectives import OBJECTIVES
from align.objectives.lambda_loss import Lambda
from align.objectives.objective import OBJECTIVE
from align.objectives.pairwise import Logistic
from align.objectives.scores import LogRatio
from align.objectives.token_reg import TokenReg
from align.packing.batch import collate
from align.runs.build import prepare
from align.training.train import train
from align.types import TokenStats

PAIR = {"prompt": "w5 w4", "chosen": " w3 w3", "rejected": " w6"}
LIST = {"completions": [" w3 w3", " w6", " w7"], "rewards": [2.0, 1.0, 0.0]}


def write(path, *lines: dict) -> dict:
    path.write_text("".join(json.dumps({"prompt": f"w{10 + i}", **line}) + "\n" for i, line in enumerate(lines)))
    return {"sources": [str(path)], "eval_fraction": 0}


def pairs(*margins, row=PAIR) -> list[dict]:
    return [{**row, "prompt": f"w{10 + i}"} | ({} if m is None else {"margin": m}) for i, m in enumerate(margins)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_reads_it_or_refuses_it_by_name(make_recipe, tmp_path, name):
    row = LIST if OBJECTIVE.classes[name].properties.min_list_size > 2 else PAIR
    data = write(tmp_path / "rows.jsonl", *pairs(None, 2.5, 0, 1, row=row))
    recipe = make_recipe(objective={"name": name}, data=data)
    if OBJECTIVE.classes[name]().takes_margins:
        prepared = prepare(recipe)
        assert prepared.train["margin"][:] == [0.0, 2.5, 0.0, 1.0]
        assert not any(source.columns_not_read for source in prepared.audit.sources)
        assert prepared.audit.margins == 2
        return
    with pytest.raises(UserError, match=f"row 2, field margin: {name} has no place.*data.ignore=\\[margin\\]"):
        prepare(recipe)
    ignored = prepare(make_recipe(objective={"name": name}, data=data | {"ignore": ["margin"]}))
    assert "margin" not in ignored.train.column_names


def test_beside_an_objective_that_reads_it_another_need_not(make_recipe, tmp_path):
    data = write(tmp_path / "rows.jsonl", *pairs(1, 2))
    assert (
        "margin" in prepare(make_recipe(objective=[{"name": "lambda"}, {"name": "sft"}], data=data)).train.column_names
    )


def test_sft_counts_it_among_what_it_does_not_read(make_recipe, tmp_path):
    data = write(tmp_path / "rows.jsonl", *pairs(1, 2))
    recipe = make_recipe(task="sft", objective=[], data=data)
    assert prepare(recipe).audit.sources[0].columns_not_read == {"margin": 2}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "row 2, field margin: -1; give 0 or more"),
        ("wide", "row 2, field margin: text, not a number; give a finite number"),
        ([1.0], "row 2, field margin: a list, not a number"),
    ],
)
def test_what_is_no_margin_is_refused_with_its_row(make_recipe, tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        prepare(make_recipe(objective={"name": "logistic"}, data=write(tmp_path / "rows.jsonl", *pairs(1, value))))


def test_the_first_loss_of_a_run_has_it(make_recipe, tmp_path):
    """Implicit rewards are all 0 then: log(1 + e^m), its mean over the rows; packed, padded and in parts."""
    data = write(tmp_path / "rows.jsonl", *pairs(None, 2.5, 0.5, 1))
    expected = sum(log(1 + exp(m)) for m in (0.0, 2.5, 0.5, 1.0)) / 4
    for name, how in (("packed", {}), ("padded", {"packing": False}), ("parts", {"tokens_per_batch": 1})):
        result = train(
            make_recipe(name, objective={"name": "logistic"}, data=data, train={"steps": 1, "lists_per_step": 4} | how)
        )
        (line,) = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
        assert line["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", [Logistic(margin=0.3), Lambda()])
def test_t_reg_weighs_a_pair_by_how_far_it_is_from_its_margin(objective):
    """alpha * Delta * sigmoid(s_worse - s_better + gamma + m) * (L_better + L_worse)."""
    example = {"prompt_ids": [1], "completion_ids": [[3, 4], [5]], "grades": [1.0, 0.0], "margin": 1.7}
    batch = collate([example | {"token_rewards": [[0.2, -0.1], [0.4]]}], pad_id=0)
    policy, reference = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]), torch.tensor([[-1.5, -1.0], [-1.0, 0.0]])
    beta, alpha = 0.5, 0.25
    score, plain = LogRatio(beta=beta), build_loss(LogRatio(beta=beta), [objective])
    found = build_loss(score, [objective], regularizer=TokenReg(alpha=alpha))(TokenStats(policy), reference, batch)
    a, b = beta * (-3.0 - -2.5), beta * (-0.5 - -1.0)
    weight = 1 / (1 + exp(-(b - a + getattr(objective, "margin", 0.0) + 1.7)))
    terms = -beta * (0.2 * -1.0 - 0.1 * -2.0) - beta * 0.4 * -0.5
    delta = objective.pair_weights(torch.tensor([[a, b]]), batch.grades, batch.list_mask)[0, 0, 1].item()
    base = plain(TokenStats(policy), reference, batch).item()
    assert found.item() == pytest.approx(base + alpha * delta * weight * terms, abs=1e-6)
    none = build_loss(score, [objective])(TokenStats(policy), reference, collate([example | {"margin": 0.0}], pad_id=0))
    assert abs(none.item() - base) > 0.1


def test_a_function_of_ones_own_gets_it_where_it_takes_it(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch.nn.functional as F\n"
        "from align.objectives.lists import over_ordered_pairs\n"
        "def plain(scores, grades, list_mask):\n"
        "    return over_ordered_pairs(lambda d: F.softplus(-d), scores, grades, list_mask)\n"
        "def wide(scores, grades, list_mask, *, margins=None):\n"
        "    return over_ordered_pairs(lambda d: F.softplus(-d), scores, grades, list_mask, margins)\n"
    )
    data = write(tmp_path / "rows.jsonl", *pairs(2, 1))
    own = {"name": "python", "function": "own.py:wide"}
    result = train(make_recipe(objective=own, data=data, train={"steps": 1}))
    (line,) = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx((log(1 + exp(2.0)) + log(1 + exp(1.0))) / 2, abs=1e-6)
    with pytest.raises(UserError, match="row 1, field margin: python has no place"):
        prepare(make_recipe("other", objective=own | {"function": "own.py:plain"}, data=data))


def test_a_reward_model_of_lists_reads_it_or_refuses_it_and_one_of_ratings_counts_it(make_recipe, tmp_path):
    data = write(tmp_path / "rows.jsonl", *pairs(1, 2))
    assert "margin" in prepare(make_recipe(task="reward", objective={"name": "list_mle"}, data=data)).train.column_names
    with pytest.raises(UserError, match="field margin: pointwise_mse has no place"):
        prepare(make_recipe(task="reward", objective={"name": "pointwise_mse"}, data=data))
    rated = prepare(make_recipe(task="reward", objective={"name": "attributes"}, data=data))
    assert rated.audit.sources[0].columns_not_read == {"margin": 2}
