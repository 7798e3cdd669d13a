"""Where whole conversations stop being equal is where their completions begin."""

import random

import pytest

from align.data.formats.reading import read_row
from align.data.schema import BadRow, UnusableRow


def chat(spec):
    """Messages of `u:hi a:yes t:4`; a weight stands behind an `@`."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = []
    for own in spec.split():
        role, text = own.split(":")
        text, _, weight = text.partition("@")
        messages.append({"role": roles[role], "content": text, **({"weight": float(weight)} if weight else {})})
    return messages


def spec(messages):
    letters = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
    weights = [f"@{own['weight']:g}" if "weight" in own else "" for own in messages]
    return " ".join(f"{letters[own['role']]}:{own['content']}{w}" for own, w in zip(messages, weights, strict=True))


def read(**columns):
    row = read_row(columns, "f", 1)
    return spec(row.prompt), *map(spec, row.completions)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("u:q a:x", "u:q a:y", ("u:q", "a:x", "a:y")),
        ("s:i u:q a:x", "s:i u:q a:y", ("s:i u:q", "a:x", "a:y")),
        ("u:q a:x u:r a:y", "u:q a:x u:r a:z", ("u:q a:x u:r", "a:y", "a:z")),
        ("u:q a:x u:r a:y", "u:q a:z u:r a:y", ("u:q", "a:x u:r a:y", "a:z u:r a:y")),
        ("u:q a:x t:1 a:y", "u:q a:z", ("u:q", "a:x t:1 a:y", "a:z")),
        ("u:q a:x t:1 a:y", "u:q a:x t:2 a:y", ("u:q a:x", "t:1 a:y", "t:2 a:y")),
        ("u:q a:x u:r a:y", "u:q a:x u:s a:y", ("u:q a:x", "u:r a:y", "u:s a:y")),
        ("u:q a:x", "u:q a:x u:r a:y", ("u:q", "a:x", "a:x u:r a:y")),
        ("u:q a:x t:1", "u:q a:y t:2", ("u:q", "a:x t:1", "a:y t:2")),
        ("u:q a:x t:1", "u:q a:x t:2", ("u:q", "a:x t:1", "a:x t:2")),
        ("u:q a:x@0 u:r a:y", "u:q a:x u:r a:z", ("u:q a:x u:r", "a:y", "a:z")),
        ("s:i a:x", "s:i a:y", ("s:i", "a:x", "a:y")),
    ],
)
def test_the_prompt_is_what_both_sides_begin_with(chosen, rejected, expected):
    assert read(chosen=chat(chosen), rejected=chat(rejected)) == expected
    assert read(chosen=chat(rejected), rejected=chat(chosen))[1:] == (expected[2], expected[1])
    # a prompt beside them that says the same, or its beginning, or its question
    prompt = [own for own in chat(expected[0]) if own["role"] != "system" or chosen.startswith("s:i a")]
    for given in (chat(expected[0]), chat(expected[0])[:1], prompt, prompt[0]["content"]):
        assert read(prompt=given, chosen=chat(chosen), rejected=chat(rejected)) == expected
    # the completions alone, beside their prompt
    alone = (chat(side) for side in expected[1:])
    if "u:q" in expected[0]:
        assert read(prompt=chat(expected[0]), **dict(zip(("chosen", "rejected"), alone, strict=True))) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("u:q a:x", "u:r a:y"), ("s:i u:q a:x", "s:i u:r a:x"), ("s:i a:x", "s:j a:x")]
)
def test_sides_that_answer_different_questions_are_no_pair(chosen, rejected):
    with pytest.raises(UnusableRow, match="prompt mismatch between chosen and rejected"):
        read(chosen=chat(chosen), rejected=chat(rejected))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "problem"),
    [
        ("u:other", "u:q a:x", "u:q a:y", "a conversation without the text of `prompt`"),
        ("other", "u:q a:x", "u:q a:y", "a conversation without the text of `prompt`"),
        ("u:q", "u:r a:x", "a:y", "begins with the role user behind a prompt that ends with the role user"),
        ("s:i", "u:q a:x", "a:y", "begins with the role user behind a prompt that ends with the role system"),
        ("u:q", "a:x", "u:r", "messages of user"),
        ("u:q", "a:x@0 u:r a:y@0", "a:z", "every message of the assistant's has the weight 0"),
        ("u:q a:p@0.5 u:r", "a:x", "a:y", "a weight in a prompt, which is not learnt"),
    ],
)
def test_rows_whose_parts_do_not_fit_are_refused_by_name(prompt, chosen, rejected, problem):
    given = chat(prompt) if ":" in prompt else prompt
    with pytest.raises(BadRow) as error:
        read(prompt=given, chosen=chat(chosen), rejected=chat(rejected))
    assert error.value.problem == problem and error.value.field in ("chosen", "rejected", "prompt[1].weight")


def test_questions_and_results_that_all_completions_begin_with_are_the_prompts():
    lists = [chat("u:r a:x"), chat("u:r a:y t:1 a:z"), chat("u:r a:w")]
    assert read(prompt=chat("u:q a:p"), completions=lists, grades=[2, 1, 0]) == (
        "u:q a:p u:r",
        "a:x",
        "a:y t:1 a:z",
        "a:w",
    )
    assert read(prompt=chat("u:q a:p"), completion=chat("u:r a:x"), label=True) == ("u:q a:p u:r", "a:x")
    # an answer that all begin with stays the completions'
    assert read(prompt=chat("u:q"), chosen=chat("a:x u:r a:y"), rejected=chat("a:x u:r a:z"))[0] == "u:q"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("u:q a:x", ("u:q", "a:x")),
        ("u:q a:x u:r a:y", ("u:q a:x u:r", "a:y")),
        ("u:q a:x t:1 a:y", ("u:q", "a:x t:1 a:y")),
        ("u:p a:o t:2 a:n u:q a:x t:1 t:3 a:y", ("u:p a:o t:2 a:n u:q", "a:x t:1 t:3 a:y")),
        ("u:q a:x a:y", ("u:q a:x", "a:y")),
        ("u:q a:x@0 u:r a:y", ("u:q a:x u:r", "a:y")),
        ("u:q a:x@0.5 u:r a:y", ("u:q", "a:x@0.5 u:r a:y")),
        ("u:q a:x u:r a:y@2", ("u:q", "a:x u:r a:y@2")),
    ],
)
def test_a_conversation_ends_with_the_answer_to_its_last_question(messages, expected):
    assert read(messages=chat(messages), label=True) == expected


def test_any_two_conversations_lose_and_repeat_nothing():
    draw = random.Random(0)
    kinds = {"split": 0, "mismatch": 0}
    for _ in range(500):
        sides = []
        for _ in range(2):
            body = [f"{draw.choice('aut')}:{k}{draw.randrange(2)}" for k in range(draw.randrange(6))]
            sides.append(chat(" ".join(["u:q", *body, f"a:z{draw.randrange(2)}"])))
        try:
            prompt, *rests = read(chosen=sides[0], rejected=sides[1])
        except UnusableRow:
            kinds["mismatch"] += 1
            continue
        kinds["split"] += 1
        for side, rest in zip(sides, rests, strict=True):
            assert f"{prompt} {rest}" == spec(side) and "a:" in rest
        first = [rest.split()[0] for rest in rests]
        only = any(rest.count("a:") == 1 and rest.startswith("a:") for rest in rests)
        assert first[0] != first[1] or only or first[0].startswith("a:")
    assert min(kinds.values()) > 20
