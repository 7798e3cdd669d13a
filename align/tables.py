"""Tables for the terminal."""

from typing import Any

import rich.table


class Table(rich.table.Table):
    """rich's, in which a narrow terminal folds what it would cut off."""

    def add_column(self, header: Any = "", **options: Any) -> None:  # type: ignore[override]
        """As rich's."""
        super().add_column(header, overflow="fold", **options)
