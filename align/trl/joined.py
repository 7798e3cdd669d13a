"""Pairs of text -> token ids as TRL's CPO and ORPO make them: both sides with their prompts, and labels."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

SIDES = ("chosen", "rejected")


def render(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """A row of messages as text: the prompt is what it shares with both sides' whole conversations."""
    options = row.get("chat_template_kwargs") or {}
    asks = row["prompt"][-1]["role"] in ("user", "tool")
    how = {"add_generation_prompt": asks, "continue_final_message": not asks}
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, **how, **options)
    texts = [tokenizer.apply_chat_template(row["prompt"] + row[s], tokenize=False, **options) for s in SIDES]
    for text in texts:
        prompt = "".join(a for a, _ in takewhile(lambda both: both[0] == both[1], zip(prompt, text, strict=False)))
    return {"prompt": prompt} | {side: text[len(prompt) :] for side, text in zip(SIDES, texts, strict=True)}


class TokenizeJoined:
    """A row of text -> `<side>_input_ids`, `_attention_mask` and `_labels`, which are -100 on the prompt.

    A begin and an end token are put where they lack; of what is too long the end is cut.
    """

    def __init__(self, tokenizer: Any, sides: Sequence[str], *, tokens: int, prompt_tokens: int | None) -> None:
        """Args:
        tokens: of prompt and completion at most.
        prompt_tokens: the prompt keeps its last so many; all of them by default.
        """
        self.tokenizer, self.sides = tokenizer, tuple(sides)
        self.tokens, self.prompt_tokens = tokens, prompt_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = self._ids(row["prompt"])
        found: dict[str, Any] = {}
        for side in self.sides:
            whole = self._ids(row["prompt"] + row[side])
            place = len(prompt) - (prompt != whole[: len(prompt)])  # whose last token may merge
            before, own = self._with_ends(whole[:place], whole[place:])
            own = own[: max(0, self.tokens - len(before))]
            found |= {
                f"{side}_input_ids": before + own,
                f"{side}_attention_mask": [1] * len(before + own),
                f"{side}_labels": [-100] * len(before) + own,
            }
        return found

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _with_ends(self, prompt: list[int], own: list[int]) -> tuple[list[int], list[int]]:
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prompt = prompt[-self.prompt_tokens :] if self.prompt_tokens else prompt
        if first is not None and prompt[:1] != [first]:
            prompt = [first, *prompt]
        return prompt, own if own[-1:] == [last] else [*own, last]
