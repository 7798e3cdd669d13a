"""Scorers whose models a run has written."""

from typing import Any

import rewards
from align.runs.digests import check_written
from rewards.digest import MODELS


def load_scorer(config: Any) -> Any:
    """`rewards.load_scorer`, where every model that a run has written is as it was written.

    Raises:
        UserError: names the file that is not.
    """
    for name in MODELS:
        check_written(getattr(config, name, None))
    return rewards.load_scorer(config)
