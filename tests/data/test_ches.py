"""CHES against its definition in loops, and what a filter keeps."""

import numpy as np
import pytest

from align.data.ches import ches_scores, choose_lists


def test_both_forms_are_the_definition_on_sums_of_hidden_states():
    """<S+, S-> - ||S+||^2 and <S+, S->/(T+ T-) - ||S+||^2/T+^2, written out over the vectors themselves."""
    generator = np.random.default_rng(0)
    hidden = [generator.normal(size=(length, 6)) for length in (3, 7, 2, 4)]
    grades = [0.2, 0.9, 0.4, 0.9]
    means = [own.mean(axis=0) for own in hidden]
    gram = np.array([[a @ b for b in means] for a in means])
    plain, normalised = ches_scores(gram, [3, 7, 2, 4], grades)
    best = [sum(own[d] for own in hidden[1]) for d in range(6)]
    for place, other in enumerate((0, 2)):
        worse = [sum(own[d] for own in hidden[other]) for d in range(6)]
        inner = sum(x * y for x, y in zip(best, worse, strict=True))
        square = sum(x * x for x in best)
        assert plain[place] == pytest.approx(inner - square)
        assert normalised[place] == pytest.approx(inner / (7 * len(hidden[other])) - square / 49)
    assert len(plain) == len(normalised) == 2, "the other best one is no rejected one"


def test_a_list_of_ties_has_none():
    assert [len(form) for form in ches_scores(np.eye(3), [1, 1, 1], [0.5, 0.5, 0.5])] == [0, 0]


def test_a_fraction_keeps_the_lowest_and_at_least_one():
    scores = [3.0, -1.0, 2.0, -5.0, 0.0]
    choice = choose_lists(scores, keep_fraction=0.4, threshold=None)
    assert choice.kept.tolist() == [False, True, False, True, False] and choice.bound == -1.0
    assert choose_lists(scores, keep_fraction=0.01, threshold=None).kept.tolist() == [False, False, False, True, False]
    assert choose_lists(scores, keep_fraction=1.0, threshold=None).kept.all()
    assert choose_lists([1.0] * 4, keep_fraction=0.5, threshold=None).kept.sum() == 2, "ties do not add lists"


def test_a_threshold_keeps_what_is_not_above():
    assert choose_lists([3.0, -1.0, 2.0], keep_fraction=None, threshold=2.0).kept.tolist() == [False, True, True]
