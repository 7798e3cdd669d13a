"""The shapes in the signatures are text at run time, and true: jaxtyping and beartype hold calls to them."""

import inspect
from types import FunctionType
from typing import get_type_hints

import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, TypeCheckError, jaxtyped
from test_contract import SUPPLIED, padded, random_lists
from torch import Tensor

from align.objectives import OBJECTIVES, SCORES

NAMES = {"Bool": Bool, "Float": Float, "Int": Int, "Tensor": Tensor, "torch": torch}
"""What `align.tensors` leaves to a type checker."""


def typed(function):
    """A copy that refuses arguments and results of other shapes than its annotations say."""
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = get_type_hints(function, localns=NAMES)
    assert "return" in copy.__annotations__
    return jaxtyped(typechecker=beartype)(copy)


def given(function):
    return {name: value for name, value in SUPPLIED.items() if name in inspect.signature(function).parameters}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_of_an_objective(name):
    function, options = typed(OBJECTIVES[name]), given(OBJECTIVES[name])
    scores, grades, list_mask = padded(random_lists(name))
    assert function(scores, grades, list_mask, **options).shape == (len(scores),)
    for wrong in (
        (scores[:, :-1], grades, list_mask),
        (scores, grades, list_mask.double()),
        (scores[0], grades, grades),
    ):
        with pytest.raises(TypeCheckError):
            function(*wrong, **options)


@pytest.mark.parametrize("name", SCORES)
def test_of_a_score(name):
    function = typed(SCORES[name])
    logprobs, mask, index = -torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool), torch.tensor([0, 0, 1])
    assert function(logprobs, logprobs, mask, index).shape == (3,)
    for wrong in ((logprobs, logprobs, mask[:, :-1], index), (logprobs, logprobs, mask, index[:-1])):
        with pytest.raises(TypeCheckError):
            function(*wrong)
