"""Which lists lost their best completion's probability, and whether CHES had said so."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.losses.metrics import FELL
from align.progress import counted


def diagnose(changes: Sequence[float], ches: Sequence[float]) -> dict[str, Any]:
    """How displacement and CHES go together over lists.

    Args:
        changes: of every list, the best completion's log-probability after training less before, in nats.
        ches: of every list, the mean length-normalised CHES of its best completion.

    Returns:
        `lists`, `fell_share`, `rank_correlation` (Spearman, of CHES with the fall) and, where some fell and some did
        not, `ches_of_fallen` (three quarters of the fallen lie above it) and `others_above` (share of the others that
        do too).

    Source: ours; CHES is that of arXiv:2410.08847.
    """
    change, score = np.asarray(changes), np.asarray(ches)
    fell = change < -FELL
    found: dict[str, Any] = {"lists": len(change), "fell_share": float(fell.mean())}
    found["rank_correlation"] = spearman(score, -change)
    if fell.any() and not fell.all():
        found["ches_of_fallen"] = float(np.percentile(score[fell], 25))
        found["others_above"] = float((score[~fell] > found["ches_of_fallen"]).mean())
    return found


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Rank correlation; 0 where one of the two is constant or there is one value only.

    Args:
        a, b: equally many numbers; ties get their mean rank.

    Returns:
        From -1 to 1.

    Source: Spearman (1904).
    """
    x, y = _ranks(np.asarray(a)), _ranks(np.asarray(b))
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() and y.std() else 0.0


def sentence(found: dict[str, Any]) -> str:
    """The diagnosis in words.

    Args:
        found: from `diagnose`.

    Returns:
        One or two sentences.

    Source: ours
    """
    lists = counted(found["lists"], "held-out list")
    text = f"in {found['fell_share']:.0%} of {lists} the best completion lost probability"
    if "ches_of_fallen" in found:
        text += (
            f"; three quarters of these lists have a normalised CHES above {found['ches_of_fallen']:.3g}, "
            f"and {found['others_above']:.0%} of the others do too"
        )
    if found["lists"] == 1:
        return text
    return text + f" (rank correlation of CHES with the fall {found['rank_correlation']:+.2f})"


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
