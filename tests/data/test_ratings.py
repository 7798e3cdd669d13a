"""Ratings by name, in every place where rows hold them."""

import math

import pytest

from align.data.formats import read_row
from align.data.ratings import ratings_of
from align.errors import UserError

NAMES = ("helpfulness", "depth")
ONE = [[4.0, 2.0]]
TWO = [[4.0, 2.0], [1.0, math.nan]]
ROWS = {
    "HelpSteer2": ({"prompt": "p", "response": "a", "helpfulness": 4, "verbosity": 1, "depth": 2}, ONE),
    "cells": ({"prompt": "p", "response": "a", "helpfulness": "4", "depth": "2.0"}, ONE),
    "scores": ({"prompt": "p", "completion": "a", "scores": {"helpfulness": 4, "depth": 2}}, ONE),
    "missing": ({"prompt": "p", "response": "a", "scores": {"helpfulness": 4, "depth": None}}, [[4.0, math.nan]]),
    "items": (
        {"prompt": "p", "items": [{"text": "a", "scores": {"helpfulness": 4, "depth": 2}},
                                  {"text": "b", "scores": {"helpfulness": 1}}]}, TWO),
    "canonical": (
        {"prompt": "p", "completions": ["a", "b"],
         "attributes": [{"helpfulness": 4, "depth": 2.0}, {"helpfulness": 1, "depth": None}]}, TWO),
    "no object": ({"prompt": "p", "completions": ["a", "b"], "attributes": [None, {"depth": 3}]},
                  [[math.nan, math.nan], [math.nan, 3.0]]),
    "columns": ({"prompt": "p", "completions": ["a", "b"], "helpfulness": [4, 1], "depth": [2, None]}, TWO),
    "pair": ({"prompt": "p", "chosen": "a", "rejected": "b", "helpfulness": [4, 1], "depth": [2, None]}, TWO),
    "none": ({"prompt": "p", "completions": ["a"]}, [[math.nan, math.nan]]),
}  # fmt: skip
BAD = {
    "one of two": ({"prompt": "p", "chosen": "a", "rejected": "b", "depth": 2}, "depth: 1 ratings for 2 completions"),
    "text": ({"prompt": "p", "response": "a", "depth": "high"}, "depth: 'high' is no number"),
    "beyond": ({"prompt": "p", "response": "a", "depth": 10**400}, "depth: a whole number beyond float64"),
    "truth": ({"prompt": "p", "completions": ["a"], "attributes": [{"depth": True}]}, "depth: True is no number"),
    "too few": ({"prompt": "p", "completions": ["a", "b"], "attributes": [{}]}, "attributes: not a list of 2 objects"),
}


@pytest.mark.parametrize("name", ROWS)
def test_ratings(name):
    raw, expected = ROWS[name]
    found = ratings_of(read_row(dict(raw), "f", 1), NAMES)
    assert str(found) == str(expected)  # NaN equals NaN as text


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_rating_is_refused_with_its_place(name):
    raw, message = BAD[name]
    with pytest.raises(UserError, match=f"f, row 7, field {message}"):
        ratings_of(read_row(dict(raw), "f", 7), NAMES)
