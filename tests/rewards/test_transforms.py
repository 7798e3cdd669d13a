"""Transforms and combinations against their formulas in floats."""

from math import exp, log, sqrt

import pytest

from rewards import Reward, ScorerError, read_reward
from rewards.combine import combine, transforms_for
from rewards.transforms import Clip, LengthPenalty, Lsc, Standardize, Statistics, transform

REWARDS = [1.0, 2.0, 4.0, 2.0]
TEXTS = ["a", "a b", "a b c", "a b"]
MEAN, STD = 2.25, sqrt((1.25**2 + 0.25**2 + 1.75**2 + 0.25**2) / 4)


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def apply(*steps) -> list[float]:
    return transform(REWARDS, TEXTS, steps)


@pytest.mark.parametrize(
    ("step", "reference"),
    [
        (Lsc(of="own"), MEAN + 1.0364333894937898 * STD),
        (Lsc(of="own", quantile=0.5), MEAN),
        (Lsc(of="own", reference="mean"), MEAN),
        (Lsc(reference="fixed", value=3.0), 3.0),
        (Lsc(of="own", reference="quantile", quantile=0.85), 2 + 0.55 * 2),  # place 2.55 of 1, 2, 2, 4
        (Lsc(of="own", reference="quantile", quantile=0.5), 2.0),
    ],
)
def test_lsc_is_the_log_sigmoid_of_the_gap_to_the_reference(step, reference):
    assert apply(step) == pytest.approx([log(sigmoid(r - reference)) for r in REWARDS], rel=1e-12)


def test_lsc_of_huge_gaps_stays_finite():
    step = Lsc(reference="fixed")
    assert transform([-1e6, 1e6], ["", ""], [step]) == [-1e6, 0.0]


def test_standardize_by_prompt_or_by_data_set():
    assert apply(Standardize()) == pytest.approx([(r - MEAN) / STD for r in REWARDS])
    known = [None, Statistics(1.0, 4.0)]
    steps = [Clip(high=3.0), Standardize(per="dataset")]
    assert transform(REWARDS, TEXTS, steps, known) == [(r - 1.0) / 4.0 for r in (1, 2, 3, 2)]
    assert transform([0.1 + 0.2, 0.3], ["", ""], [Standardize()])[1] != 0, "unequal rewards stay so"
    assert transform([0.3] * 3, [""] * 3, [Standardize()]) == [0.0, 0.0, 0.0], "ties stay ties"


def test_clip_and_length_penalty():
    assert apply(Clip(low=1.5, high=3.0)) == [1.5, 2.0, 3.0, 2.0]
    assert apply(Clip(low=1.5)) == [1.5, 2.0, 4.0, 2.0]
    penalty = LengthPenalty(weight=10, free=1)
    assert apply(penalty) == pytest.approx([1.0, 2.0 - 0.1, 4.0 - 0.2, 2.0 - 0.1])
    assert apply(penalty, Clip(high=2.0)) == pytest.approx([1.0, 1.9, 2.0, 1.9]), "in the order given"


def test_the_reference_is_of_the_reference_policys_rewards():
    samples = [0.0, 1.0, 5.0]
    for kind, expected in (("mean", 2.0), ("quantile", 1 + 0.7 * 4), ("normal_quantile", None)):
        step = Lsc(of={"column": "base"}, reference=kind)
        if expected is None:
            expected = 2.0 + 1.0364333894937898 * sqrt((4 + 1 + 9) / 3)
        for rewards in (REWARDS, [7.0]):
            given = transform(rewards, TEXTS[: len(rewards)], [Clip(low=-9), step], (), [None, samples])
            assert given == pytest.approx([log(sigmoid(r - expected)) for r in rewards], rel=1e-12)
    with pytest.raises(ScorerError, match="the reference policy's rewards are not at hand"):
        transform(REWARDS, TEXTS, [step])
    for spec in ({"name": "lsc"}, {"name": "lsc", "reference": "fixed", "of": "own"}):
        with pytest.raises(ScorerError, match="say what the reward is held against"):
            read_reward({"scorer": {"name": "length", "max": 3}, "transforms": [spec]})


SINGLE = {
    "lsc, fixed": (Lsc(reference="fixed", value=1.0), True),
    "lsc, own quantile": (Lsc(of="own"), False),
    "lsc, own mean": (Lsc(of="own", reference="mean"), False),
    "lsc, a column": (Lsc(of={"column": "base"}), True),
    "lsc, samples": (Lsc(of={"rows": "base.jsonl"}), True),
    "standardize, prompt": (Standardize(), False),
    "standardize, dataset": (Standardize(per="dataset"), True),
    "clip": (Clip(low=-99), True),
    "length_penalty": (LengthPenalty(), True),
}
"""Every transform, and whether a reward alone in its list can come through it."""


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_completions_reward_keeps_its_order_or_is_refused(name):
    step, passes = SINGLE[name]
    given = dict(statistics=[Statistics(0.0, 2.0)], references=[[0.0, 1.0]])
    if passes:
        low, middle, high = (transform([r], ["a"], [step], **given)[0] for r in (-5.0, 0.0, 7.0))
        assert low < middle < high
    else:
        with pytest.raises(ScorerError, match="a single completion the same whatever its reward"):
            transform([1.0], ["a"], [step], **given)
    constant = transform([0.3] * 3, ["a"] * 3, [step], **given)
    assert len(set(constant)) == 1 and constant[0] == constant[0], "equal rewards stay equal, and numbers"


def test_a_weighted_sum_and_a_logical_and():
    assert combine([[1.0, 2.0], [0.5, -1.0]], [2.0, -1.0]) == [1.5, 5.0]
    rewards = [read_reward({"name": "length", "max": 3}), read_reward({"scorer": {"name": "regex", "pattern": "a"}})]
    with pytest.raises(ScorerError, match="the transforms of length have to end with lsc .* `reference: fixed`"):
        transforms_for(rewards, "and")
    ends = (Clip(low=0), Lsc(reference="fixed", value=0.5)), (Lsc(of="own"),)
    said = [reward.model_copy(update={"transforms": own}) for reward, own in zip(rewards, ends, strict=True)]
    assert transforms_for(said, "and") == list(ends)
    assert transforms_for(rewards, "weighted_sum") == [(), ()]
    parts = [transform(own, TEXTS, [Lsc(reference="fixed")]) for own in (REWARDS, REWARDS[::-1])]
    good = [sigmoid(a) * sigmoid(b) for a, b in zip(REWARDS, REWARDS[::-1], strict=True)]
    assert combine(parts, [1, 1]) == pytest.approx([log(p) for p in good])


def test_a_reward_is_read_from_what_a_user_writes(tmp_path):
    text = "{scorer: {name: length, max: 9}, weight: 0.5, transforms: [{name: clip, low: 0.2}]}"
    (tmp_path / "reward.yaml").write_text(text)
    for spec in (text, str(tmp_path / "reward.yaml")):
        reward = read_reward(spec)
        assert (reward.weight, reward.transforms, reward.scorer.max) == (0.5, (Clip(low=0.2),), 9)
    assert read_reward("some/folder") == Reward(scorer={"model": "some/folder"})
    for spec, message in [
        ("{scorer: {name: length, max: 9}, wieght: 1}", "wieght"),
        ("{scorer: {name: length, max: 9}, transforms: [{name: clip}]}", "give `low`, `high` or both"),
        ("{scorer: {name: length, max: 9}, transforms: [{name: clip, low: 2, high: 1}]}", "above high"),
    ]:
        with pytest.raises(ScorerError, match=message):
            read_reward(spec)
