"""What transformers' Trainer calls for us at the start of training and behind an optimizer step."""

from typing import Any

from transformers import TrainerCallback

from align.training.optimizers import averaging
from align.training.zero import keep_head_whole


class AfterStep(TrainerCallback):
    """Lets the adapter act between the optimizer's step and the gradients' end (AdaLoRA moves its ranks there).

    An optimizer that averages weights has the average in place from here until the next step begins, so that whatever
    looks at the policy (evaluation, a checkpoint, a rollout) sees the same, and how often it looks changes nothing.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        averaging(self.trainer.optimizer, train=False)
        self.trainer.policy.after_step(state.global_step + 1)


class AtTheStart(TrainerCallback):
    """Tells trackers, once they are open, the held-out figures from before the first step; a resumed run did so.

    Under DeepSpeed the weights have been cut by now.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            keep_head_whole(self.trainer.deepspeed, self.trainer.policy)
        self.trainer.tracking.begin(getattr(args, "recipe_values", {}))
        if state.global_step == 0 and self.trainer.before:
            self.trainer.track_heldout(self.trainer.before)
