"""Rows of chosen and rejected completions."""

import re
from typing import Any

from align.data.columns import Columns, check_unread, how_to_ignore
from align.data.formats.base import FORMAT, Format
from align.data.formats.conversations import ends_with_answer
from align.data.parts import has_prompt, parts_of, prompt_name, side_rewards, take, take_prompt
from align.data.schema import BadRow, UnusableRow, is_messages
from align.data.splitting import agrees, are_whole, in_one_spelling, split_conversations

SIDES = ("chosen", "rejected")
HH_ASSISTANT = "\n\nAssistant:"


@FORMAT.add
class PreferenceSets(Format):
    """Several right and several wrong completions, as benchmarks have them."""

    name = "preference_sets"
    shape = "{prompt, chosen: [...], rejected: [...]}"
    needs = ("chosen",)
    before = ("dialogue_text",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        chosen = columns.get("chosen")
        return isinstance(chosen, list) and bool(chosen) and all(isinstance(text, str) for text in chosen)

    @staticmethod
    def read(columns: Columns) -> Columns:
        sides = {name: take(columns, name) for name in SIDES}
        for name, side in sides.items():
            if not isinstance(side, list):
                raise BadRow(name, "one completion beside a list of them", "give lists in both columns")
        right, wrong = sides.values()
        names = tuple(f"{name}[{k}]" for name, side in sides.items() for k in range(len(side)))
        given = {"grades": [1.0] * len(right) + [0.0] * len(wrong), "rewards": columns.pop("rewards", None)}
        return parts_of(take_prompt(columns), [*right, *wrong], names, **given)


@FORMAT.add
class DialogueText(Format):
    """A pair of dialogues as text (`Human:`, `Assistant:`); the prompt ends with the last mark of the assistant."""

    name = "dialogue_text"
    shape = "{chosen, rejected} of dialogue text"
    needs = ("chosen",)
    before = ("implicit_preference",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        chosen = columns.get("chosen")
        return isinstance(chosen, str) and HH_ASSISTANT in chosen and not has_prompt(columns)

    @staticmethod
    def read(columns: Columns) -> Columns:
        sides = [take(columns, "chosen"), take(columns, "rejected")]
        if not isinstance(sides[1], str):
            raise BadRow("rejected", "not text", "give dialogue text as in `chosen`")
        cuts = [side.rfind(HH_ASSISTANT) + len(HH_ASSISTANT) for side in sides]
        prompts = [side[:cut] for side, cut in zip(sides, cuts, strict=True)]
        if prompts[0] != prompts[1]:
            raise UnusableRow("prompt mismatch between chosen and rejected")
        answers = [side[cut:] for side, cut in zip(sides, cuts, strict=True)]
        return parts_of(prompts[0], answers, SIDES, grades=[1.0, 0.0])


@FORMAT.add
class ImplicitPreference(Format):
    """A pair whose two sides, conversations or texts, both start with the prompt."""

    name = "implicit_preference"
    shape = "{chosen, rejected}"
    any_of = SIDES
    before = ("preference",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return Preference.detect(columns) and not has_prompt(columns)

    @staticmethod
    def read(columns: Columns) -> Columns:
        chosen, rejected = (in_one_spelling(take(columns, side), side) for side in SIDES)
        if is_messages(chosen) and is_messages(rejected):
            return {**_split_conversations(chosen, rejected), **side_rewards(columns)}
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise BadRow("chosen", "chosen and rejected are not both text or both messages", "give them in one form")
        try:
            return {**_split_texts(chosen, rejected), **side_rewards(columns), "guessed": True}
        except UnusableRow:  # perhaps their prompt stands in a column that no reader knows
            check_unread(columns, (chosen, rejected), ordered=True, prompt_is_guessed=True)
            raise


@FORMAT.add
class Preference(Format):
    """A pair beside its prompt: text, one message or whole conversations; a rater's two scores are kept as rewards."""

    name = "preference"
    shape = "{prompt, chosen, rejected}"
    any_of = SIDES
    before = ("completion",)

    @staticmethod
    def read(columns: Columns) -> Columns:
        name = prompt_name(columns) or "prompt"
        prompt = in_one_spelling(take_prompt(columns), name)
        chosen, rejected = (in_one_spelling(take(columns, side), side) for side in SIDES)
        if are_whole(prompt, (chosen, rejected)):
            parts = _split_conversations(chosen, rejected)
            if not agrees(prompt, parts["prompt"], (chosen, rejected)):
                remedy = f"give the assistant's message alone, or {how_to_ignore(name)}"
                raise BadRow("chosen", f"a conversation without the text of `{name}`", remedy)
            return {**parts, **side_rewards(columns)}
        if name != "prompt" and ends_with_answer({"messages": prompt}):
            problem = "it ends with an answer of the assistant's, in which `chosen` and `rejected` would go on"
            remedy = "end it with the user's message; where they do go on in it, call the column `prompt`"
            raise BadRow(name, problem, remedy)
        return parts_of(prompt, [chosen, rejected], SIDES, grades=[1.0, 0.0], **side_rewards(columns))


def _split_conversations(chosen: list[Any], rejected: list[Any]) -> Columns:
    prompt, completions = split_conversations((chosen, rejected))
    return parts_of(prompt, completions, SIDES, grades=[1.0, 0.0])


def _split_texts(chosen: str, rejected: str) -> Columns:
    """Cut at the last white space of the common beginning, so that no word or special token is cut in half.

    The cut lies before the end of the shorter text: where one side begins with the whole other, its last word
    belongs to the completion and not to the prompt.
    """
    shorter = min(len(chosen), len(rejected))
    common = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    spaces = [match.start() for match in re.finditer(r"\s+", chosen[: common + 1]) if match.start() > 0]
    if not spaces:
        raise UnusableRow("prompt mismatch between chosen and rejected")
    return parts_of(chosen[: spaces[-1]], [chosen[spaces[-1] :], rejected[spaces[-1] :]], SIDES, grades=[1.0, 0.0])
