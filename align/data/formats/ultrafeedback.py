"""UltraFeedback as it was collected."""

from typing import Any

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.parts import parts_of, take
from align.data.schema import ATTRIBUTES, is_messages

SCORES = ("overall_score", "fine-grained_score")
KEPT = ("custom_system_prompt", "principle", "critique", "annotations")
"""What of a completion is its own, or its judge's: how its model was told to answer, and how it was judged."""


@FORMAT.add
class UltraFeedback(Format):
    """An instruction and completions of several models, each with an overall score, which is its reward, and the
    annotations of several aspects, whose ratings stay with it as `attributes`.

    Source: openbmb/UltraFeedback
    """

    name = "ultrafeedback"
    shape = "{instruction, completions: [{response, overall_score, annotations: {helpfulness: {Rating}}}]}"
    published = "OpenBMB UltraFeedback"
    needs = ("instruction", "completions")
    before = ("items",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        if not super().detect(columns):
            return False
        found = columns["completions"]
        return is_messages(found) and "annotations" in found[0]

    @staticmethod
    def read(columns: Columns) -> Columns:
        items = columns.pop("completions")
        score = next((name for name in SCORES if any(own.get(name) is not None for own in items)), SCORES[0])
        texts, scores = (
            [take(own, name, f"completions[{k}]") for k, own in enumerate(items)] for name in ("response", score)
        )
        columns[ATTRIBUTES] = [_ratings(own.get("annotations")) for own in items]
        called = {"called": "completions[{}].response", "rewards_called": f"completions[{{}}].{score}"}
        parts = parts_of(columns.pop("instruction"), texts, rewards=scores, prompt_called="instruction[{}]", **called)
        others = dict.fromkeys(key for own in items for key, value in own.items() if value is not None)
        unread = {f"completions[].{key}": [own.get(key) for own in items] for key in others}
        kept = {name: unread.pop(name) for key in KEPT if (name := f"completions[].{key}") in unread}
        for key in ("response", score):
            unread.pop(f"completions[].{key}")
        return {**parts, "unread": unread, "kept": kept}


def _ratings(annotations: Any) -> Columns:
    """The rating of each aspect that has one; others are `N/A`."""
    found = {}
    for aspect, said in annotations.items() if isinstance(annotations, dict) else ():
        rating = said.get("Rating") if isinstance(said, dict) else None
        try:
            found[aspect] = float(rating)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            continue
    return found
