"""Of the trainers that compare with a reference: where it is."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from align.trl import start
from align.trl.engine import Engine
from align.trl.experts import balance_weight
from align.trl.micro_batches import Step
from align.trl.moving import MoveReference, refuse_moving
from align.trl.overrides import class_name
from align.trl.trainer import PackedTrainer


class ReferenceTrainer(PackedTrainer):
    """A model that trains, and the one that it is measured from."""

    ref_model: Any = None
    ref_engine: Any = None

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tokenizer: Any = None,
        **older: Any,
    ) -> None:
        """Args:
        model: a name, a transformers model or a PEFT model, which stays the model that trains.
        ref_model: a name or a model; by default the model at its start.
        args: a DPOConfig of ours or of TRL.
        data_collator: gives `input_ids`, `attention_mask` and `completion_mask`, the chosen rows first.
        train_dataset, eval_dataset: rows with prompt (or without), chosen and rejected, as text or messages; the
            second may be a dictionary of several.
        processing_class: a tokenizer; by default the model's.
        compute_metrics: of logits, which a pass of its own makes.
        quantization_config: for a model given by its name.
        peft_config: a new adapter.
        tokenizer: as processing_class, by its older name.
        older: arguments of older releases.
        """
        if ref_model is not None and ref_model is model:
            raise ValueError("`model` and `ref_model` cannot be the same object; leave `ref_model` out for the start")
        self._given_reference = ref_model
        super().__init__(**start.arguments(locals(), without=("ref_model",)))
        self._set_reference(self._given_reference, self.args)
        if self.args.sync_ref_model:
            self.add_callback(MoveReference(self.ref_model, self.accelerator))

    def _check_model(self, model: Any, args: Any) -> None:
        self.router_aux_loss_coef = balance_weight(model, getattr(args, "router_aux_loss_coef", None))
        self.aux_loss_enabled = self.router_aux_loss_coef != 0.0

    def _keeps_start(self) -> bool:
        return self._given_reference is None

    def _take(self, model: Any, args: Any) -> None:
        """The attributes, and the copy of a model that trains in full: before the engine gives it its own forward."""
        self.beta = args.beta
        refuse_moving(model, args)
        if self._given_reference is None and not isinstance(model, PeftModel) and self._needs_reference(args):
            self._given_reference = deepcopy(model)

    def _needs_reference(self, args: Any) -> bool:
        """Whether training computes it, so that a model that trains in full must have a copy of its start."""
        return not args.precompute_ref_log_probs

    def _set_reference(self, given: Any, args: Any) -> None:
        """The reference model, where the adapter that trains cannot be switched off to find it."""
        if isinstance(given, str):
            options = {"dtype": self.model.dtype} | dict(getattr(args, "ref_model_init_kwargs", None) or {})
            given = start.load_by_name(given, options)
        if given is not None:
            if args.disable_dropout:
                start.without_dropout(given)
            # While it still asks for gradients, so that it is made of the same operations as the policy bit for bit.
            self.ref_engine = Engine(given.eval(), trainer=class_name(type(self)))
            given.requires_grad_(False)
            self.ref_model = self.accelerator.prepare_model(given, evaluation_mode=True)

    def _note(self, mode: str, step: Step) -> None:
        super()._note(mode, step)
        self._note_balance(mode, step)

    def _note_balance(self, mode: str, step: Step) -> None:
        """The load-balancing loss of every micro-batch, by TRL's name; CPO and ORPO do not log it there."""
        for micro in step.micros if self.balance else ():
            self._metrics[mode]["aux_loss"].append(self._mean(self._balance_of(step, micro).detach()[None]))

    def _reference_stats(self, batch: Any) -> Tensor:
        """[N, C] log-probabilities under the reference, without gradient."""
        if self.ref_model is not None:
            with torch.no_grad():
                return self.ref_engine.score(self.ref_model, batch, ("logprob",)).logprobs
        with self.engine.start():
            return self.engine.score(self.model, batch, ("logprob",)).logprobs
