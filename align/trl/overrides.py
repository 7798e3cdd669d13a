"""Which methods of a subclass are called, and the refusal of those that never would be."""

from collections.abc import Set
from itertools import takewhile

from transformers import Trainer

from align.errors import UserError

NEVER_CALLED = {
    "_compute_loss",
    "_precompute_ref_logps",
    "build_tokenized_answer",
    "compute_ref_log_probs",
    "compute_reference_log_probs",
    "concatenated_forward",
    "concatenated_inputs",
    "cpo_loss",
    "dpo_loss",
    "forward",
    "get_batch_logps",
    "get_batch_loss_metrics",
    "get_batch_samples",
    "kto_loss",
    "null_ref_context",
    "odds_ratio_loss",
    "process_row",
    "store_metrics",
    "tokenize_row",
    "_compute_kl_logps",
    "_compute_loss_liger",
    "_tokenize",
    "_shift_right",
    "generate_from_model",
}
"""Methods of TRL's trainers, of this release and of older ones, that a packed step does not call."""


def class_name(cls: type) -> str:
    """The trainer of ours that a class is or comes from."""
    return next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("align.trl"))


def overrides_compute_loss(cls: type) -> bool:
    """Whether a class has a compute_loss that is not ours."""
    own: type = next(c for c in cls.__mro__ if "compute_loss" in vars(c))
    return not own.__module__.startswith("align.trl")


def refuse_overrides(cls: type, never: Set[str] = NEVER_CALLED) -> None:
    """Refuse a subclass's method that TRL's trainer would call and a packed step does not.

    Args:
        never: names of such methods.

    Raises:
        UserError: names the class and the method.
    """
    for own in takewhile(lambda c: c is not Trainer, cls.__mro__):
        found = [] if own.__module__.startswith("align.trl") else sorted(never & vars(own).keys())
        if found:
            raise UserError(
                f"{own.__name__}.{found[0]} would never be called: {class_name(cls)} takes an "
                "optimizer step in packed passes; override compute_loss, which is called for every micro-batch, or "
                "use TRL's own class"
            )
