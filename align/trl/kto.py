"""KTOTrainer, by TRL's arguments, columns, losses, logs and files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.data.data_collator import DataCollatorMixin

from align.packing.batch import Example
from align.trl import rows, start
from align.trl.beforehand import BeforehandTrainer
from align.trl.config import KTOConfig
from align.trl.micro_batches import MicroBatch, Step, check_collated, micro_batch, passes
from align.trl.overrides import class_name


@dataclass
class DataCollatorForUnpairedPreference(DataCollatorMixin):
    """`prompt_ids`, `completion_ids`, `label` and perhaps `KL_completion_ids` -> right-padded rows of each kind.

    The reference's `ref_logps` and `ref_KL_logps` [B] go along where there are.
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for prefix in ("", "KL_"):
            name = f"{prefix}completion_ids"
            if name not in examples[0]:
                continue
            ids = [torch.tensor((e["prompt_ids"] + e[name])[: self.max_length], dtype=torch.long) for e in examples]
            masks = [[0] * len(e["prompt_ids"]) + [1] * len(e[name]) for e in examples]
            learnt = [torch.tensor(mask[: self.max_length]) for mask in masks]
            columns = {"input_ids": ids, "attention_mask": [torch.ones_like(i) for i in ids], "completion_mask": learnt}
            fill = {"input_ids": self.pad_token_id}
            for column, values in columns.items():
                batch[prefix + column] = rows.pad(values, fill.get(column, 0), self.pad_to_multiple_of)
        batch["label"] = torch.tensor([e["label"] for e in examples])
        for name in ("ref_logps", "ref_KL_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([e[name] for e in examples])
        return batch


class KTOTrainer(BeforehandTrainer):
    """Kahneman-Tversky optimization on labelled completions; see docs/trl.md."""

    _tag_names = ("align", "kto")
    _name = "KTO"
    _paper = "arXiv 2402.01306"
    _config = KTOConfig
    _reference_columns: tuple[str, ...] = ("ref_logps", "ref_KL_logps")
    _columns = ("prompt_ids", "completion_ids", "KL_completion_ids", "label", *_reference_columns)

    def _check(self, args: Any) -> None:
        _check(args)

    def _take(self, model: Any, args: Any) -> None:
        super()._take(model, args)
        self.loss_type, self.calculate_KL = args.loss_type, args.loss_type == "kto"
        self._reference_columns = KTOTrainer._reference_columns if self.calculate_KL else ("ref_logps",)
        self.desirable_weight, self.undesirable_weight = args.desirable_weight, args.undesirable_weight

    def _collator(self, tokenizer: Any, args: Any) -> Any:
        return DataCollatorForUnpairedPreference(tokenizer.pad_token_id, args.max_length, args.pad_to_multiple_of)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows with prompt_ids, completion_ids and, for the baseline, their neighbour's completion."""
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        first = next(iter(dataset))
        start.refuse_images(first, trainer=class_name(type(self)))
        if "prompt" not in first:
            dataset = dataset.map(rows.extract_prompt, **options)
        if {"chosen", "rejected"} <= next(iter(dataset)).keys():
            dataset = dataset.map(_unpair, batched=True, remove_columns=["chosen", "rejected"], **options)
        if not rows.is_conversational(next(iter(dataset))):
            end = {"end": self._tokenizer.eos_token, "columns": ("completion",)}
            dataset = dataset.map(rows.with_end, fn_kwargs=end, **options)
        tokenize = rows.Tokenize(
            self._tokenizer,
            ("completion",),
            prompt_tokens=getattr(args, "max_prompt_length", None),
            tokens=getattr(args, "max_completion_length", None),
        )
        dataset = rows.tell_lost(dataset.map(tokenize, **options), dataset_name)
        if args.max_length is not None:
            dataset = rows.keep_short(dataset, args.max_length, dataset_name, **options)
        if self.calculate_KL:
            size = args.per_device_train_batch_size
            dataset = dataset.map(_neighbours, batched=True, batch_size=size, **options)
        return dataset

    def _reference_sums(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        kinds = [inputs, _neighbours_of(inputs)] if self.calculate_KL else [inputs]
        return [self._sums_of_rows(self._step([kind])) for kind in kinds]

    def _micro_batch(self, inputs: Mapping[str, Any], first: int) -> MicroBatch:
        check_collated(inputs, ("input_ids",))
        return micro_batch(inputs, [(row,) for row in range(len(inputs["input_ids"]))], first)

    def _before(self, model: nn.Module, step: Step) -> None:
        """Every micro-batch's baseline: its prompts with their neighbours' completions, without gradient."""
        step.baselines = [0.0] * len(step.micros)
        for micro in step.micros:
            check_collated(micro.inputs, ("label", "KL_input_ids") if self.calculate_KL else ("label",))
        if not self.calculate_KL:
            return
        for place, micro in enumerate(step.micros):
            named = _neighbours_of(micro.inputs)
            other = self._micro_batch(named, 0)
            before = micro.inputs["ref_KL_logps"].sum() if self.precompute_ref_logps else torch.zeros(())
            total = -before.to(self.args.device)
            tokens = self.tokens_per_pass or max(4096, named["input_ids"].shape[1])
            for lists in self._agreed(passes([[example] for example in other.lists], tokens)):
                batch = self.engine.collate(lists or other.lists[:1], self.args.device)
                with torch.no_grad(), self.compute_loss_context_manager():
                    difference = self.engine.score(model, batch, ("logprob",)).logprobs
                    if not self.precompute_ref_logps:
                        difference = difference - self._reference_stats(batch)
                total += difference.sum() * bool(lists)
            mean = self.accelerator.gather((total / len(named["input_ids"]))[None]).mean()
            step.baselines[place] = float(mean.clamp(min=0))

    def _scored(self, model: nn.Module, lists: list[Example], step: Step) -> dict[str, Tensor]:
        batch, stats = self._stats(model, lists, step)
        found = self._row_sums(stats, stats.logprobs.new_ones(()))
        if self.precompute_ref_logps:
            found["ref"] = torch.cat([m.inputs["ref_logps"] for m in step.micros])[self._numbers(lists)]
        else:
            found["ref"] = self._reference_stats(batch).sum(dim=1)
        found["baseline"] = torch.tensor(step.baselines, device=self.args.device)[self._places(lists, step)]
        return found

    def _places(self, lists: list[Example], step: Step) -> Tensor:
        starts = torch.tensor([micro.first for micro in step.micros], device=self.args.device)
        return torch.searchsorted(starts, self._numbers(lists), right=True) - 1

    def _loss(self, micro: MicroBatch, rows_: Tensor, values: dict[str, Tensor]) -> Tensor:
        good = micro.inputs["label"][rows_ - micro.first].bool()
        apart = self.beta * (values["logp"] - values["ref"] - values["baseline"])
        losses = 1 - torch.where(good, apart, -apart).sigmoid()
        weights = torch.where(good, self.desirable_weight, self.undesirable_weight)
        return (weights * losses).sum() / len(micro.counts)

    def _figures(self, micro: MicroBatch, table: dict[str, Tensor]) -> dict[str, float]:
        counts, good = micro.counts.to(self.args.device), micro.inputs["label"].bool()
        found = {"kl": float(table["baseline"][0])} if self.calculate_KL else {"kl": 0.0}
        found["entropy"] = self._ratio(table["entropy"].sum(), counts.sum())
        reward = self.beta * (table["logp"] - table["ref"])
        for side, own in (("chosen", good), ("rejected", ~good)):
            if not self.accelerator.gather(own.sum()[None]).sum():
                continue
            found[f"logits/{side}"] = self._ratio(table["logit"][own].sum(), counts[own].sum())
            for name, values in (("rewards", reward), ("logps", table["logp"])):
                found[f"{name}/{side}"] = self._ratio(values[own].sum(), own.sum())
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def _check(args: Any) -> None:
    if args.loss_type not in ("kto", "apo_zero_unpaired"):
        raise ValueError(f"Unknown loss type: {args.loss_type}. Should be kto or apo_zero_unpaired")
    if args.loss_type == "kto" and args.per_device_train_batch_size <= 1:
        raise ValueError("per_device_train_batch_size must be above 1: the baseline needs a row's neighbour")
    if args.loss_type == "kto" and args.train_sampling_strategy != "sequential":
        raise ValueError("`train_sampling_strategy` must be 'sequential': the baseline pairs rows as they stand")


def _unpair(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    count = len(batch["chosen"])
    kept = {name: values * 2 for name, values in batch.items() if name not in ("chosen", "rejected")}
    labels = [True] * count + [False] * count
    return {"completion": batch["chosen"] + batch["rejected"], "label": labels} | kept


def _neighbours(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    own = batch["completion_ids"]
    return {"KL_completion_ids": own[-1:] + own[:-1]}


def _neighbours_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A collator's rows of prompts with their neighbours' completions, by the names of other rows."""
    return {name.removeprefix("KL_"): values for name, values in inputs.items() if name.startswith("KL_")}
