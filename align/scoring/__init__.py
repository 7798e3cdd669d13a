"""`align score`: rewards and grades for the rows of any data set, with any scorer."""

from typing import TYPE_CHECKING

from align.lazy import lazily

if TYPE_CHECKING:
    from align.scoring.command import score_rows

__all__ = ["score_rows"]

__getattr__ = lazily(__name__, {"command": __all__})
