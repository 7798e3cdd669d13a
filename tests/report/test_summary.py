"""Figures as a run's tables show them, and what may be said of their changes."""

import math
import random
from statistics import fmean

import pytest
from rich.console import Console

from align.evaluate.samples import Measured, paired_changes
from align.report.summary import figure, print_summary, verdict


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


def measured(values: list[float], rewards: tuple[float, ...] = ()) -> Measured:
    return Measured({}, [], list(rewards), [], {"ndcg": values})


def test_a_change_and_its_error_are_those_of_the_paired_differences():
    before, after = [0.5, 0.7, math.nan, 0.1], [0.6, 0.5, 0.3, 0.5]
    found = paired_changes(measured(before, (1.0, 2.0)), measured(after, (1.5, 2.5)))
    gaps = [0.1, -0.2, 0.4]
    variance = sum((gap - 0.1) ** 2 for gap in gaps) / 2
    expected = {"difference": 0.1, "standard_error": math.sqrt(variance / 3), "lists": 3}
    assert found["ndcg"] == pytest.approx(expected)
    assert found["sample_reward"] == pytest.approx({"difference": 0.5, "standard_error": 0.0, "lists": 2})
    assert paired_changes(measured([0.5]), measured([0.7])) == {}, "one list has no spread"
    assert paired_changes(Measured({}, [], []), measured(after)) == {}, "nothing was kept of the time before"


@pytest.mark.parametrize(
    ("key", "difference", "error", "lists", "word"),
    [
        ("ndcg", 0.014, 0.02, 6, "within noise"),
        ("ndcg", 0.05, 0.02, 6, "better"),
        ("ndcg", -0.05, 0.02, 6, "worse"),
        ("loss", -0.05, 0.02, 6, "better"),
        ("best_fell_share", 0.3, 0.1, 50, "worse"),
        ("ndcg", 0.04, 0.02, 6, "within noise"),
        ("ndcg", 0.0, 0.0, 60, "within noise"),
        ("ndcg", 0.5, 0.0, 4, "too few lists"),
    ],
)
def test_a_verdict_needs_twice_the_standard_error(key, difference, error, lists, word):
    assert verdict(key, {"difference": difference, "standard_error": error, "lists": lists}) == word
    assert verdict(key, None) == ""


def test_noise_is_called_so_and_an_effect_is_not():
    """Lists that a coin moves get a word about one time in twenty, lists that all gain a little nearly always."""
    rng, words = random.Random(0), {0.0: [], 0.5: []}
    for effect, own in words.items():
        for _ in range(400):
            before = [rng.gauss(0, 3) for _ in range(40)]
            after = [value + effect + rng.gauss(0, 0.7) for value in before]
            own.append(verdict("ndcg", paired_changes(measured(before), measured(after))["ndcg"]))
    assert fmean(word != "within noise" for word in words[0.0]) < 0.1
    assert fmean(word == "better" for word in words[0.5]) > 0.95


def test_the_table_in_the_terminal_says_how_sure_a_change_is():
    change = {"difference": 0.014, "standard_error": 0.02, "lists": 6}
    summary = {
        **{"task": "preference", "steps": 3, "train_seconds": 1.0, "tokens_per_second": 9.0, "peak_memory_bytes": 1},
        **{"eval_before": {"ndcg": 0.8, "loss": 0.7}, "eval_after": {"ndcg": 0.814, "loss": 0.7}, "samples": []},
        **{"eval_change": {"ndcg": change}, "data": {"heldout_lists": 6}},
    }
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary("runs/a", summary, show=0, console=console)
    text = console.export_text()
    assert "+0.0140 ± 0.0200" in text and "within noise" in text and "better" not in text
    assert "6 held-out lists show large changes only" in text
