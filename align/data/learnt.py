"""Characters that are learnt become places of tokens."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from align.data.boundary import Tokens, common_prefix, started
from align.data.encoding import Encode
from align.data.schema import Row, is_messages
from align.data.turns import Span, has_turns
from align.data.windows import windows

TOKEN_WEIGHTS = Features({"token_weights": List(List(Value("float32")))})
TokenSpan = tuple[int, int, float]
"""Of a sequence the first token that is learnt, the first behind it that is not, and the weight."""
LEARN_AT = Features({"learn_at": List(List(Value("int32")))})
"""Of each completion the places of its tokens that are learnt; of a data set in which some token is not."""


def weighed_by_message(rows: Iterable[Row]) -> tuple[bool, bool]:
    """Whether a message may be learnt in part or not at all, and whether one weighs neither 0 nor 1."""
    masked = weighted = False
    for row in rows:
        completions = [own for own in row.completions if is_messages(own)] if row.completion_ids is None else []
        weights = {message.get("weight", 1) for own in completions for message in own}  # type: ignore[union-attr]
        masked = masked or any(has_turns(own) for own in completions)  # type: ignore[arg-type]
        weighted = weighted or not weights <= {0, 1}
    return masked, weighted


def without_idle_mask(tokens: Dataset) -> Dataset:
    """The tokens without LEARN_AT where every token is learnt."""
    if "learn_at" not in tokens.column_names:
        return tokens
    for window in windows(tokens, "learn_at", "completion_ids"):
        learnt, ids = (pc.list_value_length(pc.list_flatten(column)) for column in window.columns)
        if not learnt.equals(ids):
            return tokens
    return tokens.remove_columns("learn_at")


def learnt_tokens(
    made: dict[str, Any],
    ids: list[list[int]],
    split: dict[str, Any],
    special: Tokens,
    encode: Encode,
    *,
    weighted: bool,
) -> tuple[dict[str, list[list[Any]]], int]:
    """Of a row's completions the places of the tokens that are learnt, and if asked their weights.

    Args:
        made: what `render` made of the row.
        ids: the tokens of its texts, as `encode` gives them.
        split: its prompt and completions, as `split_tokens` gives them.

    Returns:
        `learn_at` and `token_weights`, as `fit` takes them, and how many tokens before a message behind the prompt
        merge with it, so that they count as its beginning.
    """
    learnt: list[list[TokenSpan]] = []
    merged = 0
    spans = made["spans"] or [None] * len(split["completion_ids"])
    lists = zip(
        made["texts"][1:] or spans, ids[1:] or spans, spans, split["completion_ids"], made["closed"], strict=True
    )
    for text, whole, own, completion, closed in lists:
        if own is None:
            learnt.append([(0, len(completion), 1.0)])
            continue
        start = len(split["prompt_ids"]) + len(whole) - len(started(whole, special, templated=True)[0])
        found, moved = token_spans(text, whole, own, encode)
        places = [(max(begin - start, 0), end - start, weight) for begin, end, weight in found]
        behind = [count for (begin, _, _), count in zip(own, moved, strict=True) if begin > len(made["texts"][0])]
        merged += sum(behind)
        if start + len(completion) > len(whole) and own[-1][1] == len(text) and not closed:  # an end token was added
            places.append((len(completion) - 1, len(completion), own[-1][2]))
        learnt.append(places)
    columns: dict[str, list[list[Any]]] = {
        "learn_at": [[*chain.from_iterable(range(begin, end) for begin, end, _ in at)] for at in learnt]
    }
    if weighted:
        columns["token_weights"] = [[weight for begin, end, weight in at for _ in range(begin, end)] for at in learnt]
    return columns, merged


def ended_by_context(closed: Sequence[bool], fitted: dict[str, Any], special: Tokens) -> int:
    """How many whole completions end without an end token, and should."""
    lengths = fitted["completion_tokens"]
    pairs = zip(fitted["kept"], fitted["completion_ids"], strict=True)
    return sum(closed[k] and len(ids) == lengths[k] and ids[-1] not in special.ends for k, ids in pairs)


def token_spans(text: str, ids: list[int], spans: Sequence[Span], encode: Encode) -> tuple[list[TokenSpan], list[int]]:
    """The tokens that a policy would have generated, and their weights.

    A token counts from where the text before a span, tokenised alone, and the whole text part: one that spans the
    border at the beginning is the message's, one at the end is not.

    Args:
        text: the whole.
        ids: its tokens, as `encode` gives them.
        spans: of its characters, ascending.
        encode: the tokenizer.

    Returns:
        The spans of tokens, and of each how many tokens of the text before it merge with it.

    Source: ours
    """
    heads = encode.heads(text, ids, [border for start, end, _ in spans for border in (start, end)])
    places = [common_prefix([head, ids[: len(head)]]) for head in heads]
    found = [(start, end, weight) for (_, _, weight), start, end in zip(spans, places[::2], places[1::2], strict=True)]
    return found, [len(head) - place for head, place in zip(heads[::2], places[::2], strict=True)]
