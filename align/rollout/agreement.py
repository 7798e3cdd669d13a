"""Whether the engine samples from the policy that was trained: its log-probabilities against the trainer's own."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from align.model.forward import score_tokens
from align.model.policy import Policy
from align.model.probe import tolerance
from align.progress import stage
from align.rollout.engine import Engine, Sampling

log = logging.getLogger("align")

PER_PROMPT = 2


@dataclass(frozen=True)
class Agreement:
    """How far apart the two are."""

    tokens: int
    max: float
    """Of a token, in nats."""
    mean: float
    bound: float
    """Beyond which `max` is no rounding."""


@torch.no_grad()
@stage("comparing the engine with the trainer")
def check_agreement(
    engine: Engine, policy: Policy, prompts: Sequence[list[int]], sampling: Sampling, *, bound: float | None
) -> Agreement:
    """Let the engine write a few completions without filters, and score them exactly; a warning says if they differ.

    That finds a wrong or stale adapter, another model or dtype, a head that was not updated, and log-probabilities
    without the temperature.

    Args:
        prompts: token ids, one prompt or more.
        bound: in nats; by default what the policy's dtype allows.

    Source: ours
    """
    heat = sampling.temperature or 1.0
    free = {"temperature": heat, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "adaptive_temperature": False, "stop": ()}
    probe = replace(sampling, completions=PER_PROMPT, **free)  # type: ignore[arg-type]
    drawn = dict(engine.sample(prompts, probe))
    ids = [[sampled.ids for sampled in drawn[place]] for place in range(len(prompts))]
    lists = [
        {"prompt_ids": prompt, "completion_ids": own, "grades": [0.0] * PER_PROMPT}
        for prompt, own in zip(prompts, ids, strict=True)
    ]
    training = policy.model.training
    policy.model.eval()
    batch = policy.collate(lists)
    exact = score_tokens(policy.model, batch, temperature=heat).logprobs[batch.completion_mask].cpu()
    policy.model.train(training)
    theirs = torch.tensor([value for place in range(len(prompts)) for one in drawn[place] for value in one.logprobs])
    difference = (exact - theirs).abs()
    found = Agreement(
        tokens=len(difference),
        max=difference.max().item(),
        mean=difference.mean().item(),
        bound=bound or tolerance(policy.model.dtype),
    )
    if not found.max <= found.bound:
        log.warning(
            "the engine's log-probabilities differ from the trainer's by up to %.3g nats (mean %.3g; bound %.3g): it "
            "may sample from other weights, or in another dtype, than those that train",
            found.max,
            found.mean,
            found.bound,
        )
    return found
