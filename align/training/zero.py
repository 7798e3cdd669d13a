"""Training under DeepSpeed's ZeRO: where a step ends, and weights that are whole for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate.state import GradientState
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.errors import UserError
from align.model.forward import base_model


def zero_asked() -> bool:
    """Whether `accelerate launch` was given a configuration of DeepSpeed."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def load_whole() -> None:
    """Let transformers load weights whole: what reads them before the first step (references, checks) reads all.

    Its Trainer tells it of DeepSpeed again, and cuts them.
    """
    unset_hf_deepspeed_config()


@contextmanager
def before_the_last() -> Iterator[None]:
    """A backward pass inside is not the step's last; DeepSpeed takes its optimizer's step within that one."""
    state = GradientState()
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(True)


def keep_head_whole(engine: Any, policy: Any) -> None:
    """Let every process hold the head, whose weight our loss reads in the backward pass, where no layer gathers it.

    Args:
        engine: DeepSpeed's.
    """
    head = base_model(policy.model).get_output_embeddings() if policy.has_reference else None
    kept = [p for p in head.parameters() if hasattr(p, "ds_id") and not p.ds_persist] if head is not None else []
    for parameter in kept:
        parameter.ds_persist = True
    if kept:
        engine.optimizer.persistent_parameters.extend(kept)
        _gather(kept)


@contextmanager
def whole_weights(model: nn.Module, *, changes: bool = False) -> Iterator[None]:
    """Inside, weights that ZeRO-3 has cut are whole on every process, which must all enter.

    Args:
        changes: whether what the first process puts there stays, on all of them.
    """
    cut: list[Any] = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not cut:
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(cut, modifier_rank=0 if changes else None):
        yield
    _gather([parameter for parameter in cut if parameter.ds_persist])  # which DeepSpeed cuts too when it leaves


def _gather(parameters: list[Any]) -> None:
    if parameters:
        parameters[0].all_gather(parameters)


def check_world(checkpoint: Path, world_size: int) -> None:
    """DeepSpeed goes on in as many processes as wrote the checkpoint.

    Raises:
        UserError: it was written by another number.
    """
    wrote = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if not wrote:
        raise UserError(
            f"{checkpoint}: not written under DeepSpeed, which goes on from its own checkpoints only; start this run "
            "with the configuration that it began with, or give `output` another folder"
        )
    if wrote != world_size:
        raise UserError(
            f"{checkpoint}: {wrote} processes wrote it under DeepSpeed, which goes on in as many only; start {wrote}, "
            f"not {world_size}"
        )
