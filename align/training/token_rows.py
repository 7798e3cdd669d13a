"""Rows as they are trained on, token by token, for the terminal and for a page."""

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.data.roles import weights_of
from align.evaluate.token_view import token_strings
from align.packing.batch import Example
from align.report.rows_page import Role, ShownCompletion, ShownRow, ShownToken

STYLES: dict[Role, str] = {
    "prompt": "dim",
    "learnt": "green",
    "weighed": "yellow",
    "context": "cyan",
    "scored": "green",
}


def shown_row(example: Example, tokenizer: PreTrainedTokenizerBase, *, learns: bool) -> ShownRow:
    """A tokenised list with the role of each token.

    Args:
        learns: False where a completion is scored as a whole and none of its tokens is learnt by itself.
    """
    prompt = example["prompt_ids"]
    completions = []
    for ids, weights, grade in zip(example["completion_ids"], weights_of(example), example["grades"], strict=True):
        roles = [_role(weight) if learns else "scored" for weight in weights]
        texts = token_strings(tokenizer, prompt, ids)
        tokens = [
            ShownToken(*own) for own in zip(texts, ids, roles, weights if learns else [None] * len(ids), strict=True)
        ]
        completions.append(ShownCompletion(grade, tokens))
    place = f"{example['source']}, row {example['row']}"
    return ShownRow(example["id"], place, prompt_tokens(tokenizer, prompt), completions)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[ShownToken]:
    """The tokens of a prompt."""
    return [ShownToken(text, i, "prompt") for text, i in zip(token_strings(tokenizer, [], ids), ids, strict=True)]


def in_terminal(row: ShownRow, tokenizer: PreTrainedTokenizerBase, prompt_use: str, completion_use: str) -> Text:
    """One list decoded, every token's border marked; stretches of one role stand behind its name, and in its colour.

    Args:
        prompt_use, completion_use: what training does with the tokens, in words.
    """
    text = Text()
    text.append(f"{row.id} ({row.place})\n", style="bold")
    text.append(f"prompt, {len(row.prompt)} tokens, {prompt_use}\n")
    _append(text, row.prompt, tokenizer)
    for completion in row.completions:
        size, read = len(completion.tokens), completion.count("context")
        use = f"{size - read} {completion_use}, {read} {prompt_use}" if read else completion_use
        text.append(f"grade {completion.grade:.3f}, {size} tokens, {use}\n")
        _append(text, completion.tokens, tokenizer)
    return text


def _append(text: Text, tokens: Sequence[ShownToken], tokenizer: PreTrainedTokenizerBase) -> None:
    """One line for each stretch of tokens of one role and weight."""
    for (role, weight), own in groupby(tokens, lambda token: (token.role, token.weight)):
        name = f"x{weight:.3g}" if role == "weighed" else role
        decoded = "|".join(_escaped(tokenizer, token.id) for token in own)
        text.append(f"  {name:<8} {decoded}\n", style=STYLES[role])


def _escaped(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return repr(tokenizer.decode([token]))[1:-1]


def _role(weight: float | None) -> Role:
    return "context" if weight is None else "learnt" if weight == 1 else "weighed"
