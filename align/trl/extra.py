"""A configuration's `align`: what TRL has no name for. Its keys are those of a recipe."""

from difflib import get_close_matches
from typing import Any

from align.errors import UserError

OF_ALL = ("tokens_per_batch",)
OF_LISTS = {
    "objective": "a recipe's `objective`: one by its name, a section, or several",
    "score": "a recipe's `score`; by default `log_ratio` with the configuration's beta",
    "regularizer": "T-REG",
    "token_weights": "TGDPO, or the rows' own",
    "token_rewards": "of T-REG and TGDPO: the contrast's texts",
    "wpo": "weights of lists",
    "dpop": "the floor under a best completion",
    "z_penalty": "factor of (log Z)^2",
    "data": "how rows are read: `grades`, `select`, `list_size`, `overlong`, ...",
    "adapter": "a recipe's `policy.adapter`, instead of peft_config",
    "reference": "`initial`, or `moving` with `every` and `mixture`",
}
"""Of DPOTrainer alone, where there is an `objective`."""


def extra(args: Any) -> dict[str, Any]:
    """The configuration's `align`; TRL's own configurations have none."""
    return dict(getattr(args, "align", None) or {})


def check_extra(args: Any, trainer: str) -> None:
    """Refuse keys that a trainer does not read.

    Args:
        trainer: such as "DPO".

    Raises:
        UserError: names the key and those that there are.
    """
    given = extra(args)
    known = [*OF_ALL, *OF_LISTS]
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"align: there is no {key!r}; {hint}it takes {', '.join(known)}")
        if key in OF_LISTS and trainer != "DPO":
            raise UserError(f"align: {key!r} is DPOTrainer's; {trainer}Trainer takes {', '.join(OF_ALL)}")
        if key in OF_LISTS and "objective" not in given:
            raise UserError(f"align: {key!r} goes with an `objective` of lists, such as 'lambda'; add one")
