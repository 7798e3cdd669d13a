"""The tables that name objectives agree with one another, with the functions and with TRL; what is refused and how."""

import inspect
from typing import Literal, get_args

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from align.errors import UserError
from align.objectives import (
    OBJECTIVE,
    OBJECTIVES,
    PROPERTIES,
    REFUSED,
    SCORE,
    SCORES,
    TRL_NAMES,
    Objective,
    ObjectiveConfig,
    ScoreConfig,
    check_grades,
    check_score,
)
from align.objectives.base import GIVEN
from align.objectives.names import trl_names
from align.registry import Registry
from align.section import key_docs

CONFIGS = OBJECTIVE.classes
AN_OBJECTIVE, A_SCORE = TypeAdapter(ObjectiveConfig), TypeAdapter(ScoreConfig)


def test_a_recipe_takes_every_registered_class_and_one_of_the_users_own():
    for config, registry in ((ObjectiveConfig, OBJECTIVE), (ScoreConfig, SCORE)):
        taken = [cls.model_fields["name"].default for cls in get_args(get_args(config)[0])]
        assert taken == [*registry.classes, "python"]
        assert all(name == cls.model_fields["name"].default for name, cls in registry.classes.items())
    assert all(OBJECTIVES[name] is cls.formula for name, cls in CONFIGS.items())


def test_a_name_that_is_taken_is_refused_where_it_is_registered():
    registry = Registry("objective")
    registry.add(CONFIGS["hinge"])

    class Twin(Objective):
        name: Literal["hinge"] = "hinge"

    with pytest.raises(ValueError, match="two classes are the objective `hinge`.*Hinge.*Twin"):
        registry.add(Twin)
    assert registry.classes == {"hinge": CONFIGS["hinge"]}


def test_a_name_of_trl_that_two_claim_is_refused(monkeypatch):
    monkeypatch.setattr(CONFIGS["hinge"], "trl", {"sigmoid": "{objective: {name: hinge}}"})
    with pytest.raises(ValueError, match="two objectives stand for TRL's sigmoid"):
        trl_names()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fields_are_the_keyword_arguments_with_their_defaults(name):
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("beta", *GIVEN)}
    fields = {key: field.default for key, field in CONFIGS[name].model_fields.items()}
    assert fields.pop("name") == name
    assert fields.pop("weight") == 1.0
    del fields["score"]
    assert fields == keywords


@pytest.mark.parametrize("name", SCORES)
def test_score_fields_are_the_keyword_arguments_with_their_defaults(name):
    parameters = inspect.signature(SCORES[name]).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert A_SCORE.validate_python({"name": name}).model_dump(exclude={"name"}) == keywords


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_field_explains_itself(name):
    assert CONFIGS[name].__doc__
    assert CONFIGS[name].model_fields.keys() - {"name"} == key_docs(CONFIGS[name]).keys() - {"name"}


def test_a_required_score_is_the_only_one_that_the_recipe_takes():
    assert PROPERTIES["odds_ratio"].score == AN_OBJECTIVE.validate_python({"name": "odds_ratio"}).score.name
    for score in (None, {"name": "log_ratio"}):
        with pytest.raises(ValidationError, match="score"):
            AN_OBJECTIVE.validate_python({"name": "odds_ratio", "score": score})


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "logistic", "label_smoothing": 0.5},
        {"name": "exo", "label_smoothing": 0.0},
        {"name": "discopop", "temperature": 2.0},
        {"name": "lambda", "log_base": 1.0},
        {"name": "lambda", "reduction": "mean"},
        {"name": "pl_policy_gradient", "samples": 1},
        {"name": "hinge", "weight": 0.0},
        {"name": "hinge", "margin": 1.0},
    ],
    ids=str,
)
def test_impossible_options_are_refused(keys):
    with pytest.raises(ValidationError, match=next(key for key in keys if key != "name")):
        AN_OBJECTIVE.validate_python(keys)


TRL_DPO = {
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
}
TRL_OTHERS = {"kto", "apo_zero_unpaired", "simpo", "alphapo", "orpo", "cpo_sigmoid", "cpo_hinge", "cpo_ipo"}


def test_every_loss_of_trl_has_a_recipe_or_a_reason():
    assert set(TRL_NAMES) | set(REFUSED) == TRL_DPO | TRL_OTHERS
    assert not set(TRL_NAMES) & set(REFUSED)
    assert not set(OBJECTIVES) & set(REFUSED)


@pytest.mark.parametrize("name", TRL_NAMES)
def test_what_stands_for_a_trl_name_is_a_valid_recipe(name):
    keys = yaml.safe_load(TRL_NAMES[name])
    objectives = keys["objective"] if isinstance(keys["objective"], list) else [keys["objective"]]
    assert set(keys) <= {"objective", "score"}
    assert [AN_OBJECTIVE.validate_python(each).name for each in objectives]
    assert A_SCORE.validate_python(keys.get("score", {"name": "log_ratio"}))


def test_a_refused_name_says_why():
    with pytest.raises(UserError, match="sorts across the batch.*`logistic`"):
        check_grades("aot", torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "grades", "message"),
    [
        ("pointwise_sigmoid", [0.5, 1.5], "from 0 to 1, but completion 1 of list 0 has grade 1.5.*win_probability"),
        ("softmax", [-0.5, 1.0], "of 0 or more, but completion 0 of list 0 has grade -0.5"),
        ("lambda", [100.0, 1.0], "from -64 to 64"),
        ("pl_policy_gradient", [-1.0, 1.0], "from 0 to 64"),
        ("logistic", [float("inf"), 1.0], "finite"),
        ("logistic", [float("nan"), 1.0], "finite"),
        ("apo_down", [0.0, 1.0, 2.0], "pairs only, but list 0 has 3.*best_worst"),
        ("logistic", [1.0], "2 completions or more, but list 0 has 1.*kto"),
        ("spherical", [1.0, 0.0], "3 completions or more, but list 0 has 2; set `data.select: all`, .*`logistic`"),
    ],
)
def test_grades_that_an_objective_cannot_use_are_refused(name, grades, message):
    with pytest.raises(UserError, match=message):
        check_grades(name, torch.tensor([grades]), torch.ones(1, len(grades), dtype=torch.bool))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_good_lists_pass_whatever_the_padding_holds(name):
    grades = torch.tensor([[0.0, 1.0, 0.5, float("nan")], [0.3, 0.2, 0.2, -1e9]])
    size = max(2, PROPERTIES[name].min_list_size)
    check_grades(name, grades[:, 4 - size - 1 :], torch.tensor([[True] * size + [False]] * 2))


@pytest.mark.parametrize("name", ["nca", "kto", "pointwise_mse"])
def test_a_divergence_is_refused_where_single_scores_count(name):
    with pytest.raises(UserError, match="divergence `js`.*`logistic`"):
        check_score(name, A_SCORE.validate_python({"name": "log_ratio", "divergence": {"name": "js"}}))


def test_another_score_than_the_needed_one_is_refused():
    with pytest.raises(UserError, match="`odds_ratio` is defined for the score `likelihood_mean`, not `log_ratio`"):
        check_score("odds_ratio", A_SCORE.validate_python({"name": "log_ratio"}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_plain_scores_fit(name):
    for score in SCORES if PROPERTIES[name].score is None else [PROPERTIES[name].score]:
        check_score(name, A_SCORE.validate_python({"name": score}))
    if PROPERTIES[name].shift_invariant and PROPERTIES[name].score is None:
        check_score(name, A_SCORE.validate_python({"name": "log_ratio", "divergence": {"name": "forward_kl"}}))
