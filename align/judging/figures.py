"""From a judge's opinions to figures: everything that `evaluate.json` says of one judge."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np

from align.evaluate.winrate import length_controlled, length_feature
from align.judging.best_of_n import best_of_n
from align.judging.cases import Case, Pair
from align.judging.diversity import distinct, repetition
from align.judging.intervals import Interval, interval, of_standard_error
from align.judging.judges import Opinion, Verdict
from align.judging.ratings import ranking
from rewards.benchmarks import calibration

Sides = tuple[str, str]
UNIT = (0.0, 1.0)
LONGEST_ODDS = 30.0
"""Nats; a server's certainty is no infinite margin."""


def judge_figures(cases: Sequence[Case], opinions: Sequence[Opinion], sides: Sides, *, seed: int) -> dict[str, Any]:
    """Of the first of two sides against the other.

    Args:
        cases: G of them.
        opinions: of each case.
        seed: of the bootstrap.
    """
    verdicts = [[own for pair in case.pairs[sides] if (own := said.of(pair))] for case, said in _both(cases, opinions)]
    asked = sum(len(case.pairs[sides]) for case in cases)
    every = [own for verdicts_ in verdicts for own in verdicts_]

    def mean_of(value: Callable[[Verdict], float | None], bounds: tuple[float, float]) -> dict[str, Any] | None:
        found = [[value(own) for own in prompt] for prompt in verdicts]
        prompts = [fmean(known) for own in found if (known := [one for one in own if one is not None])]
        return asdict(interval(prompts, seed=seed, bounds=bounds)) if prompts else None

    positions = [own.position for own in every if own.position is not None]
    return {
        "comparisons": len(every),
        "without_a_verdict": asked - len(every),
        "win_rate": mean_of(lambda own: own.label, UNIT),
        "win_rate_discrete": mean_of(lambda own: 0.5 + own.outcome / 2, UNIT),
        "win_rate_lc": _length_controlled(cases, opinions, sides),
        **{name: _share(own.outcome == sign for own in every) for name, sign in OUTCOMES.items()},
        "position_bias": mean_of(lambda own: own.position, (-0.5, 0.5)) if positions else None,
        "position_flips": _share(abs(own.position) > abs(own.label - 0.5) for own in every if own.position is not None)
        if positions
        else None,
        **_reward_figures(cases, opinions, sides, seed),
    }


OUTCOMES = {"wins": 1, "losses": -1, "ties": 0}


def label_figures(cases: Sequence[Case], opinions: Sequence[Opinion], *, seed: int) -> dict[str, Any] | None:
    """A judge against the rows' own grades; None where no row grades two completions differently."""
    right: list[float] = []
    margins: list[float] = []
    longer: list[float] = []
    for case, said in _both(cases, opinions):
        own = [(pair, verdict) for pair in case.labels if (verdict := said.of(pair))]
        if own:
            right.append(fmean(_half(verdict.label - 0.5) for _, verdict in own))
        margins += [_log_odds(verdict.chance) for _, verdict in own]
        longer += [_half(len(case.text(a)) - len(case.text(b))) for (a, b), _ in own]
    if not right:
        return None
    chances = 1 / (1 + np.exp(-np.array(margins)))
    return {
        "pairs": len(margins),
        "accuracy": asdict(interval(right, seed=seed, bounds=UNIT)),
        "calibration_error": calibration(margins).error,
        "brier": float(((1 - chances) ** 2).mean()),
        "longer_wins": fmean(longer),
    }


def outcomes(cases: Sequence[Case], opinions: Sequence[Opinion], sides: Sides) -> list[int | None]:
    """Win, tie or loss of every comparison of two sides, in order; None without a verdict."""
    verdicts = [said.of(pair) for case, said in _both(cases, opinions) for pair in case.pairs[sides]]
    return [None if own is None else own.outcome for own in verdicts]


def ranked(
    cases: Sequence[Case], opinions: Sequence[Opinion], sides: Sequence[str], *, seed: int
) -> list[dict[str, Any]]:
    """The sides in order, by the first judge's labels."""
    place = {name: k for k, name in enumerate(sides)}
    wins = np.zeros((len(cases), len(sides), len(sides)))
    for g, (case, said) in enumerate(_both(cases, opinions)):
        for (one, other), pairs in case.pairs.items():
            labels = [own.label for pair in pairs if (own := said.of(pair))]
            if labels:
                wins[g, place[one], place[other]] = fmean(labels)
                wins[g, place[other], place[one]] = 1 - fmean(labels)
    return ranking(list(sides), wins, seed=seed)


def text_figures(cases: Sequence[Case], side: str, suffix: str = "") -> dict[str, Any]:
    """How long, varied and repetitive a side writes."""
    texts = [case.text(place) for case in cases for place in case.sides[side]]
    figures = {
        "length": fmean(map(len, texts)),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": repetition(texts),
    }
    return {name + suffix: value for name, value in figures.items()}


def _length_controlled(cases: Sequence[Case], opinions: Sequence[Opinion], sides: Sides) -> dict[str, Any] | None:
    labels, own, other, clusters = [], [], [], []
    for g, (case, said) in enumerate(_both(cases, opinions)):
        for pair in case.pairs[sides]:
            if verdict := said.of(pair):
                labels.append(verdict.label)
                own.append(len(case.text(pair[0])))
                other.append(len(case.text(pair[1])))
                clusters.append(g)
    if len(set(labels)) < 2:  # nothing varies, so that nothing can be fitted
        return None
    found = length_controlled(labels, length_feature(other, own), clusters=clusters)
    error = None if found.standard_error is None else found.standard_error / 100
    return asdict(of_standard_error(found.win_rate / 100, error, len(set(clusters)), bounds=UNIT))


def _reward_figures(cases: Sequence[Case], opinions: Sequence[Opinion], sides: Sides, seed: int) -> dict[str, Any]:
    names = ("reward", "reward_against", "reward_change", "best_of_n", "best_of_n_against")
    if opinions[0].rewards is None:
        return dict.fromkeys(names)
    means: list[list[float]] = []
    curves: list[list[float]] = []
    for side in sides:
        rewards = [[(said.rewards or [])[k] for k in case.sides[side]] for case, said in _both(cases, opinions)]
        size = min(map(len, rewards))
        each = [best_of_n(own)[:size] for own in rewards]
        curves.append([fmean(column) for column in zip(*each, strict=True)])
        means.append([fmean(own) for own in rewards])
    change: Interval = interval([a - b for a, b in zip(*means, strict=True)], seed=seed)
    return dict(zip(names, (*map(fmean, means), asdict(change), *curves), strict=True))


def _both(cases: Sequence[Case], opinions: Sequence[Opinion]) -> Iterable[tuple[Case, Opinion]]:
    return zip(cases, opinions, strict=True)


def _share(of: Iterable[bool]) -> float | None:
    found = list(of)
    return sum(found) / len(found) if found else None


def _half(gap: float) -> float:
    return 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0


def _log_odds(chance: float) -> float:
    if chance in (0, 1):
        return math.copysign(LONGEST_ODDS, chance - 0.5)
    return max(-LONGEST_ODDS, min(LONGEST_ODDS, math.log(chance) - math.log1p(-chance)))


def differences(cases: Sequence[Case], opinions: Sequence[Opinion], sides: Sides) -> list[tuple[float, Case, Pair]]:
    """Of every prompt the comparison that its judge is surest of: P(the first is better) - 1/2 (of a scorer the
    difference of the rewards), the clearest loss first and the clearest win last."""
    found = []
    for case, said in _both(cases, opinions):
        known = [(verdict, pair) for pair in case.pairs[sides] if (verdict := said.of(pair))]
        if known:
            gaps = [(_gap(said, verdict, pair), pair) for verdict, pair in known]
            gap, pair = max(gaps, key=lambda own: abs(own[0]))
            found.append((gap, case, pair))
    return sorted(found, key=lambda own: own[0])


def _gap(said: Opinion, verdict: Verdict, pair: Pair) -> float:
    return verdict.label - 0.5 if said.rewards is None else said.rewards[pair[0]] - said.rewards[pair[1]]
