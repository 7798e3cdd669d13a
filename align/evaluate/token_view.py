"""Some held-out lists token by token, before and after training: what a coloured view of them shows."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.evaluate.lists import reference_logprobs
from align.files import write_text
from align.model.forward import TokenScorer, evaluating
from align.model.policy import Policy
from align.packing.batch import Example, learnt_counts, learnt_places
from align.progress import progress
from align.types import ListBatch

TokenValues = list[list[list[float]]]
"""One number per list, completion and learnt token."""

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes a part of a character to."""
CHUNK = 32
"""Tokens that are decoded together, if not more."""
TAIL = 8
"""Tokens of the prompt that a completion's are decoded behind."""


class TokenView:
    """Some lists, and what policy and reference make of their tokens."""

    def __init__(
        self,
        scorer: TokenScorer,
        policy: Policy,
        lists: Dataset,
        accelerator: Accelerator,
        *,
        count: int,
        weights: Callable[[ListBatch], Tensor | None],
    ) -> None:
        """Args:
        lists: the same on every process; the first `count` go through the model, one at a time.
        weights: how much each token of a batch counts in its completion's score; None where all count alike.
        """
        self.scorer, self.policy, self.accelerator = scorer, policy, accelerator
        self.examples: list[Example] = lists.select(range(min(count, len(lists)))).to_list()
        self.reference = self._values(lambda batch: reference_logprobs(scorer, policy, batch))
        self.weights = self._values(lambda batch: _or_ones(weights(batch), batch))

    def logprobs(self) -> TokenValues:
        """Log-probabilities of the lists' learnt tokens under the policy as it is, in nats."""
        return self._values(lambda batch: self.scorer(batch).logprobs)

    def write(self, path: Path, prompts: Sequence[str], beta: float, before: TokenValues, after: TokenValues) -> None:
        """One JSON object per list: id, prompt, grades, and of each completion its tokens with their values.

        `tokens` joined are the completion; `logprob_*` are in nats; `implicit_*` is beta times the log-ratio to the
        reference, times what the token's message weighs; `token_rewards` are T-REG's where the lists have them, else
        null. A token that is not learnt, of a tool's or a user's message inside the completion, has null for each.

        Args:
            prompts: of the lists, as text.
            beta: the score's.
            before, after: from `logprobs`, before and after training.
        """
        lines = []
        for n, example in enumerate(self.examples):
            completions = []
            for k, (ids, at) in enumerate(zip(example["completion_ids"], learnt_places(example), strict=True)):
                known = (self.reference[n][k], self.weights[n][k], beta)
                values = {
                    "token_rewards": example["token_rewards"][k] if "token_rewards" in example else None,
                    "implicit_before": _implicit(before[n][k], *known),
                    "implicit_after": _implicit(after[n][k], *known),
                    "logprob_before": before[n][k],
                    "logprob_after": after[n][k],
                }
                spread = {name: own and _spread(own, at.tolist(), len(ids)) for name, own in values.items()}
                tokens = token_strings(self.policy.tokenizer, example["prompt_ids"], ids)
                completions.append({"tokens": tokens, **spread})
            line = {"id": example["id"], "prompt": prompts[n], "grades": example["grades"], "completions": completions}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(path, "".join(lines))

    @torch.no_grad()
    def _values(self, score: Callable[[ListBatch], Tensor]) -> TokenValues:
        values = []
        shown = progress("token by token", len(self.examples), unit="lists", show=bool(self.examples))
        with shown as advance, evaluating(self.scorer), self.accelerator.autocast():
            for example in self.examples:
                found = score(self.policy.collate([example])).tolist()
                values.append([own[:count] for own, count in zip(found, learnt_counts(example), strict=True)])
                advance()
        return values


def token_strings(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens stands at its last.

    Decoded in chunks, as the whole each time would be quadratic. A chunk begins behind a token that is whole
    characters: a part of one can spoil the decoding of all behind it.

    Args:
        before: what the tokens follow.
    """
    tail = list(before[-TAIL:])
    while tail and HALF in tokenizer.decode(tail[:1]):
        del tail[0]
    every = [*tail, *ids]
    cuts = [0]
    for place, token in enumerate(every, start=1):
        if place - cuts[-1] >= CHUNK and HALF not in tokenizer.decode([token]):
            cuts.append(place)
    chunks = zip(cuts, [*cuts[1:], len(every)], strict=True)
    return [text for a, b in chunks for text in _strings(tokenizer, every[:a][-1:], every[a:b])][len(tail) :]


def _strings(tokenizer: PreTrainedTokenizerBase, context: list[int], ids: Sequence[int]) -> list[str]:
    """Of a chunk behind the token before it, which keeps the space before its first."""
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


def _implicit(
    logprobs: Sequence[float], reference: Sequence[float], weights: Sequence[float], beta: float
) -> list[float]:
    return [beta * (own - other) * weight for own, other, weight in zip(logprobs, reference, weights, strict=True)]


def _or_ones(weights: Tensor | None, batch: ListBatch) -> Tensor:
    return torch.ones(batch.targets.shape) if weights is None else weights


def _spread(values: Sequence[float], places: Sequence[int], size: int) -> list[float | None]:
    """Values of some tokens among all, None between them."""
    known = dict(zip(places, values, strict=True))
    return [known.get(place) for place in range(size)]
