"""Of the trainers on pairs that have no reference: TRL's older way to make tokens, and what they log."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM
from transformers.data.data_collator import DataCollatorMixin

from align.packing.batch import Example
from align.trl import rows, start
from align.trl.experts import balance_weight
from align.trl.joined import TokenizeJoined, render
from align.trl.micro_batches import MicroBatch, Step, check_collated, of_sequences, unpadded
from align.trl.overrides import class_name
from align.trl.pairs import PairTrainer, couples

log = logging.getLogger("align")

SIDES = ("chosen", "rejected")
FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100}
COLUMNS = tuple(f"{side}_{name}" for side in SIDES for name in FILL)


@dataclass
class DataCollatorForLabels(DataCollatorMixin):
    """`chosen_input_ids`, `chosen_attention_mask`, `chosen_labels` and the same of rejected, padded on the right."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        fill = FILL | {"input_ids": self.pad_token_id}
        columns = {f"{side}_{name}": value for side in SIDES for name, value in fill.items()}
        return {
            column: rows.pad([torch.tensor(e[column]) for e in examples], value, self.pad_to_multiple_of)
            for column, value in columns.items()
        }


class PolicyOnlyTrainer(PairTrainer):
    """What CPO and ORPO have in common, constructor included."""

    _loading = MappingProxyType({"architecture": AutoModelForCausalLM, "default_dtype": "auto"})
    _columns = COLUMNS
    _outputs = ("logprob", "mean_logit")
    _counts_tokens = False

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        tokenizer: Any = None,
        **older: Any,
    ) -> None:
        """Args: as DPOTrainer's, in the order that TRL has them here; there is no reference.

        data_collator: gives `chosen_input_ids`, `chosen_attention_mask` and `chosen_labels` (-100 where nothing is
            learnt), and the same of rejected.
        compute_metrics: of two numbers for every batch, the mean logits of its sides, as in TRL.
        """
        if model_init is not None:
            older["model_init"] = model_init
        super().__init__(**start.arguments(locals(), without=("model_init",)))

    def _check_model(self, model: Any, args: Any) -> None:
        self.aux_loss_enabled = getattr(model.config, "output_router_logits", False)
        self.aux_loss_coef = balance_weight(model, None if self.aux_loss_enabled else 0.0)
        self.router_aux_loss_coef = self.aux_loss_coef

    def _take(self, model: Any, args: Any) -> None:
        self.beta, self.max_length = args.beta, args.max_length
        if args.max_length is None:
            log.warning("max_length is not set: sequences have 512 tokens at most, as in TRL")
            self.max_length = 512

    def _collator(self, tokenizer: Any, args: Any) -> Any:
        return DataCollatorForLabels(tokenizer.pad_token_id, args.pad_to_multiple_of)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows with ids, masks and labels of both sides, prompt included, as TRL makes them."""
        first = next(iter(dataset))
        start.refuse_images(first, trainer=class_name(type(self)))
        if set(COLUMNS) <= first.keys():
            return dataset
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        if "prompt" not in first:
            dataset = dataset.map(rows.extract_prompt, **options)
        if rows.is_conversational(next(iter(dataset))):
            if "tools" in first:
                log.warning("%s: the column `tools` is not rendered, as TRL does not here", dataset_name)
            dataset = dataset.map(render, fn_kwargs={"tokenizer": self._tokenizer}, **options)
        limit = getattr(args, "max_prompt_length", None)
        tokenize = TokenizeJoined(self._tokenizer, SIDES, tokens=self.max_length, prompt_tokens=limit)
        return rows.keep_learnt(dataset.map(tokenize, **options), SIDES, dataset_name, **options)

    def _micro_batch(self, inputs: Mapping[str, Any], first: int) -> MicroBatch:
        inputs = joined(inputs)
        return of_sequences(inputs, *unpadded(inputs), couples(inputs["input_ids"]), first)

    def _scored(self, model: nn.Module, lists: list[Example], step: Step) -> dict[str, Tensor]:
        _, stats = self._stats(model, lists, step)
        return self._row_sums(stats, stats.logprobs.new_ones(()))

    def _lengths(self, micro: MicroBatch) -> Tensor:
        return micro.counts.clamp(min=1).to(self.args.device).view(2, -1)

    def _pair_figures(self, micro: MicroBatch, table: dict[str, Tensor], reward: Tensor, logps: Tensor) -> dict:
        """What both log of pairs' rewards and log-probabilities [2, B]."""
        counts = micro.counts.to(self.args.device).view(2, -1)
        logits = table["logit"].view(2, -1)
        found = {"rewards/accuracies": self._mean((reward[0] > reward[1]).float())}
        found["rewards/margins"] = self._mean(reward[0] - reward[1])
        for place, side in enumerate(SIDES):
            found[f"rewards/{side}"] = self._mean(reward[place])
            found[f"logps/{side}"] = self._mean(logps[place])
            found[f"logits/{side}"] = self._ratio(logits[place].sum(), counts[place].sum())
        return found

    def _mean(self, values: Tensor) -> float:
        """As TRL takes it here: in an epoch's last step of as many rows of each micro-batch as its last one has."""
        return self.accelerator.gather_for_metrics(values).mean().item()

    def _mode(self, logs: Mapping[str, float]) -> str:
        return "train" if "loss" in logs else "eval"

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One micro-batch's loss; with `return_outputs` its line of metrics too."""
        loss = super().compute_loss(model, inputs)
        own = self._metrics["train" if self.model.training else "eval"]
        return (loss, {name: values[-1] for name, values in own.items()}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss of one batch, and for compute_metrics what TRL gives it: the mean logits of the two sides."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, found = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        logits = torch.tensor([found[f"logits/{side}"] for side in SIDES], device=loss.device)
        return loss.detach(), logits, torch.zeros_like(logits)


def joined(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Both sides' rows as `input_ids`, `attention_mask` and `completion_mask` [2B, T], the chosen ones first.

    Raises:
        UserError: a collator that gives other names.
    """
    check_collated(inputs, COLUMNS)
    width = max(inputs[f"{side}_input_ids"].shape[1] for side in SIDES)
    both = {
        name: torch.cat([pad(own, (0, width - own.shape[1]), value=value) for own in of])
        for name, value in FILL.items()
        for of in [[inputs[f"{side}_{name}"] for side in SIDES]]
    }
    return both | {"completion_mask": both.pop("labels") != -100}
