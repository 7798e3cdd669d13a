"""`align report RUN --refine`: the learning rates that a run's gradients would have liked, for the next run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.errors import UserError
from align.files import write_json
from align.recipe.schedules import REFINED
from align.report.reading import read_run

SMOOTHED = 0.1
"""Share of the run over which the median of the norms is taken."""
FEWEST = 10
"""Steps of a run below which its norms say nothing."""


def refined(norms: Sequence[float], *, smoothed: float = SMOOTHED) -> list[float]:
    """Factors of the learning rate from a run's gradient norms; equal norms give a line that falls to 0.

    w_t = median(G)_t^-2,  eta_t = w_t sum_{p > t} w_p,  over its maximum

    Args:
        norms: of every step's gradient, before clipping.
        smoothed: share of the run that the median is taken of, its ends mirrored.

    Source: arXiv:2310.07831, algorithm 1, for steps along the gradient itself.
    """
    width = max(1, int(smoothed * len(norms))) | 1
    padded = np.pad(np.asarray(norms, dtype=np.float64), width // 2, mode="reflect" if width > 1 else "edge")
    medians = np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)
    weights = medians**-2.0
    rates = weights * (weights.sum() - np.cumsum(weights))
    return [float(rate) for rate in np.maximum(rates, 0.0) / rates.max()]


def write_refined(run: str | Path) -> Path:
    """Write a run's refined schedule into its folder.

    Raises:
        UserError: it holds too few steps, or gradients of no length.
    """
    norms = [line["grad_norm"] for line in read_run(Path(run)).steps if "grad_norm" in line]
    if len(norms) < FEWEST:
        raise UserError(f"{run}: {len(norms)} steps say too little of a schedule; refine a run of {FEWEST} or more")
    if not min(norms) > 0:
        raise UserError(f"{run}: a gradient's norm is 0, so that no rate follows from it")
    file = Path(run) / REFINED
    write_json(file, {"factors": refined(norms), "steps": len(norms), "smoothed": SMOOTHED})
    return file
