"""`align score`: rewards and grades for the rows of any data set, with any scorer."""

from align.scoring.command import score_rows

__all__ = ["score_rows"]
