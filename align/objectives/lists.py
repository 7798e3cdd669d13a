"""Arithmetic over the completions and the ordered pairs of padded lists, inert where list_mask is False."""

from __future__ import annotations

from collections.abc import Callable

from align.tensors import Bool, Float, Tensor, torch


def differences(x: Float[Tensor, "B K"]) -> Float[Tensor, "B K K"]:
    """x_i - x_j."""
    return x[:, :, None] - x[:, None, :]


def ordered_pairs(grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K K"]:
    """True at (i, j) where both completions are real and i has the higher grade; a tie forms no pair."""
    both = list_mask[:, :, None] & list_mask[:, None, :]
    return both & (grades[:, :, None] > grades[:, None, :])


def best_graded(grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
    """The completions that share their list's highest grade."""
    highest = grades.masked_fill(~list_mask, -torch.inf).amax(dim=1, keepdim=True)
    return list_mask & (grades == highest)


def chosen_and_rejected(
    grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> tuple[Bool[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """The best-graded completions and all others; both empty where all grades are tied."""
    best = best_graded(grades, list_mask)
    rejected = list_mask & ~best
    return best & rejected.any(dim=1, keepdim=True), rejected


def masked_sum(values: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Sum over a list of the values where mask is True."""
    return values.masked_fill(~mask, 0).sum(dim=1)


def masked_mean(values: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Mean over a list of the values where mask is True; 0 where none is."""
    return masked_sum(values, mask) / mask.sum(dim=1).clamp(min=1)


def over_ordered_pairs(
    loss: Callable[[Tensor], Tensor],
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """Sum of loss(s_i - s_j - margin) over the pairs with g_i > g_j; 0 with zero gradient where there is none.

    The differences of other pairs are set to 0 before the loss, so nothing that padding holds reaches the gradient.
    """
    pairs = ordered_pairs(grades, list_mask)
    gaps = (differences(scores) - per_pair(margins, scores)).masked_fill(~pairs, 0)
    return loss(gaps).masked_fill(~pairs, 0).sum(dim=(1, 2))


def per_pair(margins: Float[Tensor, " B"] | None, scores: Float[Tensor, "B K"]) -> Float[Tensor, "B 1 1"] | float:
    """Lists' margins beside the differences of their scores; 0 where none are given."""
    return 0.0 if margins is None else margins.to(scores.dtype)[:, None, None]


def shares(grades: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Grades by their sum; 0 where that is 0."""
    total = grades.sum(dim=1, keepdim=True)
    return grades / total.masked_fill(total == 0, 1)
