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
from align.packing.batch import Example
from align.progress import progress
from align.types import ListBatch

TokenValues = list[list[list[float]]]
"""One number per list, completion and token."""

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes a part of a character to."""


class TokenView:
    """Some lists, and what policy and reference make of their tokens."""

    def __init__(
        self, scorer: TokenScorer, policy: Policy, lists: Dataset, accelerator: Accelerator, *, count: int
    ) -> None:
        """Args:
        lists: the same on every process; the first `count` go through the model, one at a time.
        """
        self.scorer, self.policy, self.accelerator = scorer, policy, accelerator
        self.examples: list[Example] = lists.select(range(min(count, len(lists)))).to_list()
        self.reference = self._values(lambda batch: reference_logprobs(scorer, policy, batch))

    def logprobs(self) -> TokenValues:
        """Log-probabilities of the lists' completion tokens under the policy as it is, in nats."""
        return self._values(lambda batch: self.scorer(batch).logprobs)

    def write(self, path: Path, prompts: Sequence[str], beta: float, before: TokenValues, after: TokenValues) -> None:
        """One JSON object per list: id, prompt, grades, and of each completion its tokens with their values.

        `tokens` joined are the completion; `logprob_*` are in nats; `implicit_*` is beta times the log-ratio to the
        reference; `token_rewards` are T-REG's where the lists have them, else null.

        Args:
            prompts: of the lists, as text.
            beta: the score's.
            before, after: from `logprobs`, before and after training.
        """
        lines = []
        for n, example in enumerate(self.examples):
            completions = [
                {
                    "tokens": token_strings(self.policy.tokenizer, example["prompt_ids"], ids),
                    "token_rewards": example["token_rewards"][k] if "token_rewards" in example else None,
                    "implicit_before": _implicit(before[n][k], self.reference[n][k], beta),
                    "implicit_after": _implicit(after[n][k], self.reference[n][k], beta),
                    "logprob_before": before[n][k],
                    "logprob_after": after[n][k],
                }
                for k, ids in enumerate(example["completion_ids"])
            ]
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
                values.append([own[: len(ids)] for own, ids in zip(found, example["completion_ids"], strict=True)])
                advance()
        return values


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


def _implicit(logprobs: Sequence[float], reference: Sequence[float], beta: float) -> list[float]:
    return [beta * (own - other) for own, other in zip(logprobs, reference, strict=True)]
