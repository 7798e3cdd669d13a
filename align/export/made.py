"""What a format's writer is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.export.trained import Trained


@dataclass(frozen=True)
class Made:
    """One export on its way."""

    trained: Trained
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    """To fill; its name is not the one that it gets."""
    name: str
    """The name that it gets."""
    dtype: str | None
    """What weights are stored in; None: as they are."""
    model: Any = None
    """Base and adapter as one transformers model in float32, which the writer may change; None for an adapter alone."""
    calibration: tuple[tuple[int, ...], ...] = ()
    """Token ids of training rows, for what looks at a model's inputs."""
