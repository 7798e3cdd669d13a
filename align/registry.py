"""One thing of a kind is one class, which names all else that belongs to the thing: mostly its section in a recipe.

    SCORE = Registry("score")


    @SCORE.add
    class Likelihood(Score):
        formula = staticmethod(likelihood)
        name: Literal["likelihood"] = "likelihood"

The tables of a kind are made of its classes, so that nothing else has to be edited where a thing is added. Needs
neither torch nor what is built on it, as the sections do not: see `align.section`.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field

Thing = TypeVar("Thing")


class Registry(Generic[Thing]):
    """The classes of one kind by their `name`, in the order in which they were added."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.classes: dict[str, type[Thing]] = {}

    def add(self, thing: type[Thing]) -> type[Thing]:
        """Decorator of a class of this kind.

        Raises:
            ValueError: its name is taken; said when the module is imported.
        """
        name = _name(thing)
        if name in self.classes:
            raise ValueError(f"two classes are the {self.kind} `{name}`: {self.classes[name]} and {thing}")
        self.classes[name] = thing
        return thing

    def union(self, *others: type[BaseModel]) -> Any:
        """The type of a recipe's key that takes any of them, told apart by `name`; `others` are not of the tables."""
        return Annotated[reduce(or_, [*self.classes.values(), *others]), Field(discriminator="name")]

    def table(self, attribute: str) -> dict[str, Any]:
        """What each class says of one thing, by name."""
        return {name: getattr(thing, attribute) for name, thing in self.classes.items()}


def _name(thing: Any) -> str:
    """What a class is called: by its field's default where it is a recipe's section."""
    name = thing.model_fields["name"].default if issubclass(thing, BaseModel) else thing.name
    return str(name)


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a folder, in alphabetical order, so that what they add is there: no list to keep."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
