"""`align report`: what runs measured, as one self-contained HTML page."""

from typing import TYPE_CHECKING

from align.lazy import lazily

if TYPE_CHECKING:
    from align.report.write import write_report

__all__ = ["write_report"]

__getattr__ = lazily(__name__, {"write": __all__})
