"""How far a policy has moved from what it was, by what it writes."""

from collections.abc import Iterable
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from align.judging.intervals import interval
from align.model.forward import evaluating
from align.model.policy import Policy
from align.progress import progress
from align.rollout.journal import Line


@torch.no_grad()
def kl_figures(policy: Policy, lines: Iterable[Line], *, seed: int) -> tuple[dict[str, Any], float]:
    """KL(policy, reference) of a completion in nats, and per token.

    mean over prompts and their completions of log policy(completion) - log reference(completion), which is unbiased
    where the completions were drawn from the policy itself: at temperature 1, without filters.

    Args:
        policy: with its reference.
        lines: `prompt_ids` and `completion_ids` of every prompt, as a rollout writes them.
        seed: of the bootstrap over prompts.

    Source: the k1 estimator of Schulman, "Approximating KL divergence", 2020
    """
    scorer, every = policy.scorer(), list(lines)
    ratios: list[float] = []
    tokens = total = 0.0
    with evaluating(policy.model), progress("measuring the divergence", len(every), unit="prompts") as advance:
        for line in every:
            own = line["completion_ids"]
            example = {"prompt_ids": line["prompt_ids"], "completion_ids": own, "grades": [0.0] * len(own)}
            batch = policy.collate([example])
            after = scorer(batch).logprobs
            with policy.reference():
                before = scorer(batch).logprobs
            gaps = (after - before).double().sum(-1)
            ratios.append(fmean(gaps.tolist()))
            total += float(gaps.sum())
            tokens += sum(map(len, own))
            advance()
    return asdict(interval(ratios, seed=seed)), total / tokens
