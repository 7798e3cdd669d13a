"""NVIDIA's HelpSteer: ratings of several attributes, and preferences with their strength."""

import re
from typing import Any

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.verdicts import STRENGTH, signed
from align.data.parts import parts_of, take
from align.data.schema import ATTRIBUTES, is_messages

RATED = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
"""What stands between the turns of a prompt of several."""


@FORMAT.add
class HelpSteer(Format):
    """A response with five ratings. Neighbouring rows of one prompt are a list, ordered by `helpfulness`; all five stay
    with it as `attributes`. A prompt of one turn is the user's message too.

    Source: nvidia/HelpSteer and nvidia/HelpSteer2
    """

    name = "helpsteer"
    shape = "{prompt, response, helpfulness, correctness, coherence, complexity, verbosity}"
    published = "NVIDIA HelpSteer and HelpSteer2"
    needs = ("prompt", "response", *RATED)
    numbers = RATED
    joins = ("prompt",)
    before = ("completion",)

    @staticmethod
    def read(columns: Columns) -> Columns:
        prompt = turns_of(columns.pop("prompt"))
        response = columns.pop("response")
        rated = {name: columns.pop(name) for name in RATED}
        if not isinstance(response, list):
            response, rated = [response], {name: [value] for name, value in rated.items()}
        columns[ATTRIBUTES] = [_ratings(rated, k) for k in range(len(response))]
        called = "response[{}]", "helpfulness[{}]"
        return parts_of(prompt, response, called[0], rewards=rated["helpfulness"], rewards_called=called[1])


@FORMAT.add
class HelpSteer2Preference(Format):
    """Two responses and which is better, from -3 (the first, by far) to 3; 0 is a tie. How strong the preference is
    stays with the row as `strength`.

    Source: nvidia/HelpSteer2, folder `preference`
    """

    name = "helpsteer2_preference"
    shape = "{prompt, response_1, response_2, preference_strength}"
    published = "NVIDIA HelpSteer2-Preference"
    needs = ("prompt", "response_1", "response_2", "preference_strength")
    numbers = ("preference_strength",)
    keeps = (
        "preference_statement",
        "preference_elaboration",
        "three_most_similar_preferences",
        "all_preferences_unprocessed",
    )

    @staticmethod
    def read(columns: Columns) -> Columns:
        grades, strength = signed(columns.pop("preference_strength"), "preference_strength", 3)
        names = ("response_1", "response_2")
        parts = parts_of(turns_of(columns.pop("prompt")), [columns.pop(name) for name in names], names, grades=grades)
        return {**parts, "kept": {STRENGTH: strength}}


@FORMAT.add
class HelpSteer3(Format):
    """A conversation, two responses and which is better, from -3 (the first, by far) to 3; 0 is a tie. How strong the
    preference is stays with the row as `strength`.

    Source: nvidia/HelpSteer3, configuration `preference`
    """

    name = "helpsteer3"
    shape = "{context, response1, response2, overall_preference}"
    published = "NVIDIA HelpSteer3"
    needs = ("response1", "response2", "overall_preference")
    numbers = ("overall_preference",)
    keeps = ("individual_preference",)

    @staticmethod
    def read(columns: Columns) -> Columns:
        grades, strength = signed(columns.pop("overall_preference"), "overall_preference", 3)
        names = ("response1", "response2")
        sides = [columns.pop(name) for name in names]
        return {**parts_of(take(columns, "context"), sides, names, grades=grades), "kept": {STRENGTH: strength}}


def turns_of(prompt: Any) -> Any:
    """A prompt as messages: of several turns those, else the user's, so that one chat template writes all rows."""
    if is_messages(prompt) and len(prompt) == 1 and prompt[0].get("role") == "user":  # a source of `turns` has made it
        prompt = prompt[0].get("content")
    if not isinstance(prompt, str) or not prompt.strip():
        return prompt
    marked = TURN.split(prompt)
    roles = ["user", *(role.lower() for role in marked[1::2])]
    turns = [{"role": role, "content": text} for role, text in zip(roles, marked[::2], strict=True)]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _ratings(rated: dict[str, Any], k: int) -> Columns:
    """What one of the responses was given; a list of another length is found out by who checks the rewards."""
    return {name: values[k] if isinstance(values, list) and k < len(values) else None for name, values in rated.items()}
