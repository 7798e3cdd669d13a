"""A reference that follows the policy (TR-DPO)."""

from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from align.model.moving import MovingReference


class MoveReference(TrainerCallback):
    """Every so many steps the reference becomes a mixture of the policy and of itself."""

    def __init__(self, ref_model: Any, accelerator: Any) -> None:
        self.ref_model, self.accelerator = ref_model, accelerator

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        alpha = args.ref_model_mixup_alpha
        policy = self.accelerator.unwrap_model(model).parameters()
        for own, of_policy in zip(self.accelerator.unwrap_model(self.ref_model).parameters(), policy, strict=True):
            own.mul_(1.0 - alpha).add_(of_policy, alpha=alpha)


class FollowPolicy(TrainerCallback):
    """Moves a reference as `align train` does, that of an adapter too."""

    def __init__(self, moving: MovingReference) -> None:
        self.moving = moving

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.moving.after_step(state.global_step)


def refuse_moving(model: Any, args: Any) -> None:
    """Refuse what cannot follow: an adapter's start, and what was computed before training.

    Raises:
        NotImplementedError, ValueError: as TRL does.
    """
    if args.sync_ref_model and isinstance(model, PeftModel):
        raise NotImplementedError(
            "`sync_ref_model=True` needs a reference of its own: full fine-tuning, not an adapter"
        )
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise ValueError("You cannot use `sync_ref_model=True` together with `precompute_ref_log_probs=True`.")
