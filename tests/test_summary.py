"""Figures as a run's tables show them."""

import pytest

from align.summary import figure


@pytest.mark.parametrize(
    ("pattern", "value", "text"),
    [
        ("{:+.3f}", -1e-7, "+0.000"),
        ("{:.4f}", -0.0, "0.0000"),
        ("{:.1%}", -1e-5, "0.0%"),
        ("{:+.3f}", -6e-4, "-0.001"),
        ("{:.1%}", 0.125, "12.5%"),
    ],
)
def test_what_rounds_to_zero_has_no_minus(pattern, value, text):
    assert figure(pattern, value) == text
