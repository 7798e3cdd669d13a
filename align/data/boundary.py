"""Where a prompt ends, which tokens stand around it, and how a list is made to fit: on token ids alone."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rewards.templates import tags_of

Overlong = Literal["truncate", "drop_completion", "drop_list"]


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer puts around a text."""

    prefix: tuple[int, ...]
    """The tokens before a plain text."""
    suffix: tuple[int, ...]
    """The tokens behind a plain text."""
    bos: int | None
    eos: int | None
    ends: frozenset[int]
    """Tokens that end a completion."""
    specials: tuple[str, ...]
    """Special tokens as text."""
    tags: tuple[str, ...]
    """Added tokens that are written like `<this>`, special or not; the start token is none of them."""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """What this tokenizer puts before a text, and which tokens can end one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in reversed(range(len(full) + 1)) if full[i : i + len(bare)] == bare)
    added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items() if text.special}
    no_end = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    ends = frozenset({*added, *tokenizer.all_special_ids} - no_end)
    around = tuple(full[:start]), tuple(full[start + len(bare) :])
    return Tokens(
        *around, tokenizer.bos_token_id, tokenizer.eos_token_id, ends, tuple(added.values()), tags_of(tokenizer)
    )


def split_tokens(
    texts: list[list[int]],
    special: Tokens,
    *,
    templated: bool,
    append_eos: bool | None,
    continued: bool = True,
    closed: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """A row's prompt and completions, cut where all of its token sequences still agree.

    Args:
        texts: token ids of the prompt, then of the prompt with each completion.
        special: the tokenizer's.
        templated: whether a chat template made the texts and so placed start and end tokens.
        append_eos: whether each completion ends with an end token; None: as the tokenizer ends a text by itself.
        continued: whether every text goes on from the prompt's; else the template writes the prompt's end differently
            beside an answer, and the tokens behind the cut are in no completion.
        closed: completions that get no end token, whatever they end with.

    Returns:
        prompt_ids, completion_ids, and moved_tokens (of the prompt, now in the completions), dropped_tokens (likewise,
        but in nothing), bos_stripped, eos_added (end tokens that the template lacks).

    Source: ours
    """
    prompt, *joint = [started(ids, special, templated)[0] for ids in texts]
    ends = special.ends if templated else {special.eos}
    eos_added = 0
    boundary = common_prefix([prompt, *joint])
    completions = []
    for ids, is_closed in zip(joint, closed or [False] * len(joint), strict=True):
        completion = ids[boundary:]
        if append_eos and not is_closed and (not completion or completion[-1] not in ends):
            completion = [*completion, special.eos]  # type: ignore[list-item]
            eos_added += templated
        ended = completion[-1:] == [special.eos] and special.suffix == (special.eos,)  # by the text itself
        if append_eos is None and not templated and not ended:
            completion = [*completion, *special.suffix]
        completions.append(completion)
    return {
        "prompt_ids": prompt[:boundary],
        "completion_ids": completions,
        "moved_tokens": (len(prompt) - boundary) * continued,
        "dropped_tokens": (len(prompt) - boundary) * (not continued),
        "bos_stripped": started(texts[0], special, templated)[1],
        "eos_added": eos_added,
    }


def common_prefix(sequences: list[list[int]]) -> int:
    """How many leading tokens all sequences share."""
    low, high = min(sequences), max(sequences)
    start, end = 0, min(len(low), len(high))
    if low[:end] == high[:end]:
        return end
    while end - start > 1:  # equal before `start`, and not up to `end`
        middle = (start + end) // 2
        start, end = (middle, end) if low[start:middle] == high[start:middle] else (start, middle)
    return start


def fit(
    prompt: list[int],
    completions: list[list[int]],
    grades: list[float],
    *,
    max_length: int,
    max_prompt_length: int | None,
    overlong: Overlong,
    special: Tokens,
    token_weights: list[list[float]] | None = None,
    learn_at: list[list[int]] | None = None,
) -> dict[str, Any]:
    """A row within its lengths, and what that cost.

    Args:
        prompt: token ids.
        completions: token ids, end token included.
        grades: one per completion.
        max_length: tokens of prompt plus completion at most.
        max_prompt_length: tokens of the prompt at most.
        overlong: truncate (the end token goes too), drop_completion or drop_list.
        special: the tokenizer's.
        token_weights: one number per learnt token, where the row has them.
        learn_at: of each completion the ascending places of the tokens that are learnt; by default all are. A
            completion that keeps none of them is dropped, as an empty one is.

    Returns:
        prompt_ids, completion_ids, grades, the places of those kept, token_weights and learn_at where given, and the
        counts; `refused` is a reason where nothing is left.

    Source: ours
    """
    full_prompt = prompt
    if max_prompt_length is not None and len(prompt) > max_prompt_length:
        keep_bos = prompt[0] == special.bos and max_prompt_length > 1
        prompt = prompt[:keep_bos] + prompt[len(prompt) - max_prompt_length + keep_bos :]
    room = max_length - len(prompt)
    refused = ""
    if not prompt:
        refused = "no prompt token before the completions"
    elif room <= 0:
        refused = "prompt fills max_length"
    elif overlong == "drop_list" and any(len(ids) > room for ids in completions):
        refused = "a completion beyond max_length"
    long = [len(ids) > room for ids in completions]
    learnt = (
        [min(len(ids), room) for ids in completions] if learn_at is None else [bisect_left(at, room) for at in learn_at]
    )
    kept = [k for k, count in enumerate(learnt) if count > 0 and not (long[k] and overlong == "drop_completion")]
    kept_ids = [] if refused else [completions[k][:room] for k in kept]
    by_token = {"token_weights": token_weights, "learn_at": learn_at}
    cut = {
        name: [] if refused else [own[k][: learnt[k]] for k in kept]
        for name, own in by_token.items()
        if own is not None
    }
    return cut | {
        "prompt_ids": prompt,
        "completion_ids": kept_ids,
        "grades": [] if refused else [grades[k] for k in kept],
        "kept": [] if refused else kept,
        "refused": refused,
        "prompt_tokens": len(full_prompt),
        "completion_tokens": [len(ids) for ids in completions],
        "prompt_cut": len(prompt) < len(full_prompt),
        "truncated": 0 if refused else sum(long[k] for k in kept),
        "dropped": 0 if refused else len(completions) - len(kept),
        "missing_eos": sum(ids[-1] not in special.ends for ids in kept_ids),
        "identical_uncut": all(ids == completions[0] for ids in completions),
        "identical": len(kept_ids) > 1 and all(ids == kept_ids[0] for ids in kept_ids),
    }


def started(ids: list[int], special: Tokens, templated: bool) -> tuple[list[int], bool]:
    """The ids with their start token once, and whether the text had brought a second one."""
    if templated:
        doubled = special.bos is not None and ids[:2] == [special.bos, special.bos]
        return ids[doubled:], doubled
    if special.prefix and tuple(ids[: len(special.prefix)]) == special.prefix:
        return ids, True
    return [*special.prefix, *ids], False
