"""Pairs under the names that one publisher or another has for them."""

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.respelled import as_answer, as_conversation, read_as_general
from align.data.parts import parts_of, take
from align.data.schema import BadRow

SIDES = (
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
    ("preferred", "dispreferred"),
    ("preferred", "rejected"),
    ("preferred_response", "dispreferred_response"),
    ("accepted", "rejected"),
    ("chosen", "reject"),
)
FIRST = frozenset(own[0] for own in SIDES if own[0] != "chosen") | {"reject"}
"""One of them is in every such pair."""
STEPS = "initial_reason_steps"
RESPONSES = ("orig_response_A", "orig_response_B")
SCORES = ("orig_score_A", "orig_score_B")


@FORMAT.add
class ChosenResponse(Format):
    """A pair whose sides have other names than `chosen` and `rejected`: also `response_j` and `response_k`, `preferred`
    and `dispreferred`, `accepted` and `rejected`.

    Source: argilla/ultrafeedback-binarized-preferences, axolotl's chatml.argilla, lvwerra/stack-exchange-paired
    """

    name = "chosen_response"
    shape = "{instruction, chosen_response, rejected_response}"
    published = "Argilla, axolotl"
    any_of = tuple(chosen for chosen, _ in SIDES)
    before = ("preference", "implicit_preference")

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return _names(columns) is not None

    @staticmethod
    def read(columns: Columns) -> Columns:
        chosen, rejected = _names(columns) or SIDES[0]
        columns["chosen"], columns["rejected"] = columns.pop(chosen), take(columns, rejected)
        return read_as_general(columns, {"chosen": chosen, "rejected": rejected})


@FORMAT.add
class Prometheus(Format):
    """An instruction, two responses and which of them is preferred, `A` or `B`; the judge's own text is kept.

    Source: prometheus-eval/Preference-Collection
    """

    name = "prometheus"
    shape = "{orig_instruction, orig_response_A, orig_response_B, orig_preference}"
    published = "Prometheus Preference Collection"
    needs = ("orig_response_A", "orig_preference")
    keeps = (
        "instruction",
        "input",
        "output",
        "orig_criteria",
        "orig_feedback",
        "orig_feedback_A",
        "orig_feedback_B",
    ) + (
        "orig_reference_answer",
        *SCORES,
    )
    before = ("alpaca",)

    @staticmethod
    def read(columns: Columns) -> Columns:
        asked = "orig_instruction" if "orig_instruction" in columns else "instruction"
        prompt = take(columns, asked)
        responses = [take(columns, name) for name in RESPONSES]
        preferred = columns.pop("orig_preference")
        if preferred not in ("A", "B"):
            raise BadRow("orig_preference", f"{preferred!r} is neither A nor B", "give A or B, or remove the row")
        grades = [float(preferred == side) for side in ("A", "B")]
        return parts_of(prompt, responses, RESPONSES, grades=grades, prompt_called=f"{asked}[{{}}]")


@FORMAT.add
class StepPair(Format):
    """A right and a wrong next step of reasoning; the steps before them are the beginning of the assistant's turn.

    Source: xinlai/Math-Step-DPO-10K and Step-DPO's data preparation, which puts the steps before both sides
    """

    name = "step_pair"
    shape = "{prompt, initial_reason_steps, chosen, rejected, full_chosen, full_rejected}"
    published = "Step-DPO"
    needs = (STEPS, "prompt", "chosen", "rejected")
    keeps = ("full_chosen", "full_rejected", "answer")
    before = ("preference",)

    @staticmethod
    def read(columns: Columns) -> Columns:
        prompt = as_conversation(columns.pop("prompt"), "prompt")
        steps = columns.pop(STEPS)
        if not isinstance(steps, str):
            raise BadRow(STEPS, "not text", "give the steps before `chosen` and `rejected`, or an empty text")
        begun = [{"role": "assistant", "content": steps}] if steps else []
        sides = [as_answer(columns.pop(name), name) for name in ("chosen", "rejected")]
        return parts_of([*prompt, *begun], sides, ("chosen", "rejected"), grades=[1.0, 0.0])


def _names(columns: Columns) -> tuple[str, str] | None:
    """What the sides are called, where not more than two columns are sides."""
    if columns.keys().isdisjoint(FIRST):
        return None
    general = {name for name in ("chosen", "rejected") if name in columns}
    return next((own for own in SIDES if all(name in columns for name in own) and general <= set(own)), None)
