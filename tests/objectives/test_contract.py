"""What every objective promises, for all of them: formula, padding, order, gradients, declared properties."""

import inspect

import pytest
import torch
from by_hand import BY_HAND
from torch import Tensor
from torch.testing import assert_close

from align.objectives import OBJECTIVE, OBJECTIVES, PROPERTIES

CASES = [
    *((name, {}) for name in OBJECTIVES),
    ("aft", {"variant": "plain"}),
    ("aft", {"variant": "detached"}),
    ("aft", {"variant": "boundary", "margin": 0.3}),
    ("apo_zero_unpaired", {"desirable_weight": 2.0, "undesirable_weight": 0.5}),
    ("decoupled_softmax", {"negatives": "grades"}),
    ("discopop", {"temperature": 0.7}),
    ("exo", {"label_smoothing": 0.2}),
    ("exo_list", {"temperature": 0.3}),
    ("kto", {"desirable_weight": 2.0, "undesirable_weight": 0.5}),
    ("lambda", {"log_base": 2.718281828459045}),
    ("lambda", {"reduction": "list_mean"}),
    ("lambda", {"reduction": "pair_mean"}),
    ("logistic", {"label_smoothing": 0.2, "margin": 0.4}),
    ("logistic", {"label_smoothing": 0.2, "margin": 0.4, "link": 0.7}),
    ("logistic", {"link": 1.0}),
    ("nca", {"temperature": 0.3}),
    ("pl_policy_gradient", {"samples": 3, "cutoff": 2, "seed": 5}),
    ("robust", {"label_smoothing": 0.3}),
    ("robust_softmax", {"rho": 0.5, "weakest": 0.9, "strongest": 1.4}),
    ("robust_softmax", {"weakest": 2.0, "strongest": 2.0}),
    ("soft_top_k", {"k": 3, "temperature": 0.4}),
    ("softmax", {"k": 2}),
    ("softmax", {"normaliser": "softplus"}),
    ("softmax", {"normaliser": "stablemax"}),
    ("spherical", {"slope": 2.5, "target": 0.3}),
]
SUPPLIED = {"beta": 0.2, "baseline": 0.3}
"""What the trainer gives to the functions that take it."""
DETACHED = {"aft"}
"""Part of the value is constant in the backward pass, so finite differences see something else; own tests below."""

parametrised = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: str(x) if x else "-")


MARGINS = (
    "aft",
    "apo_down",
    "decoupled_softmax",
    "discopop",
    "exo",
    "hinge",
    "lambda",
    "list_mle",
    "logistic",
    "odds_ratio",
)
MARGINS += ("partial_order", "robust", "softmax", "squared")
"""Objectives of pairs and lists that a row's margin means something to."""


def call(
    name: str, options: dict, scores: Tensor, grades: Tensor, list_mask: Tensor, margins: Tensor | None = None
) -> Tensor:
    function = OBJECTIVES[name]
    takes = inspect.signature(function).parameters
    above = scores - scores.masked_fill(~list_mask, torch.inf).amin(dim=1, keepdim=True)
    keys = torch.round(1000 * above) * 8 + 4 * grades  # a completion keeps its draws wherever it stands
    supplied = SUPPLIED | {"keys": keys.detach().nan_to_num(0.0, 0.0, 0.0).long(), "margins": margins}
    return function(scores, grades, list_mask, **options, **{k: v for k, v in supplied.items() if k in takes})


def random_lists(name: str, rows: int = 24) -> list[tuple[Tensor, Tensor]]:
    """Lists of different lengths; grades are quarters, so some are tied, and so are some scores."""
    low, high = PROPERTIES[name].min_list_size, PROPERTIES[name].max_list_size or 5
    lists = []
    for row in range(rows):
        size = low + row % (high - low + 1)
        scores = torch.randn(size, dtype=torch.float64)
        if row % 3 == 0:
            scores = scores.round()
        if PROPERTIES[name].score == "likelihood_mean":
            scores = -scores.abs() - 0.1
        lists.append((scores, torch.randint(0, 5, (size,)) / 4.0))
    return lists


def padded(lists: list[tuple[Tensor, Tensor]], width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """The lists as tensors, at random places among NaN."""
    scores, grades = torch.full((2, len(lists), width), torch.nan, dtype=torch.float64)
    list_mask = torch.zeros(len(lists), width, dtype=torch.bool)
    for row, (s, g) in enumerate(lists):
        places = torch.randperm(width)[: len(s)].sort().values
        scores[row, places], grades[row, places], list_mask[row, places] = s, g.double(), True
    return scores, grades, list_mask


def full(lists: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(s[None], g.double()[None], torch.ones(1, len(s), dtype=torch.bool)) for s, g in lists]


@parametrised
def test_is_the_formula_written_out(name, options):
    if name == "pl_policy_gradient":
        pytest.skip("drawn at random; test_policy_gradient.py enumerates all rankings")
    lists = random_lists(name)
    supplied = {k: v for k, v in SUPPLIED.items() if k in inspect.signature(BY_HAND[name]).parameters}
    expected = [BY_HAND[name](s.tolist(), g.tolist(), **options, **supplied) for s, g in lists]
    assert_close(call(name, options, *padded(lists)), torch.tensor(expected, dtype=torch.float64))


def test_the_objectives_that_have_a_place_for_a_margin():
    """TRL's RewardTrainer has it in the logistic loss alone; nobody has it in another."""
    takes = {name for name, function in OBJECTIVES.items() if "margins" in inspect.signature(function).parameters}
    assert takes == set(MARGINS)


with_margins = pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in MARGINS])


@with_margins
def test_with_a_margin_it_is_the_formula_written_out(name, options):
    """A worse completion counts as if it scored m more; margins of 0 are none, and differ from row to row."""
    lists = random_lists(name)
    margins = (torch.arange(len(lists), dtype=torch.float64) % 4) / 3
    supplied = {k: v for k, v in SUPPLIED.items() if k in inspect.signature(BY_HAND[name]).parameters}
    expected = [
        BY_HAND[name](s.tolist(), g.tolist(), **options, **supplied, m=m)
        for (s, g), m in zip(lists, margins.tolist(), strict=True)
    ]
    found = call(name, options, *padded(lists), margins)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert (found != call(name, options, *padded(lists))).any()
    assert_close(call(name, options, *padded(lists), 0 * margins), call(name, options, *padded(lists)))


@with_margins
@pytest.mark.parametrize("fill", [float("nan"), 9.0, -9.0])
def test_with_a_margin_padding_changes_neither_value_nor_gradient(name, options, fill):
    lists = random_lists(name)
    margins = torch.rand(len(lists), dtype=torch.float64)
    scores, grades, list_mask = padded(lists)
    scores, grades = scores.where(list_mask, fill).requires_grad_(), grades.where(list_mask, fill)
    losses = call(name, options, scores, grades, list_mask, margins)
    gradient = torch.autograd.grad(losses.sum(), scores)[0]
    assert (gradient[~list_mask] == 0).all()
    for row, (s, g, m) in enumerate(full(lists)):
        s.requires_grad_()
        alone = call(name, options, s, g, m, margins[row : row + 1])
        assert_close(losses[row : row + 1], alone)
        assert_close(gradient[row, list_mask[row]], torch.autograd.grad(alone.sum(), s)[0][0])


@with_margins
def test_with_a_margin_gradcheck(name, options):
    if name in DETACHED and options.get("variant") != "plain":
        pytest.skip("part of the value is constant in the backward pass")
    for s, g, m in full(random_lists(name, rows=8)):
        jitter, margin = s - torch.rand_like(s) * 0.1, torch.full((1,), 0.37, dtype=torch.float64)
        call_ = lambda x, g=g, m=m, margin=margin: call(name, options, x, g, m, margin)  # noqa: E731
        assert torch.autograd.gradcheck(call_, jitter.requires_grad_())


@with_margins
def test_a_list_of_ties_has_no_pair_for_a_margin(name, options):
    if not PROPERTIES[name].zero_when_tied:
        pytest.skip("it learns from ties too")
    lists = [(s, torch.full_like(s, 0.5)) for s, _ in random_lists(name)]
    scores, grades, list_mask = padded(lists)
    losses = call(name, options, scores.requires_grad_(), grades, list_mask, torch.ones(len(lists)))
    assert (losses == 0).all() and (torch.autograd.grad(losses.sum(), scores)[0] == 0).all()


@parametrised
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gives_one_loss_per_list_in_the_dtype_of_the_scores(name, options, dtype):
    """Grades stay float64: a tie is one of the rows' own numbers."""
    scores, grades, list_mask = padded(random_lists(name))
    losses = call(name, options, scores.to(dtype), grades, list_mask)
    assert losses.shape == (len(scores),)
    assert losses.dtype == dtype
    assert_close(losses.double(), call(name, options, scores, grades, list_mask), rtol=1e-4, atol=1e-4)


@parametrised
@pytest.mark.parametrize("fill", [float("nan"), 9.0, -9.0])
def test_padding_changes_neither_value_nor_gradient(name, options, fill):
    """NaN alone would not do: it compares false with everything and so hides a pair mask that is missing."""
    lists = random_lists(name)
    scores, grades, list_mask = padded(lists)
    scores, grades = scores.where(list_mask, fill), grades.where(list_mask, fill)
    scores.requires_grad_()
    losses = call(name, options, scores, grades, list_mask)
    gradient = torch.autograd.grad(losses.sum(), scores)[0]
    assert (gradient[~list_mask] == 0).all()
    for row, (s, g, m) in enumerate(full(lists)):
        s.requires_grad_()
        alone = call(name, options, s, g, m)
        assert_close(losses[row : row + 1], alone)
        assert_close(gradient[row, list_mask[row]], torch.autograd.grad(alone.sum(), s)[0][0])


@parametrised
def test_the_order_of_the_row_does_not_matter(name, options):
    for s, g, m in full(random_lists(name)):
        order = torch.randperm(s.shape[1])
        assert_close(call(name, options, s[:, order], g[:, order], m), call(name, options, s, g, m))


@parametrised
def test_an_unfilled_list_is_inert(name, options):
    scores = torch.full((1, 3), torch.nan, requires_grad=True)
    losses = call(name, options, scores, torch.full((1, 3), torch.nan), torch.zeros(1, 3, dtype=torch.bool))
    assert losses.item() == 0
    assert (torch.autograd.grad(losses.sum(), scores)[0] == 0).all()


@parametrised
def test_gradcheck(name, options):
    if name in DETACHED and options.get("variant") != "plain":
        pytest.skip("part of the value is constant in the backward pass; test_aft.py writes the gradient out")
    for s, g, m in full(random_lists(name, rows=8)):
        jitter = s - torch.rand_like(s) * 0.1  # no two scores tied, none at a kink
        assert torch.autograd.gradcheck(lambda x, g=g, m=m: call(name, options, x, g, m), jitter.requires_grad_())


@parametrised
def test_is_shift_invariant_where_declared_and_nowhere_else(name, options):
    scores, grades, list_mask = padded([(s, g) for s, g in random_lists(name) if g.max() > g.min()])
    moved = call(name, options, scores - 0.7, grades, list_mask)
    stayed = torch.isclose(moved, call(name, options, scores, grades, list_mask), rtol=1e-7, atol=1e-9)
    assert stayed.all() if OBJECTIVE.classes[name](**options).holds.shift_invariant else not stayed.all()


@parametrised
@pytest.mark.parametrize("grade", [0.0, 0.5, 1.0])
def test_a_list_of_ties_is_silent_where_declared(name, options, grade):
    lists = [(s, torch.full_like(s, grade)) for s, _ in random_lists(name)]
    scores, grades, list_mask = padded(lists)
    losses = call(name, options, scores.requires_grad_(), grades, list_mask)
    gradient = torch.autograd.grad(losses.sum(), scores)[0]
    if PROPERTIES[name].zero_when_tied:
        assert (losses == 0).all()
        assert (gradient == 0).all()
    elif grade > 0:  # `softmax` has nothing to learn from where all grades are 0
        assert (gradient != 0).any()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("pair", [(1.0, 0.0), (0.25, 0.75)])
def test_is_a_multiple_of_dpo_on_pairs_where_declared_and_nowhere_else(name, pair):
    scores = torch.randn(16, 2, dtype=torch.float64)
    if PROPERTIES[name].score == "likelihood_mean":
        scores = -scores.abs() - 0.1
    grades = torch.tensor(pair, dtype=torch.float64).expand(16, 2)
    better, worse = (0, 1) if pair[0] > pair[1] else (1, 0)
    dpo = -torch.nn.functional.logsigmoid(scores[:, better] - scores[:, worse])
    ratio = call(name, {}, scores, grades, grades >= 0) / dpo
    if PROPERTIES[name].dpo_at_two:
        assert_close(ratio, ratio[:1].expand(16))
        assert ratio[0] > 0
    elif name != "softmax" or pair != (1.0, 0.0):  # with all weight on one completion the cross-entropy is DPO
        assert ratio.std() > 1e-3


@parametrised
def test_huge_scores_stay_finite(name, options):
    for s, g, m in full(random_lists(name)):
        scores = (1e4 * s).float().requires_grad_()
        losses = call(name, options, scores, g.float(), m)
        assert losses.isfinite().all()
        assert torch.autograd.grad(losses.sum(), scores)[0].isfinite().all()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if PROPERTIES[name].grades == "exponent"])
def test_grades_at_the_edge_of_the_domain_stay_finite(name):
    scores, grades = torch.randn(1, 3, requires_grad=True), torch.tensor([[64.0, -64.0, 0.0]])
    assert torch.autograd.grad(call(name, {}, scores, grades, grades < 99).sum(), scores)[0].isfinite().all()
