"""What expressions of a script are worth, beside what running them gives; and which stay unknown."""

import ast
import os

import pytest

from align.importing.values import Unread, Values

SCRIPT = """
import os
one, name = 1, "a"
table = {"x": [1, 2.5], "y": {"z": None}}

def made(size=4, *, kind="k"):
    return size

made(8)
"""
SAME = [
    "one + 2 * 3 ** 2",
    "7 // 2 / 2",
    "not one",
    "one and name",
    "None or name",
    "one and None and name",
    "one > 0",
    "name == 'b'",
    "None is not name",
    "5e-6 if one >= 1 else 0",
    "f'{name}/{one + 1}-x'",
    "name + 'b'",
    "str(name)",
    "os.path.join(name, 'b', 'c')",
    "int('3') * float('2.5')",
    "table['x']",
    "table['y']['z']",
    "[one, (name, 2)]",
    "os.environ.get('ALIGN_NOBODY_SETS', '4')",
    "int(os.getenv('ALIGN_NOBODY_SETS', '4'))",
]
"""Of which running gives the same."""
UNKNOWN = [
    "other",
    "open(name)",
    "one / 0",
    "0 ** -one",
    "(-8) ** 0.5",
    "10**98 * 10**98 * 10**98 * 10**98",
    "10**98 * 10**98 * 10**98 * 10**98 / one",
    "1.5 * 1e308 * 1e308",
    "int(1e999)",
    "one > name",
    "table[name]",
    "os.environ.get('HOME')",
    "int('x')",
    "[other]",
    "f'{other}'",
    "other if one else 2",
    "2 if other else 3",
    "None or other",
]


@pytest.fixture
def worth(tmp_path):
    values = Values(ast.parse(SCRIPT), tmp_path / "script.py")
    return lambda text: values.of(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("text", SAME)
def test_a_value_is_what_running_gives(worth, text):
    names = {"one": 1, "name": "a", "table": {"x": [1, 2.5], "y": {"z": None}}, "os": os}
    expected = eval(text, names)
    expected = [1, ["a", 2]] if text.startswith("[one") else expected
    assert worth(text) == expected and type(worth(text)) is type(expected)


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_only_running_could_tell_is_unknown(worth, text):
    assert isinstance(worth(text), Unread)


def test_what_is_asked_of_the_machine_is_as_on_one_with_a_gpu(worth):
    assert worth("torch.cuda.is_bf16_supported()") is True and worth("not is_bfloat16_supported()") is False


def test_an_argument_is_what_all_calls_give_it(worth, tmp_path):
    assert worth("size") == 8 and worth("kind") == "k"
    twice = Values(ast.parse(SCRIPT + "\nmade(9)\n"), tmp_path / "script.py")
    assert isinstance(twice.of(ast.parse("size", mode="eval").body), Unread)
