"""Lists of which only some tokens are learnt, against float64: every token's value by a loop over the model's own
logits, every loss by its formula in plain sums."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.losses.list_loss import build_loss, likelihood_loss
from align.model.adapters import Full
from align.model.config import PolicySection
from align.model.forward import TokenScorer
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.objectives.divergence import ForwardKL
from align.objectives.listwise import ListMle, Softmax
from align.objectives.pairwise import Logistic
from align.objectives.pointwise import Kto, Sft
from align.objectives.scores import (
    LengthDesensitised,
    Likelihood,
    LikelihoodMean,
    LogRatio,
    LogRatioMean,
)
from align.objectives.token_reg import Tgdpo, TokenReg

BETA, BASELINE = 0.3, 0.4
SHAPES = ((3, (7, 4)), (5, (6, 9, 3, 5, 8)), (1, (2, 11)), (4, (4, 4, 10, 1, 6)))
"""Tokens of the prompt and of each completion: K = 2 and 5."""


def trajectories(*, weighted: bool) -> list[dict]:
    """Learnt is a run in the middle, the second half, every other token or the first, by the completion's number."""
    generator = torch.Generator().manual_seed(11)

    def numbers(*size: int) -> list:
        return torch.rand(*size, generator=generator).tolist()

    def ids(length: int) -> list[int]:
        return torch.randint(3, 40, (length,), generator=generator).tolist()

    chosen = (lambda n: range(n // 3, n // 2 + 1), lambda n: range(n // 2, n), lambda n: range(0, n, 2), lambda n: [0])
    lists = []
    for number, (prompt, sizes) in enumerate(SHAPES):
        places = [list(chosen[(number + k) % len(chosen)](n)) for k, n in enumerate(sizes)]
        example = {"prompt_ids": ids(prompt), "completion_ids": [ids(n) for n in sizes], "learn_at": places}
        example |= {"grades": [round(g, 3) for g in numbers(len(sizes))], "id": str(number)}
        example["token_rewards"] = [[r - 0.5 for r in numbers(len(at))] for at in places]
        if weighted:  # a message's tokens weigh the same
            example["token_weights"] = [[0.5 if t < len(at) / 2 else 1.0 for t in range(len(at))] for at in places]
        lists.append(example)
    assert any(len(at) < len(ids) for e in lists for at, ids in zip(e["learn_at"], e["completion_ids"], strict=True))
    return lists


@pytest.fixture(scope="module")
def policies(tiny_policy):
    """A padded and a packed policy that has moved off its reference, and both models in float64."""
    found = {}
    for packing in (True, False):
        section = PolicySection(model=str(tiny_policy), adapter=Full())
        policy = load_policy(section, LoadOptions(packing=packing))
        assert policy.packing == packing
        torch.manual_seed(6)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
        found["packed" if packing else "padded"] = policy
    reference = AutoModelForCausalLM.from_pretrained(tiny_policy).double()
    moved = AutoModelForCausalLM.from_pretrained(tiny_policy).double()
    moved.load_state_dict(policy.model.state_dict())
    return SimpleNamespace(**found, moved=moved, initial=reference)


def by_hand(models, example: dict) -> list[SimpleNamespace]:
    """Of every completion the learnt tokens' lp, ref and log sum p^2, their rewards and weights."""
    found = []
    for k, (ids, at) in enumerate(zip(example["completion_ids"], example["learn_at"], strict=True)):
        row, start = torch.tensor([[*example["prompt_ids"], *ids]]), len(example["prompt_ids"])
        own, other = (model(row).logits[0].log_softmax(-1) for model in (models.moved, models.initial))
        weights = example["token_weights"][k] if "token_weights" in example else [1.0] * len(at)
        found.append(
            SimpleNamespace(
                lp=torch.stack([own[start + p - 1, ids[p]] for p in at]),
                ref=torch.stack([other[start + p - 1, ids[p]] for p in at]).detach(),
                squares=torch.stack([(2 * own[start + p - 1]).logsumexp(-1) for p in at]).detach(),
                rho=torch.tensor(example["token_rewards"][k], dtype=torch.float64),
                w=torch.tensor(weights, dtype=torch.float64),
            )
        )
    return found


def pairs(grades: list[float]) -> list[tuple[int, int]]:
    return [(i, j) for i, a in enumerate(grades) for j, b in enumerate(grades) if a > b]


def logistic(scores: list, grades: list[float], margin: float = 0.0):
    return sum(-torch.nn.functional.logsigmoid(scores[i] - scores[j] - margin) for i, j in pairs(grades))


def list_mle(scores: list, grades: list[float]):
    order = sorted(range(len(grades)), key=lambda k: -grades[k])
    return sum(torch.stack([scores[k] for k in order[n:]]).logsumexp(0) - scores[order[n]] for n in range(len(order)))


def softmax(scores: list, grades: list[float]):
    values = torch.stack(scores).log_softmax(0)
    return -sum(g / sum(grades) * v for g, v in zip(grades, values, strict=True))


def log_ratios(completions: list) -> list:
    return [BETA * (c.w * (c.lp - c.ref)).sum() for c in completions]


def mean_logprobs(completions: list, beta: float) -> list:
    return [beta * (c.w * c.lp).sum() / c.w.sum() for c in completions]


def desensitised(completions: list, alpha: float) -> list:
    shortest = min(len(c.lp) for c in completions)
    return [
        BETA * sum((1.0 if t < shortest else alpha) * c.w[t] * (c.lp[t] - c.ref[t]) for t in range(len(c.lp)))
        for c in completions
    ]


def forward_kl_mean(completions: list) -> list:
    """The link of the forward KL, 1 - 1 / u, of the weighted ratio's sum; then per weight."""
    return [BETA * (1 - torch.exp(-(c.w * (c.lp - c.ref)).sum())) / c.w.sum() for c in completions]


def wpo(completions: list, grades: list[float]):
    u = [(c.w * (c.lp - c.squares)).sum() / c.w.sum() for c in completions]
    weight = torch.exp(2 * sum(u) / len(u)).detach().clamp(max=1.0)
    return weight * logistic(log_ratios(completions), grades)


def t_reg(completions: list, grades: list[float], scores: list, terms: list, alpha: float = 0.25):
    extra = sum(torch.sigmoid(scores[j] - scores[i]).detach() * (terms[i] + terms[j]) for i, j in pairs(grades))
    return logistic(scores, grades) + alpha * extra


def t_reg_sum(completions: list, grades: list[float]):
    return t_reg(
        completions, grades, log_ratios(completions), [-BETA * (c.rho * c.w * c.lp).sum() for c in completions]
    )


def t_reg_mean(completions: list, grades: list[float]):
    terms = [-2.0 * (c.rho * c.w * c.lp).sum() / c.w.sum() for c in completions]
    return t_reg(completions, grades, mean_logprobs(completions, 2.0), terms)


def tgdpo(completions: list, grades: list[float], alpha: float = 0.5):
    scores = []
    for c, grade in zip(completions, grades, strict=True):
        others = [g for g in grades if g != grade]
        place = (sum(g < grade for g in others) - sum(g > grade for g in others)) / len(others)
        scores.append(BETA * (c.w * (1 + alpha * place * c.rho) * (c.lp - c.ref)).sum())
    return logistic(scores, grades)


def kto(completions: list, grades: list[float]):
    signs = [1 if grade > 0.5 else -1 for grade in grades]
    values = zip(log_ratios(completions), signs, strict=True)
    return sum(1 - torch.sigmoid(sign * (score - BETA * BASELINE)) for score, sign in values)


RATIO = LogRatio(beta=BETA)
CASES: dict[str, tuple[Callable, Callable]] = {
    "sigmoid": (lambda: build_loss(RATIO, [Logistic()]), lambda c, g: logistic(log_ratios(c), g)),
    "list_mle": (lambda: build_loss(RATIO, [ListMle()]), lambda c, g: list_mle(log_ratios(c), g)),
    "softmax": (lambda: build_loss(RATIO, [Softmax()]), lambda c, g: softmax(log_ratios(c), g)),
    "LD-DPO": (
        lambda: build_loss(LengthDesensitised(beta=BETA, alpha=0.25), [Logistic()]),
        lambda c, g: logistic(desensitised(c, 0.25), g),
    ),
    "mean, forward KL": (
        lambda: build_loss(LogRatioMean(beta=BETA, divergence=ForwardKL()), [Logistic()]),
        lambda c, g: logistic(forward_kl_mean(c), g),
    ),
    "WPO": (lambda: build_loss(RATIO, [Logistic()], wpo="clamped"), wpo),
    "T-REG": (lambda: build_loss(RATIO, [Logistic()], regularizer=TokenReg()), t_reg_sum),
    "T-REG of means": (
        lambda: build_loss(LikelihoodMean(beta=2.0), [Logistic()], regularizer=TokenReg()),
        t_reg_mean,
    ),
    "TGDPO": (lambda: build_loss(RATIO, [Logistic()], token_weights=Tgdpo()), tgdpo),
    "KTO": (lambda: build_loss(RATIO, [Kto()]), kto),
    "SimPO": (
        lambda: build_loss(LikelihoodMean(beta=2.0), [Logistic(margin=0.5)]),
        lambda c, g: logistic(mean_logprobs(c, 2.0), g, margin=0.5),
    ),
    "CPO": (
        lambda: build_loss(Likelihood(beta=BETA), [Logistic(), Sft(weight=0.5, score=LikelihoodMean(beta=1.0))]),
        lambda c, g: logistic([BETA * (x.w * x.lp).sum() for x in c], g) - 0.5 * mean_logprobs(c, 1.0)[g.index(max(g))],
    ),
    "sft": (likelihood_loss, lambda c, g: -mean_logprobs(c, 1.0)[g.index(max(g))]),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_learnt_tokens_alone(policies, kind, case, weighted):
    build, formula = CASES[case]
    loss, policy, lists = build(), getattr(policies, kind), trajectories(weighted=weighted)
    batch, scorer = policy.collate(lists), TokenScorer(policy)
    stats = scorer(batch, loss.outputs)
    with torch.no_grad(), policy.reference():
        reference = scorer(batch).logprobs
    values = loss(stats, reference, batch, torch.tensor(BASELINE) if loss.needs_baseline else None)
    expected = [formula(by_hand(policies, example), example["grades"]) for example in lists]
    assert values.tolist() == pytest.approx([value.item() for value in expected], rel=2e-5)
    for model in (policy.model, policies.moved):
        model.zero_grad()
    values.sum().backward()
    sum(expected).backward()
    wanted = dict(policies.moved.named_parameters())
    for name, parameter in policy.model.named_parameters():
        difference = (parameter.grad - wanted[name].grad).norm()
        assert difference <= 2e-5 * wanted[name].grad.norm() + 1e-6, name


def test_other_tokens_do_matter(policies):
    """Else the test above could not fail: with all tokens learnt the losses are others."""
    for example in trajectories(weighted=False):
        formula = CASES["sigmoid"][1]
        sizes = [len(ids) for ids in example["completion_ids"]]
        whole = example | {"learn_at": [list(range(n)) for n in sizes], "token_rewards": [[0.0] * n for n in sizes]}
        few, all_ = (formula(by_hand(policies, one), one["grades"]).item() for one in (example, whole))
        assert abs(few - all_) > 1e-3


def test_metrics_are_of_learnt_tokens_and_rewards_count_messages_by_their_weight(policies):
    loss, lists, policy = build_loss(RATIO, [Logistic()]), trajectories(weighted=True), policies.packed
    batch, scorer = policy.collate(lists), TokenScorer(policy)
    with torch.no_grad():
        stats = scorer(batch, ("logprob", "entropy"))
        with policy.reference():
            reference = scorer(batch).logprobs
        scores = loss.scores(stats, reference, batch)
        found = loss.metrics(batch, stats, reference, scores)
    every = [(by_hand(policies, example), example["grades"]) for example in lists]
    best = [completions[grades.index(max(grades))] for completions, grades in every]
    for name, expected in {
        "score_best": [log_ratios([c])[0] for c in best],
        "logprob_best": [c.lp.sum() for c in best],
        "token_logprob_best": [c.lp.mean() for c in best],
        "best_logprob_change": [(c.lp - c.ref).sum() for c in best],
    }.items():
        assert found[name].tolist() == pytest.approx([value.item() for value in expected], rel=1e-4, abs=1e-5), name
    tokens = sum(len(at) for example in lists for at in example["learn_at"])
    assert len(found["kl"]) == len(found["entropy"]) == tokens
