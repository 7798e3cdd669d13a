"""RewardTrainer, by TRL's arguments, columns, loss, logs and files."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification
from transformers.data.data_collator import DataCollatorMixin

from align.errors import UserError
from align.model.classifier import reads_last_token
from align.model.forward import base_model
from align.model.reward import read_rewards
from align.packing.batch import Example
from align.trl import rows, start
from align.trl.answers import beyond
from align.trl.config import RewardConfig
from align.trl.micro_batches import MicroBatch, Step, check_collated, of_sequences
from align.trl.overrides import class_name
from align.trl.pairs import PairTrainer, couples

log = logging.getLogger("align")


@dataclass
class DataCollatorForRewards(DataCollatorMixin):
    """`chosen_ids`, `rejected_ids` and perhaps `margin` -> 2B right-padded rows, the chosen ones first."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(e[name]) for name in ("chosen_ids", "rejected_ids") for e in examples]
        batch = {
            "input_ids": rows.pad(ids, self.pad_token_id, self.pad_to_multiple_of),
            "attention_mask": rows.pad([torch.ones_like(row) for row in ids], 0, self.pad_to_multiple_of),
        }
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([e["margin"] for e in examples], dtype=torch.float)
        return batch


class RewardTrainer(PairTrainer):
    """Bradley-Terry on pairs, of a sequence classifier with one output; see docs/trl.md."""

    _tag_names = ("align", "reward-trainer")
    _name = "Reward"
    _paper = "Bradley-Terry"
    _config = RewardConfig
    _loading = MappingProxyType({"architecture": AutoModelForSequenceClassification, "labels": 1})
    _read = staticmethod(read_rewards)
    _columns = ("chosen_ids", "rejected_ids", "margin")

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        tokenizer: Any = None,
        **older: Any,
    ) -> None:
        """Args: as DPOTrainer's, without a reference; a model given by its name gets a head of one output."""
        super().__init__(**start.arguments(locals()))

    def _check_model(self, model: Any, args: Any) -> None:
        _check_model(model)

    def _ready_texts(self, tokenizer: Any, model: Any, args: Any) -> None:
        _set_texts(tokenizer, model, args)

    def _collator(self, tokenizer: Any, args: Any) -> Any:
        return DataCollatorForRewards(tokenizer.pad_token_id, args.pad_to_multiple_of)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows with chosen_ids and rejected_ids, prompt included; pairs beyond max_length are left out."""
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        first = next(iter(dataset))
        start.refuse_images(first, trainer=class_name(type(self)))
        for name in ("chosen", "rejected"):
            if f"{name}_input_ids" in first and f"{name}_ids" not in first:
                dataset = dataset.rename_column(f"{name}_input_ids", f"{name}_ids")
        first = next(iter(dataset))
        if not {"chosen_ids", "rejected_ids"} <= first.keys():
            if not rows.is_conversational(first):
                end = {"end": self._tokenizer.eos_token, "columns": ("chosen", "rejected")}
                dataset = dataset.map(rows.with_end, fn_kwargs=end, **options)
            dataset = dataset.map(_tokenize, fn_kwargs={"tokenizer": self._tokenizer}, **options)
        if args.max_length is None:
            return dataset
        kept = dataset.filter(_fits, fn_kwargs={"limit": args.max_length}, **options)
        if isinstance(dataset, Dataset) and len(kept) < len(dataset):
            left = len(dataset) - len(kept)
            log.warning("%s: %d rows are left out, longer than %d tokens", dataset_name, left, args.max_length)
        return kept

    def _micro_batch(self, inputs: Mapping[str, Any], first: int) -> MicroBatch:
        """Rows as transformers reads them: up to the last token that is not the padding token."""
        check_collated(inputs, ("input_ids", "attention_mask"))
        pad = base_model(self.model).config.get_text_config().pad_token_id
        ids = inputs["input_ids"].cpu().numpy()
        lengths = [int(np.flatnonzero(row != pad).max(initial=0)) + 1 for row in ids]
        sequences = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        places = [np.array([length - 1]) for length in lengths]
        return of_sequences(inputs, sequences, places, couples(inputs["input_ids"]), first)

    def _scored(self, model: nn.Module, lists: list[Example], step: Step) -> dict[str, Tensor]:
        return {"reward": self.engine.score(model, self.engine.collate(lists, self.args.device))[:, 0]}

    def _loss(self, micro: MicroBatch, rows_: Tensor, values: dict[str, Tensor]) -> Tensor:
        both, here = self._both(micro, rows_, values)
        chosen, rejected = both["reward"]
        margin = micro.inputs["margin"][here] if "margin" in micro.inputs else 0.0
        losses = -logsigmoid(chosen - rejected - margin)
        if self.args.center_rewards_coefficient is not None:
            losses = losses + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        return losses.sum() / len(here)

    def _figures(self, micro: MicroBatch, table: dict[str, Tensor]) -> dict[str, float]:
        every = self.accelerator.gather(table["reward"])
        chosen, rejected = table["reward"].chunk(2)
        return {
            "min_reward": every.min().item(),
            "mean_reward": every.mean().item(),
            "max_reward": every.max().item(),
            "accuracy": self._mean((chosen > rejected).float()),
            "margin": self._mean(chosen - rejected),
        }


def _tokenize(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    options = rows.template_options(row) if rows.is_conversational(row) else {}
    prompt = row.get("prompt")
    texts = {name: row[name] if prompt is None else prompt + row[name] for name in ("chosen", "rejected")}
    return {f"{name}_ids": rows.token_ids(tokenizer, text, **options) for name, text in texts.items()} | texts


def _fits(row: dict[str, Any], limit: int) -> bool:
    return max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit


def _check_model(model: Any) -> None:
    if getattr(model.config, "num_labels", None) != 1:
        raise ValueError(
            f"The model has `num_labels={model.config.num_labels}`, but reward models require `num_labels=1`"
        )
    if not reads_last_token(base_model(model)):
        raise UserError(f"{type(model).__name__} is no decoder with a `score` head; use trl.RewardTrainer for it")


def _set_texts(tokenizer: Any, model: Any, args: Any) -> None:
    """The end token and the chat template that the configuration names."""
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"The specified `eos_token` ('{args.eos_token}') is not found in the vocabulary")
        tokenizer.eos_token = args.eos_token
        model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if args.chat_template_path is None:
        return
    path = Path(args.chat_template_path)
    if not path.is_file():
        raise beyond("Reward", "chat_template_path")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
