"""What is said of a recipe's keys, in the words of a command that is told of no recipe."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from align.errors import UserError

WORDS = {
    r"set `policy\.chat_template: plain` \(without a recipe (.*?)\)": r"give \1",
    r"policy\.chat_template: ": "--chat-template: ",
    r"rollout\.max_tokens: ": "--max-tokens: ",
    r"(set|give) `policy\.chat_template`": r"give a `--chat-template`",
    r"`policy\.chat_template`": "`--chat-template`",
    r"set `data\.append_eos: false`": "give `--no-append-eos`",
    r"data\.append_eos: ": "--append-eos: ",
    r"leave (it|them) out with \S*data\.ignore=.*? \(without a recipe (.*?)\)": r"leave \1 out with \2",
    r"data\.ignore: ": "--ignore: ",
    r"the source's `columns: \{.*?\}` \(without a recipe (.*?)\)": r"\1",
    r"the source's `columns`": "`--column`",
    r"the source's `where`": "`--where`",
    r"set `turns: true` for this source, .* as two sources": "give the two kinds of rows in two files",
    r"data\.sources: no training row is left": "no row is left",
    r"mend them or add others": "mend them, or give others",
}
"""A pattern of what a recipe's user is told -> what it is here."""


@contextmanager
def in_options() -> Iterator[None]:
    """Raise what is raised within in the options that the user has.

    Raises:
        UserError: as within.
    """
    try:
        yield
    except UserError as error:
        said = str(error)
        for pattern, own in WORDS.items():
            said = re.sub(pattern, own, said)
        raise UserError(said) from None
