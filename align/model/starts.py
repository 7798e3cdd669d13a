"""Weights that adapters start with, where PEFT does not set them by itself."""

import logging
from itertools import count
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.utils.loftq_utils import replace_lora_weights_loftq
from torch import Tensor

from align.errors import UserError
from align.model.adapter import Adapter
from align.model.adapters import Eva
from align.model.load import first_line
from align.types import ListBatch

log = logging.getLogger(__name__)

EVA_PASSES = 300
"""More than these and its directions do not settle: 40 are usual with 256 lists, 70 were seen with 64."""


def eva(wrapped: PeftModel, adapter: Eva, *, batches: list[ListBatch] | None, **_: Any) -> None:
    """The leading directions of the layers' inputs on some training rows.

    PEFT looks at these rows again and again until the directions stay, for ever where they do not.

    Raises:
        UserError: PEFT finds none in these rows.
    """
    if batches is None:
        return
    device = next(wrapped.parameters()).device
    inputs = [{"input_ids": b.input_ids.to(device), "attention_mask": is_read(b).to(device)} for b in batches]
    sought, tokens = round(adapter.rank * adapter.rho), max(int(own["attention_mask"].sum()) for own in inputs)
    if tokens < sought:
        raise UserError(
            f"policy.adapter: eva looks for rank x rho = {sought} directions among the tokens of a pass, and the first "
            f"lists have {tokens}; give more rows, or a smaller rank"
        )
    passes = count(1)

    def forward(model: PeftModel, own: dict[str, Tensor]) -> None:
        if next(passes) > EVA_PASSES:
            raise UserError(
                f"policy.adapter: eva's directions do not settle in {EVA_PASSES} passes over the first lists; give "
                "more rows, or a smaller rank"
            )
        model(**own)

    try:
        peft.initialize_lora_eva_weights(wrapped, inputs, forward_fn=forward, show_progress_bar=False)
    except ValueError as error:
        raise UserError(f"policy.adapter: eva cannot start on these rows: {first_line(error)}") from error


def loftq(wrapped: PeftModel, adapter: Adapter, *, folder: Path, **_: Any) -> None:
    """What quantisation lost of the weights that the base's folder holds."""
    replace_lora_weights_loftq(wrapped, str(folder))
    log.info("loftq moves the policy off its 4-bit base at once; the reference is the policy after that move")


def is_read(batch: ListBatch) -> Tensor:
    """1 on the positions up to the last that predicts a target, per row."""
    rows, width = batch.input_ids.shape
    used = batch.predict_at[batch.completion_mask]
    last = used.new_zeros(rows).scatter_reduce(0, used // width, used % width, "amax")
    return (torch.arange(width, device=last.device) <= last[:, None]).long()
