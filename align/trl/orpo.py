"""ORPOTrainer, by TRL's arguments, columns, loss, logs and files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from align.packing.batch import Example
from align.trl.config import ORPOConfig
from align.trl.micro_batches import MicroBatch, Step
from align.trl.policy_only import PolicyOnlyTrainer


class ORPOTrainer(PolicyOnlyTrainer):
    """Odds ratio preference optimization, on pairs; see docs/trl.md."""

    _tag_names = ("align", "orpo")
    _name = "ORPO"
    _paper = "arXiv 2403.07691"
    _config = ORPOConfig

    def _micro_batch(self, inputs: Mapping[str, Any], first: int) -> MicroBatch:
        """Chosen rows learn their prompt too, as in TRL; places in a prompt are negative."""
        micro = super()._micro_batch(inputs, first)
        pairs = len(micro.counts) // 2
        for example in micro.lists:
            example["own_at"] = example["learn_at"]
            start = 1 - len(example["prompt_ids"])
            example["learn_at"] = [
                [*range(start, len(ids))] if row - first < pairs else own
                for row, ids, own in zip(example["rows"], example["completion_ids"], example["own_at"], strict=True)
            ]
        return micro

    def _scored(self, model: nn.Module, lists: list[Example], step: Step) -> dict[str, Tensor]:
        _, stats = self._stats(model, lists, step)
        weights = torch.zeros_like(stats.logprobs)
        learnt_at = [at for example in lists for at in example["learn_at"]]
        own_at = [at for example in lists for at in (example.get("own_at") or example["learn_at"])]
        for row, (learnt, own) in enumerate(zip(learnt_at, own_at, strict=True)):
            weights[row, : len(learnt)] = torch.from_numpy(np.isin(learnt, own)).to(weights)
        assert stats.mean_logit is not None
        own_logits = (stats.mean_logit.detach() * weights).sum(dim=1)  # of completions alone, for the log
        return self._row_sums(stats, weights) | {"logit": own_logits}

    def _loss(self, micro: MicroBatch, rows: Tensor, values: dict[str, Tensor]) -> Tensor:
        both, present = self._both(micro, rows, values)
        ratio = logsigmoid(self._log_odds(both["logp"] / self._lengths(micro)[:, present]))
        learnt = self._prompt_and_chosen(micro)
        return -both["logp_sum"][0].sum() / learnt - self.beta * ratio.sum() / len(present)

    def _log_odds(self, means: Tensor) -> Tensor:
        """Log odds of chosen over rejected, of mean log-probabilities [2, n]; those of 1 are taken a little below."""
        means = means.clamp(max=-torch.finfo(means.dtype).eps)
        odds = means - torch.log(-torch.expm1(means))
        return odds[0] - odds[1]

    def _prompt_and_chosen(self, micro: MicroBatch) -> int:
        """Tokens that something predicts in the micro-batch's chosen rows."""
        chosen = micro.inputs["attention_mask"][: len(micro.counts) // 2]
        return max(1, int(chosen.sum()) - len(chosen))

    def _figures(self, micro: MicroBatch, table: dict[str, Tensor]) -> dict[str, float]:
        logps = table["logp"].view(2, -1) / self._lengths(micro)
        log_odds = self._log_odds(logps)
        nll = -table["logp_sum"].view(2, -1)[0].sum() / self._prompt_and_chosen(micro)
        found = self._pair_figures(micro, table, self.beta * logps, logps)
        whole = {"log_odds_ratio": logsigmoid(log_odds).mean(), "log_odds_chosen": log_odds.mean(), "nll_loss": nll}
        return found | {name: self._mean(value[None]) for name, value in whole.items()}
