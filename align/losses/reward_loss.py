"""From a reward model's outputs to one loss per list: pair, list and attribute objectives with their weights."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from align.data.schema import ATTRIBUTES
from align.errors import UserError
from align.losses.ranking import ranking_metrics
from align.model.reward import RewardBatch, RewardModel
from align.objectives import Objective
from align.objectives.noise import resolution
from align.objectives.policy_gradient import completion_keys
from align.packing.batch import Example
from align.recipe.settings import RewardSection
from align.types import ListBatch
from rewards.head_config import Attributes, BradleyTerry
from rewards.heads import LEVELS, bradley_terry, fidelity, min_norm_weights, soft_bin_loss, squared_error

log = logging.getLogger("align")

RATES = {"squared": squared_error, "soft_bins": soft_bin_loss}
SMOOTHING = 0.99
"""Share of the newest gradient in MORE's running mean."""

Terms = Sequence[Objective | BradleyTerry | Attributes]


@dataclass(frozen=True)
class Term:
    """One objective and its factor in the sum."""

    weight: float
    loss: Callable[[Tensor, Tensor, RewardBatch], Float[Tensor, " B"]]
    """Of rewards and ratings [B, K, A] and their batch."""


class RewardLoss:
    """The loss of every list of a batch, with the interface of ListLoss; what a model says is its rewards [N, A]."""

    needs_baseline = needs_reference = False
    outputs: tuple[str, ...] = ()

    def __init__(
        self, terms: Sequence[Term], names: Sequence[str], *, sets: int = 1, relative: float | None = None
    ) -> None:
        """Args:
        terms: their weighted sum is the loss.
        names: of the outputs, for the metrics.
        sets: how many preference sets MORE weighs against one another; 1 for the plain mean.
        relative: how far a reward may be off by rounding, from `resolution`; by default float32's.
        """
        self.terms = terms
        self.names = names
        self.sets = sets
        self.relative = resolution(torch.float32) if relative is None else relative
        self.set_weights = torch.ones(sets + 1)
        """Each list's factor by its set, 1 on average; the last is that of held-out lists, which are of no set (-1)."""

    def scores(self, stats: Tensor, reference: None, batch: ListBatch) -> Float[Tensor, "B K"]:
        """The rewards that lists are ranked by: the first output."""
        return batch.to_lists(stats[:, 0])

    def __call__(
        self, stats: Tensor, reference: None, batch: RewardBatch, baseline: Tensor | None = None
    ) -> Float[Tensor, " B"]:
        """One loss per list."""
        losses = self.unweighted(stats, batch)
        if self.sets == 1 or batch.sets is None:
            return losses
        return losses * self.set_weights.to(losses.device)[batch.sets]

    def unweighted(self, stats: Tensor, batch: RewardBatch) -> Float[Tensor, " B"]:
        """One loss per list, whatever set it is of."""
        assert batch.attributes is not None and batch.strengths is not None, "the data has them"
        rewards = torch.stack([batch.to_lists(output) for output in stats.unbind(1)], dim=2)
        ratings = torch.stack([batch.to_lists(rating) for rating in batch.attributes.unbind(1)], dim=2)
        losses = rewards.new_zeros(len(rewards))
        for term in self.terms:
            losses = losses + term.weight * term.loss(rewards, ratings, batch)
        return losses

    @torch.no_grad()
    def metrics(
        self, batch: RewardBatch, stats: Tensor, reference: None, scores: Float[Tensor, "B K"]
    ) -> dict[str, Float[Tensor, " _"]]:
        """How the lists are ranked, the mean reward, and every attribute's squared error."""
        lists = scores, batch.grades, batch.list_mask
        values = {**ranking_metrics(*lists, noise=_noise(scores, self.relative)), "reward_mean": stats[:, 0]}
        if batch.attributes is not None:
            errors = (stats - batch.attributes).square()
            values |= {f"squared_error/{name}": errors[:, a] for a, name in enumerate(self.names)}
        return values

    def begin_step(self, model: RewardModel, batches: Sequence[list[Example]], accelerator: Accelerator) -> None:
        """MORE's set weights for a step, from the gradients of all its lists on the head: a forward pass more.

        The step's loss is sum_t lambda_t L_t, L_t the mean loss of set t's lists and lambda over the sets that the step
        has: a set counts by its lambda, however many of the lists are its own.
        """
        if self.sets == 1:
            return
        head = model.head_parameters()
        gradients = torch.zeros(self.sets, sum(p.numel() for p in head), device=head[0].device)
        counts = torch.zeros(self.sets, device=head[0].device)
        for examples in filter(None, batches):
            batch = model.collate(examples)
            assert batch.sets is not None, "the data has them"
            gradients += self._set_gradients(model, batch, head)
            counts += torch.bincount(batch.sets, weights=batch.weights, minlength=self.sets)
        gradients, counts = accelerator.reduce((gradients, counts), reduction="sum")
        before = torch.zeros_like(gradients) if model.set_gradients is None else model.set_gradients
        seen = gradients.abs().sum(1, keepdim=True) > 0
        unit = torch.nn.functional.normalize(gradients, dim=1)
        model.set_gradients = torch.where(seen, (1 - SMOOTHING) * before + SMOOTHING * unit, before)
        there = counts > 0
        shares = torch.zeros_like(counts).masked_scatter(there, min_norm_weights(model.set_gradients[there]))
        # The trainer sums over lists and divides by their number.
        self.set_weights[:-1] = (shares * counts.sum() / counts.clamp(min=1)).cpu()

    def _set_gradients(self, model: RewardModel, batch: RewardBatch, head: list) -> Float[Tensor, "T P"]:
        """The gradient of each set's summed loss on the head's weights."""
        assert batch.sets is not None, "the data has them"
        losses = self.unweighted(model.scorer()(batch), batch)
        losses = losses if batch.weights is None else losses * batch.weights.to(losses.dtype)
        rows = []
        for number in range(self.sets):
            total = losses[batch.sets == number].sum()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, head, retain_graph=True)]))
        return torch.stack(rows).float()


def build_reward_loss(
    section: RewardSection, objectives: Terms, *, sources: int, relative: float | None = None
) -> RewardLoss:
    """The loss that a recipe's `reward` and `objective` describe; `check_reward_objectives` has found no fault in them.

    Args:
        sources: how many the recipe has.
        relative: as for RewardLoss.
    """
    relative = resolution(torch.float32) if relative is None else relative
    terms = [_term(objective, section.outputs, relative) for objective in objectives]
    return RewardLoss(terms, section.outputs, sets=sources if section.balance == "more" else 1, relative=relative)


def ranks(objectives: Terms) -> bool:
    """Whether any objective learns from the order of a list, so that a row must have one."""
    return any(not isinstance(objective, Attributes) for objective in objectives)


def set_of(file: str, sources: Sequence[Any]) -> int:
    """The number of the source that a file of rows belongs to: the one whose path is the longest beginning of its own.

    Args:
        file: as a row names it.
        sources: with `path` and `split`.
    """

    def fit(number: int) -> int:
        source = sources[number]
        path = str(Path(source.path).expanduser())
        known = {source.path: len(path), f"{source.path} [{source.split}]": len(path) + 1}
        return known.get(file, len(path) if file.startswith(f"{path}/") or file == path else -1)

    return max(range(len(sources)), key=fit)


def check_ratings(lists: Dataset, objectives: Terms, names: Sequence[str]) -> None:
    """Refuse, before training, ratings that an objective cannot learn from; say how many preferences say nothing.

    Raises:
        UserError: names the output, or the row.
    """
    if silent := sum(strength == 0 for strength in lists["strength"][:]):
        log.warning(
            "%d of %d lists state a preference of strength 0, which bradley_terry passes over", silent, len(lists)
        )
    regressions = [term for term in objectives if isinstance(term, Attributes)]
    if not regressions:
        return
    ratings = [[row[a] for rows in lists["attributes"][:] for row in rows] for a in range(len(names))]
    if empty := [name for name, values in zip(names, ratings, strict=True) if all(map(math.isnan, values))]:
        raise UserError(
            f"reward.outputs: no row rates {empty[0]}; name the ratings that the rows have, or give a column {empty[0]}"
        )
    if any(term.form == "soft_bins" for term in regressions):
        for file, number, rows in zip(lists["source"][:], lists["row"][:], lists["attributes"][:], strict=True):
            if bad := [rating for row in rows for rating in row if rating < 1 or rating > LEVELS]:
                raise UserError(
                    f"{file}, row {number}: a rating of {bad[0]:g}, and `soft_bins` needs 1 to {LEVELS}; rescale the "
                    "ratings, or set `form: squared`"
                )


def strength_field(objectives: Terms) -> str:
    """The column that holds the strength of a row's preference."""
    return next((o.strength_field for o in objectives if isinstance(o, BradleyTerry)), "margin")


def columns_read(objectives: Terms, outputs: Sequence[str]) -> list[str]:
    """The columns that these objectives learn from besides a row's order."""
    rated = [ATTRIBUTES, *outputs] if any(isinstance(o, Attributes) for o in objectives) else []
    spread = deviation_field(objectives)
    rated += [spread] if spread else []
    return rated + [o.strength_field for o in objectives if isinstance(o, BradleyTerry) and o.strength != "none"]


def _term(objective: Objective | BradleyTerry | Attributes, names: Sequence[str], relative: float) -> Term:
    if isinstance(objective, Attributes):
        return Term(objective.weight, lambda rewards, ratings, batch: _regression(objective, rewards, ratings, batch))
    if isinstance(objective, BradleyTerry):
        return Term(objective.weight, _bradley_terry(objective, _output(objective, names)))
    return Term(objective.weight, _listwise(partial(objective.load(), **objective.options()), relative))


def _listwise(function: Callable[..., Tensor], relative: float) -> Callable[..., Float[Tensor, " B"]]:
    takes = inspect.signature(function).parameters

    def loss(rewards: Tensor, ratings: Tensor, batch: RewardBatch) -> Tensor:
        first = rewards[:, :, 0]
        given: dict[str, Any] = {"noise": _noise(first, relative), "margins": batch.margins}
        given["keys"] = None if batch.keys is None else completion_keys(batch.keys, first.shape[1])
        extra = {name: value for name, value in given.items() if name in takes}
        return function(first, batch.grades, batch.list_mask, **extra)

    return loss


def _noise(rewards: Float[Tensor, "B K"], relative: float) -> Float[Tensor, "B K"]:
    """How far each reward may be off by rounding."""
    return relative * (1 + rewards.detach().abs())


def _bradley_terry(objective: BradleyTerry, output: int) -> Callable[..., Float[Tensor, " B"]]:
    def loss(rewards: Tensor, ratings: Tensor, batch: RewardBatch) -> Tensor:
        lists = rewards[:, :, output], batch.grades, batch.list_mask, batch.strengths
        return bradley_terry(*lists, strength=objective.strength, center=objective.center)  # type: ignore[arg-type]

    return loss


def _output(objective: BradleyTerry, names: Sequence[str]) -> int:
    return names.index(objective.output) if objective.output is not None else 0


def _regression(
    objective: Attributes, rewards: Float[Tensor, "B K A"], ratings: Float[Tensor, "B K A"], batch: RewardBatch
) -> Float[Tensor, " B"]:
    known = batch.list_mask[:, :, None] & ~ratings.isnan()
    deviations = _deviations(objective, ratings, batch)
    options = {"deviation": deviations} if objective.form == "soft_bins" else {}
    losses = RATES[objective.form](rewards, ratings, known, **options)
    if objective.fidelity:
        columns = zip(rewards.unbind(2), ratings.unbind(2), deviations.unbind(2), strict=True)
        pairs = [fidelity(r, y, batch.list_mask, deviation=s) for r, y, s in columns]
        losses = losses + objective.fidelity * torch.stack(pairs).mean(0)
    return losses


def _deviations(objective: Attributes, ratings: Float[Tensor, "B K A"], batch: RewardBatch) -> Float[Tensor, "B K A"]:
    """How far raters differ about each completion: the rows' own where they say so."""
    everywhere = torch.full_like(ratings, objective.deviation)
    if batch.deviations is None:
        return everywhere
    own = torch.stack([batch.to_lists(values) for values in batch.deviations.unbind(1)], dim=2)
    return own.where(~own.isnan(), everywhere)


def deviation_field(objectives: Terms) -> str | None:
    """The column that holds how far raters differ; None where no objective reads it."""
    read = (o for o in objectives if isinstance(o, Attributes) and (o.form == "soft_bins" or o.fidelity))
    return next((o.deviation_field for o in read), None)
