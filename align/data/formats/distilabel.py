"""Rows that distilabel writes, and those that Argilla published of them."""

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.pairs import Preference
from align.data.formats.respelled import read_as_general
from align.data.parts import has_prompt, parts_of, take_prompt
from align.data.schema import UnusableRow, is_messages

RATINGS = ("ratings", "rating", "ranks")
GENERATIONS = ("generations", "candidates_completions", "new_generations", "raw_generation_responses")
UNRATED = ("generation_prompt", "raw_generation_responses", "new_generations")
MADE_OF = ("generation_prompt", "raw_generation_responses", "labelling_prompt", "raw_labelling_response")
"""What it was made of: prompts as they were sent, and answers before they were parsed."""


@FORMAT.add
class Distilabel(Format):
    """Generations with a rating each, or a rank, with whatever else the pipeline wrote; `chosen` and `rejected` are two
    of them.

    Source: distilabel's UltraFeedback task and FormatTextGenerationDPO; argilla/distilabel-intel-orca-dpo-pairs and
    argilla/OpenHermesPreferences
    """

    name = "distilabel"
    shape = "{instruction, generations, ratings}"
    published = "distilabel, Argilla"
    keeps = (*MADE_OF, "original_chosen", "original_rejected")
    before = ("distilabel_pair", "lists", "preference", "implicit_preference")

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        if columns.keys().isdisjoint(GENERATIONS[:2]):
            return False
        return _texts(columns) is not None and _rated(columns) is not None and has_prompt(columns)

    @staticmethod
    def read(columns: Columns) -> Columns:
        name, rated = _texts(columns) or "", _rated(columns) or ""
        texts, ratings = columns.pop(name), columns.pop(rated)
        if any(rating is None for rating in ratings):
            raise UnusableRow("a generation without a rating")
        sign = -1 if rated == "ranks" else 1
        rewards = [sign * value if _is_number(value) else value for value in ratings]
        return parts_of(take_prompt(columns), texts, f"{name}[{{}}]", rewards=rewards, rewards_called=f"{rated}[{{}}]")


@FORMAT.add
class DistilabelPair(Format):
    """A pair beside what it was chosen from, which has no ratings of its own: earlier answers, whole conversations.

    Source: argilla/distilabel-capybara-dpo-7k-binarized
    """

    name = "distilabel_pair"
    shape = "{chosen, rejected, raw_generation_responses, rating_chosen, rating_rejected}"
    published = "Argilla (Capybara), distilabel"
    keeps = (*MADE_OF, "new_generations", "original_response", "conversation", "order")
    any_of = UNRATED
    before = ("preference", "implicit_preference")

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return super().detect(columns) and Preference.detect(columns)

    @classmethod
    def read(cls, columns: Columns) -> Columns:
        kept = {name: columns.pop(name) for name in cls.keeps if name in columns}
        parts = read_as_general(columns, {})
        return {**parts, "kept": kept | parts.get("kept", {})}


@FORMAT.add
class WholeCompletion(Format):
    """A `completion` that is the whole conversation, with a `label`.

    Source: argilla/kto-mix-15k, axolotl's kto chatml.argilla_chat
    """

    name = "whole_completion"
    shape = "{completion: [messages], label}"
    published = "Argilla (kto-mix), axolotl"
    before = ("completion",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        said = columns.get("completion")
        return is_messages(said) and said[0].get("role") != "assistant" and not has_prompt(columns)  # type: ignore[index]

    @staticmethod
    def read(columns: Columns) -> Columns:
        columns["messages"] = columns.pop("completion")
        return read_as_general(columns, {"messages": "completion"})


def _texts(columns: Columns) -> str | None:
    return next((name for name in GENERATIONS[:2] if isinstance(columns.get(name), list)), None)


def _rated(columns: Columns) -> str | None:
    return next((name for name in RATINGS if isinstance(columns.get(name), list)), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
