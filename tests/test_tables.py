"""Tables in a narrow terminal."""

from pathlib import Path

import pytest
from rich.console import Console

import align
from align.tables import Table

WORDS = ("best_logprob_change", "ches-lower-quarter", "-0.135 ± 0.046")


@pytest.mark.parametrize("width", [12, 20, 40])
def test_a_narrow_terminal_cuts_nothing_off(width):
    table = Table("", WORDS[0])
    table.add_row(*WORDS[1:])
    console = Console(width=width)
    with console.capture() as shown:
        console.print(table)
    cells = [line.strip("┃│").replace("┃", "│").split("│") for line in shown.get().splitlines() if line[0] in "┃│"]
    columns = ("".join("".join(own).split()) for own in zip(*cells, strict=True))
    assert [*columns] == [WORDS[1], "".join((WORDS[0] + WORDS[2]).split())]


def test_every_table_is_one_of_these():
    files = [file for file in Path(align.__file__).parent.rglob("*.py") if "bench" not in file.parts]
    assert not [file for file in files if "from rich.table import Table" in file.read_text(encoding="utf-8")]
