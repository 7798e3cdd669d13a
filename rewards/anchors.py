"""What an answer is worth beside answers of known worth, from a judge's comparisons with each (Compare2Score)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rewards.texts import plain
from rewards.types import ScorerError

STEPS = 100
"""Newton's steps at most; ten are many."""


def read_anchors(path: str) -> dict[str, list[tuple[str, float]]]:
    """Answers of known worth to each prompt: their texts, and what they are worth.

    Args:
        path: rows of `prompt`, `completions` and `rewards`, a JSON object a line.

    Raises:
        ScorerError: no such file, or a line that is no such row.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ScorerError(f"anchors: cannot read {path} ({error}); give rows in JSON lines") from None
    found: dict[str, list[tuple[str, float]]] = {}
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                prompt, own = _anchors(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ScorerError(
                    f"{path}, line {number}: no anchors; give `prompt`, `completions` and `rewards`, a finite number "
                    "for each completion"
                ) from None
            found.setdefault(prompt, []).extend(own)
    return found


def _anchors(line: str) -> tuple[str, list[tuple[str, float]]]:
    row = json.loads(line)
    rewards = [float(own) for own in row["rewards"]]
    if not all(map(math.isfinite, rewards)):
        raise ValueError
    return plain(row["prompt"]), list(zip(map(plain, row["completions"]), rewards, strict=True))


def thurstone(anchors: Sequence[float], won: Sequence[float]) -> float:
    """The likeliest worth of an answer, given how often it is found better than each anchor.

    argmax_s  sum_k w_k log Phi(s - a_k) + (1 - w_k) log Phi(a_k - s) - (s - mean a)^2 / 2,  by Newton's method; the
    sum is concave, and the last term, a prior of deviation 1 about the anchors, keeps s finite where all w are 0 or 1.

    Args:
        anchors: a_k, what they are worth.
        won: w_k, from 0 to 1.

    Source: Thurstone's case V as in Compare2Score, arXiv:2405.19298, which estimates the anchors' worth too
    """
    a, w = torch.tensor(anchors, dtype=torch.float64), torch.tensor(won, dtype=torch.float64)
    middle = s = a.mean()
    for _ in range(STEPS):
        up, down = _slope(s - a), _slope(a - s)
        first = (w * up - (1 - w) * down).sum() - (s - middle)
        second = -(w * up * (up + s - a) + (1 - w) * down * (down + a - s)).sum() - 1
        step = first / second
        s = s - step
        if abs(step) < 1e-12 * (1 + abs(s)):
            break
    return s.item()


def _slope(z: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """d log Phi(z) / dz, whose own slope is -r (r + z); erfcx neither over- nor underflows where Phi does."""
    return math.sqrt(2 / math.pi) / torch.special.erfcx(-z / math.sqrt(2))
