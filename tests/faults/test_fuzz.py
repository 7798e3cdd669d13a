"""Every reader on drawn inputs gives rows or a sentence, never another error; `fuzz.py` guides the same by coverage."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from drawn import ODD, PIECES, drawn_bytes, drawn_row
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import TOLD, attempt, rows, targets

from align.data.formats import read_row

SLOW = {"tokens": 15, "override": 10, "recipe": 15}
"""Examples of targets that take 10 ms each; the others have more."""


@pytest.mark.parametrize("name", targets())
def test_a_reader_gives_rows_or_a_sentence(name):
    target = targets()[name]
    logging.disable(logging.CRITICAL)  # damaged caches are said, and made again

    @settings(max_examples=SLOW.get(name, 60), deadline=None, database=None, derandomize=True)
    @given(st.binary(min_size=2, max_size=24))
    def each(data):
        attempt(target, target.made(data))

    try:
        each()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("number", range(0, len(ODD), 4))
def test_any_odd_value_in_any_column_of_any_format(number):
    for row in rows():
        for name in row:
            for odd in ODD[number : number + 4]:
                try:
                    read_row({**row, name: odd}, "rows.jsonl", 1)
                except TOLD as error:
                    assert str(error)


def numbers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where a number stands, at any depth: what holds it, and under which key."""
    for key, own in enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ():
        if isinstance(own, int | float):
            yield value, key
        yield from numbers(own)


def test_any_odd_number_in_place_of_any_number_of_any_format():
    for row in rows():
        for held, key in list(numbers(row)):
            before = held[key]
            for held[key] in (own for own in ODD if isinstance(own, int | float)):
                try:
                    read_row(row, "rows.jsonl", 1)
                except TOLD as error:
                    assert str(error)
            held[key] = before


NUMBERS = ("9" * 4400, "0x" + "f" * 4400, "1" + ":1" * 3000, "1" + "0" * 400, ".inf", "1e999", "0", "-1", "0**-1")
SCRIPT = "from trl import DPOTrainer, DPOConfig\nDPOTrainer('m', args=DPOConfig(output_dir='o', {}))\n"
PLACES = {
    "recipe": ("seed: {}", "{}: 1", "objective: {name: lambda, x: {}}"),
    "override": ("train.steps={}", "policy.model={}"),
    "specification": ("name: length, max: {}}", "name: {}}"),
    "where": ("votes > {}", "f({}) > votes"),
    "csv": ("prompt,chosen,rejected,meta\na,b,c,\"{'x': {}}\"\n", "prompt,chosen,rejected,weight\na,b,c,{}\n"),
    "import_yaml": ("base_model: m\nrl: dpo\nseed: {}\n", "stage: dpo\nmodel_name_or_path: m\npref_bco_weight: {}"),
    "import_shell": (
        "trl dpo --model_name_or_path m --seed {}",
        "swift rlhf --model m --per_device_train_batch_size {}",
    ),
    "import_script": (SCRIPT.replace("{}", "beta={}"), SCRIPT.replace("{}", "max_steps=10**98*10**98*{}, seed=f({})")),
}
"""Target -> texts with a place for a number."""


@pytest.mark.parametrize("name", PLACES)
def test_any_odd_number_in_a_text(name):
    """In any base, of more digits than Python writes, or no number of float64's."""
    for text in PLACES[name]:
        for number in NUMBERS:
            attempt(targets()[name], text.replace("{}", number).encode())


def test_what_is_drawn_reaches_what_it_is_meant_to():
    """Bytes choose: every change of a row and every odd value can be drawn, so that the tests above look at them."""
    held = [{"prompt": "q"}]
    drawn = {repr(drawn_row(bytes([0, 0, 0, 0, odd]), held)) for odd in range(len(ODD))}
    assert drawn == {repr({"prompt": odd}) for odd in ODD}
    assert drawn_row(bytes([0, 4, 0, 0]), held) == {}
    assert drawn_row(bytes([0, 5, 0, 0, 1]), held) == {"prompt": ["q"]}
    assert {drawn_bytes(bytes([0, 0, 0, piece]), [b""]) for piece in range(len(PIECES))} == set(PIECES)
