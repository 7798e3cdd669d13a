"""A mixture of experts' load-balancing loss, of a micro-batch's tokens as its padded rows have them."""

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from align.errors import UserError
from align.model.forward import base_model
from align.packing.batch import Example
from align.trl.micro_batches import Step
from align.types import ListBatch

READS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def balance_weight(model: nn.Module, asked: float | None) -> float:
    """The factor of the load-balancing loss: the configuration's, or the model's own where that says nothing.

    Raises:
        ValueError: as TRL does, for a model without experts.
    """
    config = base_model(model).config.get_text_config()
    has = hasattr(config, "output_router_logits")
    if asked and not has:
        raise ValueError(f"`router_aux_loss_coef` is set to {asked} but {type(model).__name__} has no experts")
    own = getattr(config, "router_aux_loss_coef", 0.0) if asked is None else asked
    return float(own) if has else 0.0


class Balance:
    """transformers' own load-balancing loss of a model, from the routers' logits of packed rows."""

    def __init__(self, model: nn.Module, *, trainer: str) -> None:
        """Args:
        trainer: the class whose remedy an error names.

        Raises:
            UserError: a model that has no such loss, or one of another form.
        """
        self.base: Any = base_model(model)
        self.function: Any = getattr(sys.modules[type(self.base).__module__], "load_balancing_loss_func", None)
        known = self.function and [*inspect.signature(self.function).parameters] == READS
        if not known or not hasattr(self.base, "num_experts_per_tok") or hasattr(self.base, "frequency_bounds"):
            raise UserError(
                f"{type(self.base).__name__}: its load-balancing loss is not known for packed rows; set "
                f"router_aux_loss_coef to 0.0 (of CPO and ORPO the model's output_router_logits to False), or use "
                f"trl.{trainer}"
            )

    def keep(self, step: Step, batch: ListBatch, lists: Sequence[Example], logits: tuple[Tensor, ...]) -> None:
        """Remember the loss of each micro-batch whose lists these are; all of a micro-batch's are in one pass.

        Args:
            logits: of every layer's router, for every token of the batch.
        """
        for micro in step.micros:
            own = torch.tensor([micro.rows.start <= e["rows"][0] < micro.rows.stop for e in lists])
            if own.any():
                counts = token_counts(batch, own.to(step.device))
                of_model = self.base.num_experts, self.base.num_experts_per_tok
                step.balance[micro.first] = self.function(logits, *of_model, counts)


def token_counts(batch: ListBatch, chosen: Tensor) -> Float[Tensor, " RT"]:
    """In how many rows of some lists every token of a batch would stand, if each completion had a row of its own.

    Args:
        chosen: bool [B], the lists that count.
    """
    assert batch.ends_at is not None, "the collators give it"
    if batch.branches is None:
        width = batch.input_ids.shape[1]
        seen = torch.arange(width, device=chosen.device) <= (batch.ends_at % width)[:, None]
        return (seen & chosen[batch.list_index][:, None]).flatten().float()
    sizes = torch.tensor([branch.size for branch in batch.branches], device=chosen.device)
    last = torch.searchsorted(sizes.cumsum(0), batch.ends_at[chosen[batch.list_index]], right=True)
    counts = torch.bincount(last, minlength=len(sizes)).tolist()
    for number in range(len(counts) - 1, 0, -1):
        if batch.branches[number].parent >= 0:
            counts[batch.branches[number].parent] += counts[number]
    return torch.tensor(counts, device=chosen.device).repeat_interleave(sizes).float()
