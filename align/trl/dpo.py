"""DPOTrainer, by TRL's arguments, columns, losses, logs and files."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from align.errors import UserError
from align.packing.batch import Example
from align.trl import rows, start
from align.trl.beforehand import BeforehandTrainer
from align.trl.config import DPOConfig, check_losses
from align.trl.extra import extra
from align.trl.lists import ListTrainer
from align.trl.losses import GROUPED, Pairs, pair_losses
from align.trl.micro_batches import MicroBatch, Step
from align.trl.overrides import class_name, refuse_overrides
from align.trl.pairs import PairTrainer
from align.trl.trainer import LOOKED_AT


class DPOTrainer(BeforehandTrainer, PairTrainer):
    """Direct preference optimization and its relatives, on pairs; see docs/trl.md."""

    _tag_names = ("align", "dpo")
    _name = "DPO"
    _paper = "arXiv 2305.18290"
    _config = DPOConfig
    _reference_columns = ("ref_chosen_logps", "ref_rejected_logps")
    _columns = ("prompt_ids", "chosen_ids", "rejected_ids", *_reference_columns)

    def __new__(cls, model: Any = None, ref_model: Any = None, args: Any = None, *_: Any, **__: Any) -> Any:
        """Of lists, where the configuration's `align` has an objective; a subclass stays what it is besides."""
        if "objective" in extra(args) and not issubclass(cls, ListTrainer):
            refuse_overrides(cls, vars(ListTrainer).keys() - {"__module__", "__doc__"})
            cls = type(cls.__name__, (ListTrainer, cls), {"__module__": cls.__module__})
        return super().__new__(cls)

    def _check(self, args: Any) -> None:
        if "objective" in extra(args):
            raise UserError("align: a subclass must be given its configuration as `args`, where the objective is seen")
        check_losses(args)

    def _take(self, model: Any, args: Any) -> None:
        super()._take(model, args)
        self._is_vision_dataset = False
        self.label_smoothing, self.ld_alpha = args.label_smoothing, args.ld_alpha
        self.loss_types, self.loss_weights = args.loss_type, args.loss_weights or [1.0] * len(args.loss_type)
        self.f_divergence_type, self.f_alpha_divergence_coef = args.f_divergence_type, args.f_alpha_divergence_coef
        self.use_weighting = args.use_weighting
        self.reference_free = getattr(args, "reference_free", False)
        self._outputs = (*LOOKED_AT, "log_sum_sq_probs") if args.use_weighting else LOOKED_AT
        sort = bool(GROUPED & set(args.loss_type))
        self._whole = sort or (args.use_weighting and "sft" in args.loss_type)

    # Data.

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows with prompt_ids, chosen_ids and rejected_ids beside what they had, as TRL makes them."""
        first = next(iter(dataset))
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= first.keys():
            return dataset
        start.refuse_images(first, trainer=class_name(type(self)))
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        if "prompt" not in first:
            dataset = dataset.map(rows.extract_prompt, **options)
        if not rows.is_conversational(next(iter(dataset))):
            end = {"end": self._tokenizer.eos_token, "columns": ("chosen", "rejected")}
            dataset = dataset.map(rows.with_end, fn_kwargs=end, **options)
        tokenize = rows.Tokenize(
            self._tokenizer,
            ("chosen", "rejected"),
            prompt_tokens=getattr(args, "max_prompt_length", None),
            tokens=getattr(args, "max_completion_length", None),
        )
        dataset = rows.tell_lost(dataset.map(tokenize, **options), dataset_name)
        if args.max_length is not None and args.truncation_mode == "keep_start":
            dataset = rows.keep_short(dataset, args.max_length, dataset_name, **options)
        return dataset

    def _collator(self, tokenizer: Any, args: Any) -> Any:
        return rows.DataCollatorForPreference(
            tokenizer.pad_token_id, args.max_length, args.truncation_mode, args.pad_to_multiple_of
        )

    def _reference_sums(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return list(self._sums_of_rows(self._step([inputs])).chunk(2))

    # The loss.

    def _token_weights(self, rows_: Tensor, values: Tensor, step: Step) -> Tensor:
        """[N, C]: ld_alpha beyond the shorter length of a row's pair, else 1."""
        if self.ld_alpha is None:
            return values.new_ones(())
        shorter = torch.cat([torch.minimum(*m.counts.chunk(2)).repeat(2) for m in step.micros]).to(values.device)
        beyond = torch.arange(values.shape[1], device=values.device) >= shorter[rows_][:, None]
        return torch.where(beyond, self.ld_alpha, 1.0)

    def _scored(self, model: nn.Module, lists: list[Example], step: Step) -> dict[str, Tensor]:
        batch, stats = self._stats(model, lists, step)
        rows_ = self._numbers(lists)
        weights = self._token_weights(rows_, stats.logprobs, step)
        found = self._row_sums(stats, weights)
        if self.use_weighting:
            assert stats.log_sum_sq_probs is not None
            aligned = (stats.logprobs - stats.log_sum_sq_probs).detach().sum(dim=1)
            found["weight"] = (aligned / step.counts[rows_].clamp(min=1)).exp()
        if not self.precompute_ref_logps and not self.reference_free:
            found["ref"] = (self._reference_stats(batch) * weights).sum(dim=1)
        return found

    def _loss(self, micro: MicroBatch, rows_: Tensor, values: dict[str, Tensor]) -> Tensor:
        pairs = len(micro.counts) // 2
        both, present = self._both(micro, rows_, values)
        both["ref"] = self._references(micro, both, present)
        lengths = micro.inputs["completion_mask"].sum(dim=1).clamp(min=1).view(2, pairs)[:, present]
        given = Pairs(
            chosen=both["logp"][0],
            rejected=both["logp"][1],
            reference_chosen=both["ref"][0],
            reference_rejected=both["ref"][1],
            chosen_sum=both["logp_sum"][0],
            chosen_length=lengths[0],
            rejected_length=lengths[1],
            token_share=pairs / max(1, int(micro.counts[:pairs].sum())),
            weight=both["weight"].prod(dim=0) if "weight" in both else None,
        )
        return pair_losses(self.args, given).sum() / pairs

    def _references(self, micro: MicroBatch, both: dict[str, Tensor], present: Any = slice(None)) -> Tensor:
        """[2, n] of the reference's sums, for the micro-batch's pairs that are present."""
        if self.reference_free:
            return torch.zeros_like(both["logp"].detach())
        if not self.precompute_ref_logps:
            return both["ref"]
        columns = [micro.inputs[name][present] for name in self._reference_columns]
        return torch.stack(columns).to(both["logp"].dtype)

    def _figures(self, micro: MicroBatch, table: dict[str, Tensor]) -> dict[str, float]:
        counts = micro.counts.to(self.args.device)
        pairs = len(counts) // 2
        table = {"logp": counts.new_zeros(2 * pairs).float()} | table
        both = {name: values.view(2, pairs) for name, values in table.items() if name in ("logp", "ref")}
        chosen, rejected = ratio = self.beta * (both["logp"] - self._references(micro, both))
        sides = {"chosen": slice(0, pairs), "rejected": slice(pairs, None)}
        found = {"entropy": self._ratio(table["entropy"].sum(), counts.sum())}
        for side, own in sides.items():
            found[f"logits/{side}"] = self._ratio(table["logit"][own].sum(), counts[own].sum())
        found["mean_token_accuracy"] = self._ratio(table["top"][:pairs].sum(), counts[:pairs].sum())
        found |= {f"rewards/{side}": self._mean(row) for side, row in zip(sides, ratio, strict=True)}
        found["rewards/accuracies"] = self._mean((chosen > rejected).float())
        found["rewards/margins"] = self._mean(chosen - rejected)
        return found | {f"logps/{side}": self._mean(table["logp"][own]) for side, own in sides.items()}
