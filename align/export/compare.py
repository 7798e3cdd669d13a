"""An export read again by its engine and held against what was trained."""

from typing import Any

import torch

from align.errors import UserError
from align.export.engines import Engine
from align.export.heldout import HeldOut, read_lists


def compare(held: HeldOut, engine: Engine) -> dict[str, Any]:
    """What reading an export again has given, by stable names.

    Args:
        held: with the trained policy's log-probabilities.

    Returns:
        `engine`, `compared_on`, `lists`, `completions`, `tokens`; `max_logprob_difference` and
        `mean_logprob_difference` over the completions' tokens, in nats; `pair_accuracy_before` and `_after`, None
        without pairs, ranked by `pair_accuracy_by`; `prompts_compared`, `token_ids_equal` (None where no prompt was
        compared) and `first_other_prompt`.

    Source: ours
    """
    logprobs = read_lists(held, engine.logprobs, engine.said)
    moved = torch.cat(
        [
            (own - exact).abs()
            for every, their in zip(held.logprobs, logprobs, strict=True)
            for exact, own in zip(every, their, strict=True)
        ]
    )
    return {
        "engine": engine.said,
        "compared_on": held.said,
        "lists": len(held.prompt_ids),
        "completions": sum(map(len, held.completion_ids)),
        "tokens": held.tokens,
        "max_logprob_difference": moved.max().item(),
        "mean_logprob_difference": moved.mean().item(),
        "pair_accuracy_by": held.ranked_by,
        "pair_accuracy_before": held.pair_accuracy(held.logprobs),
        "pair_accuracy_after": held.pair_accuracy(logprobs),
        **_prompts(held, engine),
    }


def _prompts(held: HeldOut, engine: Engine) -> dict[str, Any]:
    """Whether the export's own tokenizer and template read the prompts as the policy did."""
    read = [(prompt, engine.prompt_ids(prompt)) for prompt in held.prompts]
    other = [(prompt, ids) for prompt, ids in read if ids is not None and list(ids) != prompt.token_ids]
    compared = sum(ids is not None for _, ids in read)
    first = None
    if other:
        prompt, ids = other[0]
        first = {"place": prompt.place, "trained": prompt.token_ids, "export": list(ids or ())}
    return {
        "prompts_compared": compared,
        "token_ids_equal": not other if compared else None,
        "first_other_prompt": first,
    }


def refuse_other(found: dict[str, Any], tolerance: float) -> None:
    """Refuse an export that is another model than what was trained.

    Args:
        found: as `compare` gives it.
        tolerance: nats of a token's log-probability, on average.

    Raises:
        UserError: a prompt is read as other token ids, or the log-probabilities differ by more.

    Source: ours
    """
    if found["token_ids_equal"] is False:
        raise UserError(_other_prompt(found))
    if not found["mean_logprob_difference"] <= tolerance:
        raise UserError(
            f"{found['engine']} gives log-probabilities that are {found['mean_logprob_difference']:.2g} nats off on "
            f"average ({found['max_logprob_difference']:.2g} at most, on {found['compared_on']}), more than "
            f"{tolerance:g}: the export is another model than what was trained, and is not kept; store it in more "
            "bits, or give --tolerance"
        )


def _other_prompt(found: dict[str, Any]) -> str:
    other = found["first_other_prompt"]
    trained, read = other["trained"], other["export"]
    place = next(
        (k for k, (a, b) in enumerate(zip(trained, read, strict=False)) if a != b), min(len(trained), len(read))
    )
    start = f"{other['place']}: the export reads the prompt as other token ids than the policy was trained on, "
    end = "; it is not kept: mend the tokenizer or the chat template of what is exported"
    if read[1:] == trained and read[0] == trained[0]:
        return f"{start}with two start tokens (id {read[0]}) for one{end}"
    return (
        f"{start}from place {place} on ({trained[place : place + 4]} was trained, the export gives "
        f"{read[place : place + 4]}; {len(trained)} and {len(read)} tokens): a chat template that is lost or another "
        f"one, or special tokens that are{end}"
    )
