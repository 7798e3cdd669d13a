"""Refuses, before training, what an objective cannot learn from."""

from __future__ import annotations

from align.errors import UserError
from align.objectives.base import DOMAINS, Properties, Score
from align.objectives.divergence import ReverseKL
from align.tensors import Bool, Float, Tensor, torch


def check_domain(
    name: str, properties: Properties, grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> None:
    """Grades and list sizes against what an objective declares.

    Args:
        name: the objective's, for the message.
        properties: what it declares.
        grades: of the lists; anything where list_mask is False.
        list_mask: False marks padding.

    Raises:
        UserError: a list is too short or too long, or a grade is not finite or out of the objective's range.

    Source: ours.
    """
    _check_sizes(name, properties, list_mask)
    low, high = DOMAINS[properties.grades]
    outside = list_mask & ~(torch.isfinite(grades) & (grades >= low) & (grades <= high))
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        raise UserError(
            f"objective `{name}` needs grades {_range(low, high)}, but completion {place} of list {row} has grade "
            f"{grades[row, place].item():g}; rescale the rows' `grades`, or leave `rewards` or `ranks` to "
            "`data.grades: win_probability`, which makes grades from 0 to 1 of them"
        )


def check_score_fits(name: str, properties: Properties, score: Score) -> None:
    """A score function against what an objective declares.

    Args:
        name: the objective's, for the message.
        properties: what it declares.
        score: the score function that it would get.

    Raises:
        UserError: the objective is defined for another score, or the score's divergence leaves a term in single scores
            that cancels in differences only.

    Source: f-DPO, arXiv:2309.16240, for the divergences; ours.
    """
    if properties.score not in (None, score.name):
        raise UserError(
            f"objective `{name}` is defined for the score `{properties.score}`, not `{score.name}`; "
            f"remove the objective's `score`, and it takes the right one"
        )
    divergence = getattr(score, "divergence", ReverseKL()).name
    if divergence != "reverse_kl" and not properties.shift_invariant:
        raise UserError(
            f"objective `{name}` looks at single scores, and the divergence `{divergence}` fixes only differences of "
            "scores; remove `score.divergence`, or use an objective of differences such as `logistic`"
        )


def _check_sizes(name: str, properties: Properties, list_mask: Bool[Tensor, "B K"]) -> None:
    sizes = list_mask.sum(dim=1)
    low, high = properties.min_list_size, properties.max_list_size
    if (sizes < low).any():
        row = int((sizes < low).nonzero()[0])
        instead = (
            "set `data.select: all`, or use an objective for pairs such as `logistic`"
            if low > 2 and sizes[row] > 1
            else "remove it, or use an objective for single completions such as `kto`"
        )
        raise UserError(
            f"objective `{name}` needs lists of {low} completions or more, but list {row} has {sizes[row]}; {instead}"
        )
    if high is not None and (sizes > high).any():
        row = int((sizes > high).nonzero()[0])
        raise UserError(
            f"objective `{name}` is defined for pairs only, but list {row} has {int(sizes[row])} completions; "
            "set `data.select: best_worst`, or use an objective for lists such as `lambda`"
        )


def _range(low: float, high: float) -> str:
    if high == float("inf"):
        return "that are finite" if low == float("-inf") else f"of {low:g} or more"
    return f"from {low:g} to {high:g}"
