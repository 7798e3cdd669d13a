"""What a command of `align` is: a name, what it runs and its options, each stated once, in argparse's own words.

The tables stand in `options.py` of the room that runs them, which imports nothing heavy: `align --help` reads them all.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from align.consent import ALLOW, TRUST
from align.shipped import with_shipped_paths


class Option(NamedTuple):
    """One argument: names and keywords of `ArgumentParser.add_argument`; the function takes it as `dest`."""

    names: tuple[str, ...]
    keywords: dict[str, Any]


def option(*names: str, **keywords: Any) -> Option:
    return Option(names, keywords)


class Command(NamedTuple):
    """One command, or with no `runs` a group of those whose names begin with its own."""

    name: str
    """Its words, such as `evaluate rows`."""
    help: str
    runs: str = ""
    """module:function, imported when it runs; called with every option by its `dest`."""
    options: tuple[Option, ...] = ()
    light: bool = False
    """Whether it runs without torch, which takes seconds to load."""
    goes_on: bool = False
    """Whether the same command goes on after an interrupt."""
    before: Callable[[dict[str, Any]], None] | None = None
    """Told what the command is called with before anything heavy is loaded, to refuse it then."""
    more: str = ""
    """What `--help` says at its end."""


class Parser(argparse.ArgumentParser):
    """Answers a misspelt word with the nearest that is there, below the usage of the command it was given to."""

    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = [] if args is None else list(args)
        parsed, rest = super().parse_known_args(args, namespace)
        if rest and "command" in parsed and "overrides" not in parsed:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed, rest

    def nearest(self, word: str) -> str | None:
        """The option that a word is meant for; None where it is one, or like none."""
        given, known = word.partition("=")[0], list(self._option_string_actions)
        if not re.match(r"--?[a-zA-Z]", given) or any(one.startswith(given) for one in known):
            return None
        plain = "--" + given.lstrip("-").replace("_", "-").lower()
        return next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=0.7)), None)

    def error(self, message: str) -> NoReturn:
        hints = [f"; for `{word}`, did you mean `{near}`?" for word in self.words if (near := self.nearest(word))]
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            alike = difflib.get_close_matches(choice[1], re.findall(r"[^', ]+", choice[2]), n=1)
            hints += [f"; did you mean `{one}`?" for one in alike]
        super().error(message + "".join(hints))


TRUST_REMOTE_CODE = option(TRUST, action="store_true", help="run the Python code that a model's folder comes with")
ALLOW_CODE = option(ALLOW, action="store_true", help="run functions that a stranger's file or a run directory names")


def add_commands(parser: Parser, commands: Iterable[Command]) -> None:
    """The parser of each command, below those of its group; `command` and `parser` of what is parsed name it."""
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for command in commands:
        group, _, name = command.name.rpartition(" ")
        own = groups[group].add_parser(name, help=command.help, description=command.help, epilog=command.more)
        if not command.runs:
            groups[command.name] = own.add_subparsers(required=True, metavar="WHAT")
            continue
        for one in command.options:
            own.add_argument(*one.names, **one.keywords)
        own.set_defaults(command=command, parser=own)


def _checked(what: str, read: Callable[[str], Any], holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type of options: text -> what it says, where that holds."""

    def checked(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} is no {what}")
        return value

    return checked


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)


positive = _checked("whole number of 1 or more", _whole, lambda value: value >= 1)
count = _checked("whole number of 0 or more", _whole, lambda value: value >= 0)
not_negative = _checked("number of 0 or more", float, lambda value: 0 <= value < math.inf)
fraction = _checked("number above 0 and below 1", float, lambda value: 0 < value < 1)
share = _checked("number above 0 and up to 1", float, lambda value: 0 < value <= 1)


def shipped(text: str) -> str:
    """Rows or a model that may ship: a path that works from every folder."""
    return str(with_shipped_paths(text))
