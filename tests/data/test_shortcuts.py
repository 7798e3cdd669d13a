"""Shortcuts of reading a row answer as the plain way would, which is written out here."""

import random

import pytest

from align.data.bad_row import BadRow
from align.data.parts import PROMPTS, prompt_name
from align.data.prompt import _behind
from align.data.schema import check_characters

WORDS = ["a", "ab", "Name:", "two\nlines", "", " ", "\u3042", "\u2003"]


def behind(prompt: str, answer: str) -> str | None:
    """Word by word."""
    if not prompt.strip():
        return None
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    words = prompt.split()
    found = answer.split(None, len(words) - 1)
    if len(found) < len(words) or found[:-1] != words[:-1] or not found[-1].startswith(words[-1]):
        return None
    rest = found[-1][len(words[-1]) :]
    return rest.lstrip() if prompt[-1].isspace() else rest


def test_what_an_answer_says_behind_its_prompt_is_found_as_word_by_word():
    draw = random.Random(0)
    texts = ["".join(draw.choices(WORDS, k=draw.randrange(5))) for _ in range(150)]
    texts += [f"{first}{gap}{second}" for first in texts[:12] for gap in (" ", "\n\n") for second in texts[:12]]
    found = [(_behind(prompt, answer), behind(prompt, answer)) for prompt in texts for answer in texts]
    assert all(ours == plain for ours, plain in found)
    assert sum(plain is not None and plain != "" for _, plain in found) > 100


@pytest.mark.parametrize("values", ["", "text", None])
def test_the_prompts_column_is_the_first_of_those_that_hold_something_and_prompt_ahead_of_all(values):
    draw = random.Random(0)
    for _ in range(500):
        columns = {name: draw.choice([values, "q", "", []]) for name in draw.sample(PROMPTS, draw.randrange(5))}
        named = [name for name in PROMPTS if name in columns]
        expected = next((name for name in named if name == "prompt" or columns[name]), named[0] if named else None)
        assert prompt_name(columns) == expected


@pytest.mark.parametrize("half", ["\ud800", "fine \udfff"])
def test_half_a_character_is_found_and_named_wherever_it_stands(half):
    for value, field in (
        ({"prompt": "q", "chosen": half}, "chosen"),
        ({"items": [{"text": "fine"}, {"text": half}]}, "items[1].text"),
        ({"chosen": [["\u00e9", half]]}, "chosen[0][1]"),
        ({"meta": {half: 1}}, "meta's name"),
        ({half: "q"}, "a column's name"),
        ({"a": (1, half)}, "a[1]"),
    ):
        with pytest.raises(BadRow) as refused:
            check_characters(value)
        assert refused.value.field == field
    check_characters({"caf\u00e9": [{"\u3042": "\U0001f600"}, 1, None, [1, 2], True]})
