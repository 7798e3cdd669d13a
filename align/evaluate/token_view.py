"""Some held-out lists token by token, before and after training: what a coloured view of them shows."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.evaluate.lists import reference_logprobs
from align.model.forward import TokenScorer
from align.model.policy import Policy
from align.run_directory import write_text

TokenValues = list[list[list[float]]]
"""One number per list, completion and token."""

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes a part of a character to."""


@torch.no_grad()
def token_logprobs(scorer: TokenScorer, policy: Policy, lists: Dataset, accelerator: Accelerator) -> TokenValues:
    """Log-probabilities of the lists' completion tokens under the policy as it is, in nats."""
    return _per_token(scorer, policy, lists, accelerator, reference=False)


@torch.no_grad()
def token_references(scorer: TokenScorer, policy: Policy, lists: Dataset, accelerator: Accelerator) -> TokenValues:
    """The same under the reference: cached, or computed here."""
    return _per_token(scorer, policy, lists, accelerator, reference=True)


def write_token_view(
    path: Path,
    lists: Dataset,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    beta: float,
    before: TokenValues,
    after: TokenValues,
    reference: TokenValues,
) -> None:
    """One JSON object per list: id, prompt, grades, and of each completion its tokens with their values.

    `tokens` joined are the completion; `logprob_*` are in nats; `implicit_*` is beta times the log-ratio to the
    reference; `token_rewards` are T-REG's where the lists have them, else null.

    Args:
        lists: as many as there are prompts.
        beta: the score's.
        before, after: log-probabilities of the policy; `reference` those of the reference.
    """
    lines = []
    for n, example in enumerate(lists.select(range(len(prompts)))):
        rewards = example.get("token_rewards") or [None] * len(example["grades"])
        completions = [
            {
                "tokens": token_strings(tokenizer, example["prompt_ids"], ids),
                "token_rewards": rewards[k],
                "implicit_before": _implicit(before[n][k], reference[n][k], beta),
                "implicit_after": _implicit(after[n][k], reference[n][k], beta),
                "logprob_before": before[n][k],
                "logprob_after": after[n][k],
            }
            for k, ids in enumerate(example["completion_ids"])
        ]
        line = {"id": example["id"], "prompt": prompts[n], "grades": example["grades"], "completions": completions}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def token_strings(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens stands at its last."""
    context = list(prompt_ids[-1:])  # so that a first token keeps the space before it
    shown = str(tokenizer.decode(context))
    strings = []
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode([*context, *ids[:end]]))
        if text.endswith(HALF) and end < len(ids):
            strings.append("")
            continue
        strings.append(text[len(shown) :])
        shown = text
    return strings


def _per_token(
    scorer: TokenScorer, policy: Policy, lists: Dataset, accelerator: Accelerator, *, reference: bool
) -> TokenValues:
    was_training = scorer.training
    scorer.eval()
    values = []
    for example in lists:
        batch = policy.collate([example])
        with accelerator.autocast():
            found = reference_logprobs(scorer, policy, batch) if reference else scorer(batch).logprobs
        lengths = [len(ids) for ids in example["completion_ids"]]  # type: ignore[call-overload]
        values.append([own[:length] for own, length in zip(found.tolist(), lengths, strict=True)])
    scorer.train(was_training)
    return values


def _implicit(logprobs: Sequence[float], reference: Sequence[float], beta: float) -> list[float]:
    return [beta * (own - other) for own, other in zip(logprobs, reference, strict=True)]
