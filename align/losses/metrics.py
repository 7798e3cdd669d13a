"""What is measured of every batch, as sums and counts so that no figure depends on how lists were cut into batches."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from align.losses.ranking import ranking_metrics
from align.objectives.noise import resolution, sum_noise
from align.types import ListBatch, TokenStats

LOG_NAMES = {
    "score_best": "rewards/chosen",
    "score_worst": "rewards/rejected",
    "margin": "rewards/margins",
    "pair_accuracy": "rewards/accuracies",
    "logprob_best": "logps/chosen",
    "logprob_worst": "logps/rejected",
}
"""Names under which training logs a metric where TRL logs the same quantity."""

FELL = 1e-3
"""Nats by which a completion's log-probability must fall to count as fallen: float32 sums of a few hundred tokens are
not more exact, and before the first step nothing has fallen."""


class Sums:
    """Running sum and count of each metric, on the device until `means` is asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], batch: ListBatch | None = None, *, counts: bool = True) -> None:
        """Add one value per list, completion or token of a batch; NaN marks a list that does not define the metric.

        A value counts as often as its list does in the batch, or once. Every list defines the loss: a NaN there is a
        fault, kept as infinity so that the mean shows it. With `counts` False nothing is added but the names, so that
        all processes know the same.
        """
        for name, value in values.items():
            if name == "loss":
                value = value.nan_to_num(nan=torch.inf, posinf=torch.inf)
            known = ~value.isnan() & counts
            value = value.masked_fill(~known, 0.0)
            if batch is None or batch.weights is None:
                pair = torch.stack([value.sum().double(), known.sum().double()])
            else:
                weights = _weights_of(value, batch, batch.weights)
                pair = torch.stack([(weights * value).sum(), (weights * known).sum()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Each metric's mean over everything that was added in any process; metrics that nothing defined are absent."""
        if not self._sums:
            return {}
        totals = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum").tolist()
        return {name: total / count for name, (total, count) in zip(self._sums, totals, strict=True) if count}


@torch.no_grad()
def list_metrics(
    batch: ListBatch,
    stats: TokenStats,
    reference: Float[Tensor, "N C"] | None,
    scores: Float[Tensor, "B K"],
    *,
    noise: Float[Tensor, "B K"] | None = None,
    relative: float | None = None,
) -> dict[str, Float[Tensor, " _"]]:
    """Ranking, likelihood and displacement of every list, and the token statistics; of learnt tokens alone.

    Scores count a token by what its message weighs; log-probabilities are of all learnt tokens alike.

    `saturated_share` is that of tokens whose probability is 1 in float32, from which nothing more is learnt.
    `margin`, `pair_accuracy`, `ndcg`, `kendall_tau`, `top1_agreement` rank by the implicit reward,
    `likelihood_*` by mean token log-probability. `best_logprob_change` is the best completion's log-probability less
    its reference's, in nats; `best_fell_share` counts the lists where it fell by more than rounding (FELL). `kl` is the
    k3 estimate e^r - 1 - r, r = reference - policy, per completion token of the data.

    Args:
        noise: how far each of the scores may be off by rounding.
        relative: a token's relative error, from `resolution`; by default float32's.
    """
    relative = resolution(torch.float32) if relative is None else relative
    mask = batch.completion_mask
    lengths = mask.sum(-1).clamp(min=1)
    logprobs = stats.logprobs.where(mask, 0.0)
    sums = batch.to_lists(logprobs.sum(-1))
    means = batch.to_lists(logprobs.sum(-1) / lengths)
    sum_errors = batch.to_lists(sum_noise(lambda lp: lp.sum(-1), logprobs, mask, relative))
    mean_errors = batch.to_lists(sum_noise(lambda lp: lp.sum(-1) / lengths, logprobs, mask, relative))
    best, worst = _extremes(batch)
    values = {
        **ranking_metrics(scores, batch.grades, batch.list_mask, noise=noise),
        "score_best": _mean_where(scores, best),
        "score_worst": _mean_where(scores, worst),
        "logprob_best": _mean_where(sums, best),
        "logprob_worst": _mean_where(sums, worst),
        "token_logprob_best": _mean_where(means, best),
        "token_logprob_worst": _mean_where(means, worst),
    }
    likelihood = ranking_metrics(means, batch.grades, batch.list_mask, noise=mean_errors)
    values |= {f"likelihood_{name}": likelihood[name] for name in ("ndcg", "pair_accuracy")}
    values["saturated_share"] = (stats.logprobs.exp() == 1)[mask].float()
    if stats.entropy is not None:
        values["entropy"] = stats.entropy[mask]
    if stats.hidden_diversity is not None:
        values["hidden_diversity"] = stats.hidden_diversity
    if stats.logsumexp is not None:
        values["log_z"] = stats.logsumexp[mask]
    if reference is not None:
        ratio = (reference - stats.logprobs).where(mask, 0.0)
        change = _mean_where(batch.to_lists(-ratio.sum(-1)), best)
        values |= {
            "best_logprob_change": change,
            "best_fell_share": (change < -_mean_where(sum_errors, best).clamp(min=FELL)).float(),
            "kl": (ratio.exp() - 1 - ratio)[mask],
        }
    return values


def _weights_of(values: Tensor, batch: ListBatch, weights: Float[Tensor, " B"]) -> Tensor:
    """How often each value counts, be there one per list, per completion or per token: as often as its list."""
    if len(values) == len(weights):
        return weights
    of_completions = weights[batch.list_index]
    if len(values) == len(of_completions):
        return of_completions
    return of_completions.repeat_interleave(batch.completion_mask.sum(dim=1))


def _extremes(batch: ListBatch) -> tuple[Tensor, Tensor]:
    """Masks of the best- and the worst-graded completions; a tie has several."""
    high = batch.grades.masked_fill(~batch.list_mask, -torch.inf)
    low = batch.grades.masked_fill(~batch.list_mask, torch.inf)
    best = (high == high.amax(-1, keepdim=True)) & batch.list_mask
    return best, (low == low.amin(-1, keepdim=True)) & batch.list_mask


def _mean_where(values: Float[Tensor, "B K"], mask: Tensor) -> Float[Tensor, " B"]:
    return values.where(mask, 0.0).sum(-1) / mask.sum(-1)
