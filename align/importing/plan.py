"""What becomes of each key of a file: kept, changed and why, or dropped and why; and the recipe that comes of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from align.errors import UserError

Verdict = Literal["kept", "changed", "dropped"]
OFF: tuple[Any, ...] = (None, False, "", [], {}, "none", "no", "None", "False", "false")
"""Values that say that something is not asked for."""
LONG = 100
"""Letters of a value in a sentence at most."""


class Line(NamedTuple):
    """One sentence of the report."""

    names: tuple[str, ...]
    """The file's keys, as it spells them."""
    value: str
    verdict: Verdict
    ours: str = ""
    """Our key and its value; nothing of what is dropped."""
    why: str = ""
    differs: bool = False
    """Whether what is learnt differs for it."""


@dataclass
class Plan:
    """A recipe in the making."""

    tool: str
    file: Path
    values: dict[str, Any]
    """What the file sets, under general names: those of TRL's command line."""
    spelled: Mapping[str, str]
    """General name -> what the file calls it."""
    defaults: Mapping[str, Any]
    """What the tool takes where its file says nothing, under general names."""
    devices: int = 1
    """Processes that the file itself starts."""
    tree: dict[str, Any] = field(default_factory=dict)
    """Our dotted key -> value."""
    comments: dict[str, str] = field(default_factory=dict)
    """Our dotted key -> what stands beside it."""
    lines: list[Line] = field(default_factory=list)
    chat_template: str | None = None
    """Jinja text that is written beside the recipe."""
    template: str | None = None
    """The tool's name of the chat template."""
    done: set[str] = field(default_factory=set)

    def given(self, name: str) -> bool:
        """Whether the file sets it to more than nothing."""
        return self.values.get(name) not in (None, "")

    def value(self, name: str) -> Any:
        """What the tool would take."""
        return self.values[name] if self.given(name) else self.defaults.get(name)

    def on(self, name: str) -> bool:
        """Whether the tool would do it."""
        return self.value(name) not in OFF and self.value(name) != 0

    def number(self, name: str) -> float:
        """A number, which YAML reads `5e-6` as a text for.

        Raises:
            UserError: it is none.
        """
        return self.as_number(name, self.value(name))

    def as_number(self, name: str, value: Any) -> float:
        """As `number`, of what stands in the value of a key."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.mistake(name, "is no number; write one") from None
        if not math.isfinite(number):
            raise self.mistake(name, "is no finite number; write one")
        return int(number) if number.is_integer() and not isinstance(value, float) else number

    def as_list(self, name: str, value: Any) -> list[Any]:
        """The value of a key, or what stands in it; empty where it asks for nothing.

        Raises:
            UserError: it is no list.
        """
        if value in OFF:
            return []
        if not isinstance(value, list | tuple):
            raise self.mistake(name, "is no list; write one")
        return list(value)

    def text(self, name: str) -> str:
        """A text, empty where the key asks for nothing.

        Raises:
            UserError: it is none.
        """
        value = self.value(name)
        if value in OFF:
            return ""
        if not isinstance(value, str):
            raise self.mistake(name, "is no text; write one")
        return value

    def spell(self, name: str) -> str:
        return self.spelled.get(name, name)

    def mistake(self, name: str, problem: str) -> UserError:
        """A sentence about one of its keys."""
        return UserError(f"{self.file}: `{self.spell(name)}: {brief(self.values.get(name))}` {problem}")

    def put(self, key: str, value: Any, of: Sequence[str] = (), why: str = "", *, differs: bool = False) -> None:
        """Set one of our keys, from those of the file's that say it.

        Args:
            key: dotted.
            of: general names.
            why: what is other than in the file; nothing where the value is taken over.
            differs: whether what is learnt differs for it.
        """
        self.tree[key] = value
        if not of:
            self.comments[key] = why
            return
        given = [name for name in of if name in self.values]
        self.done |= set(given)
        if not given:
            self.comments[key] = f"{self.tool}'s default" + (f"; {why}" if why else "")
            return
        names = tuple(self.spell(name) for name in given)
        said = ", ".join(brief(self.values[name]) for name in given)
        verdict: Verdict = "changed" if why else "kept"
        self.lines.append(Line(names, said, verdict, f"{key}: {brief(value)}", why, differs))
        own = "" if names == (key.rpartition(".")[2],) else ", ".join(names)
        self.comments[key] = ": ".join(filter(None, [own, why]))

    def drop(self, name: str, why: str, *, differs: bool = False) -> None:
        """Leave one of the file's keys out."""
        if name in self.values and name not in self.done:
            self.done.add(name)
            value = self.values[name]
            off = value in OFF
            self.lines.append(Line((self.spell(name),), brief(value), "dropped", "", why, differs=differs and not off))

    def left(self) -> list[str]:
        """The general names that nothing has been said of."""
        return [name for name in self.values if name not in self.done]


def brief(value: Any) -> str:
    """A value in a sentence."""
    text = " ".join(in_flow(value).split())
    return text if len(text) <= LONG else f"{text[: LONG - 3]}..."


def in_flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, float) and "e" in repr(value):
        mantissa, _, exponent = repr(value).partition("e")
        return f"{mantissa if '.' in mantissa else f'{mantissa}.0'}e{exponent}"  # as a float of YAML 1.1
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=100_000)
    return text.removesuffix("\n...\n").strip()
