"""The diagnosis of displacement: shares, bounds and rank correlation, by hand and against scipy where it is there."""

import numpy as np
import pytest

from align.report.displacement import diagnose, sentence, spearman


def test_it_tells_the_fallen_from_the_others():
    found = diagnose([-1.0, -2.0, 1.0, 0.5, -3.0], ches=[4.0, 5.0, 1.0, 4.5, 6.0])
    assert found["lists"] == 5 and found["fell_share"] == pytest.approx(0.6)
    assert found["ches_of_fallen"] == pytest.approx(4.5), "the lower quartile of 4, 5, 6"
    assert found["others_above"] == 0.0, "neither 1 nor 4.5 is above"
    assert found["rank_correlation"] == pytest.approx(1 - 6 * (1**2 + 1**2) / (5 * 24)), "4 and 4.5 change places"
    text = sentence(found)
    assert "in 60% of 5 held-out lists" in text and "above 4.5" in text and "+0.90" in text


def test_one_list_has_no_rank_correlation():
    assert sentence(diagnose([-1.0], ches=[2.0])) == "in 100% of 1 held-out list the best completion lost probability"


def test_where_all_or_none_fell_there_is_no_bound():
    assert "ches_of_fallen" not in diagnose([-1.0, -2.0], ches=[1.0, 2.0])
    assert "ches_of_fallen" not in diagnose([1.0, 2.0], ches=[1.0, 2.0])


def test_rank_correlation_is_scipy_s():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    a, b = generator.integers(0, 6, 40), generator.normal(size=40)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman([1.0, 1.0], [2.0, 3.0]) == 0.0
