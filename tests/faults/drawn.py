"""Rows and texts made of bytes: each byte chooses, so that what draws bytes, or is guided by them, draws rows."""

import json
from copy import deepcopy
from typing import Any

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 0.5, -100, 10**400, -(10**400), 2**31, 2**63, 1e308, float("inf"), float("nan")),
    *(
        "",
        " ",
        "\x00",
        "\ud800",
        "\u2028",
        "\ufeff",
        "a",
        "1",
        "0.5",
        "tie",
        "A",
        "null",
        "[",
        "[1, 2]",
        '{"a": 1, "a": 2}',
    ),
    *(
        '[{"role": "user", "content": "q"}]',
        "[{'role': 'user'}]",
        "{" * 200,
        "[" * 200 + "]" * 200,
        "9" * 5000,
        "<|end|>",
    ),
    *([], {}, [None], [[]], [{}], [1], [1.5], ["a"], ["a", "b"], [True], [[1], [2]], [{"text": "a"}, {"text": "b"}]),
    *({"a": 1}, {"role": "user"}, {"role": "assistant", "content": None}, {"from": "gpt", "value": "a"}, DEEP),
    *(TALK, TALK[1:], [{"role": "tool", "content": [1]}], [{"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    *([{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}], "weight": 10**400}], [CALL]),
)
"""Values that some reader may stumble over."""


class Choices:
    """Bytes that are chosen by, one after the other; behind the last each choice is the first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def below(self, bound: int) -> int:
        """A number from 0 to below a bound, of one byte or two."""
        found = 0
        for _ in range(1 if bound <= 256 else 2):
            found = found * 256 + (self.data[self.place] if self.place < len(self.data) else 0)
            self.place += 1
        return found % max(bound, 1)

    def of(self, values: Any) -> Any:
        return values[self.below(len(values))]

    @property
    def left(self) -> bool:
        return self.place < len(self.data)


def drawn_row(data: bytes, rows: list[dict[str, Any]]) -> Any:
    """One of the rows with as many changes as there are bytes for: values, keys and columns of others."""
    choices = Choices(data)
    row: Any = deepcopy(choices.of(rows))
    while choices.left:
        change, place = choices.below(8), _place(row, choices)
        if place is None:
            return choices.of(ODD)
        held, key = place
        if change < 4:
            held[key] = deepcopy(choices.of(ODD))
        elif change == 4:
            del held[key]
        elif change == 5:
            held[key] = [held[key]] if choices.below(2) else {str(choices.of(ODD)): held[key]}
        elif isinstance(held, dict):
            other = choices.of(rows)
            name = choices.of([*other]) if change == 6 else str(choices.of(ODD))[:50]
            held[name] = deepcopy(other.get(name, held[key]))
        else:
            held.append(deepcopy(held[key]))
    return row


def _place(value: Any, choices: Choices) -> tuple[Any, Any] | None:
    """An object or a list within a value, and a key of it; deeper as the bytes say."""
    found = None
    while isinstance(value, dict | list) and value:
        key = choices.of([*value]) if isinstance(value, dict) else choices.below(len(value))
        found, value = (value, key), value[key]
        if not choices.below(3):
            break
    return found


PIECES = tuple(
    piece.encode()
    for piece in (
        *(
            '"',
            "'",
            "{",
            "}",
            "[",
            "]",
            ":",
            ",",
            "\n",
            "\\",
            "\\ud800",
            "\\u0000",
            "\ufeff",
            "NaN",
            "Infinity",
            "1e999",
        ),
        *("- ", ": ", "\t", "\r\n", "&a", "*a", "!!python/object:os.system", "<<: ", "{{ ", " }}", "{% ", " %}", "%s"),
        *(
            "9" * 4400,
            "[" * 300,
            "(" * 300,
            "{" * 300,
            "not " * 300,
            " == ",
            " and ",
            "`",
            "é",
            "\x00",
            "--",
            "$(",
            "lambda: ",
        ),
    )
) + (b"\xff", b"\xed\xa0\x80", b"\x1f\x8b")
"""What a text may be broken with."""


def drawn_bytes(data: bytes, texts: list[bytes]) -> bytes:
    """One of the texts, cut, doubled, and with pieces put in, as the bytes say."""
    choices = Choices(data)
    text = choices.of(texts)
    while choices.left:
        change, at = choices.below(4), choices.below(min(len(text), 65535) + 1)
        if change == 0:
            text = text[:at] + choices.of(PIECES) + text[at:]
        elif change == 1:
            text = text[:at] + text[at + 1 + choices.below(16) :]
        elif change == 2:
            text = text[:at] + bytes([choices.below(256)]) + text[at + 1 :]
        else:
            text = text[:at] + text[: choices.below(64)] + text[at:]
    return text


def as_line(row: Any) -> bytes:
    return json.dumps(row).encode("utf-8", "surrogatepass") + b"\n"
