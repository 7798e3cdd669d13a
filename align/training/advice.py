"""What the figures of a run say before it begins: too few steps, texts that are cut, too few held-out lists."""

import math

from align.data.audit import Audit
from align.data.config import DataSection
from align.recipe.settings import TrainSection

FEW_STEPS = 10
MUCH_CUT = 0.1
"""Share of completions that lose their end."""
FEW_HELDOUT = 30


def advise(audit: Audit, *, steps: int, lists: int, train: TrainSection, data: DataSection) -> list[str]:
    """One sentence for each figure that speaks against the recipe; none where it is deliberate.

    Args:
        audit: of the run's data.
        steps: optimizer steps that are planned.
        lists: training lists that are left.
        train, data: of the recipe.
    """
    found = (
        few_steps(steps, lists=lists, train=train),
        much_cut(audit, max_length=data.max_length),
        few_heldout(audit.heldout_lists),
    )
    return [sentence for sentence in found if sentence]


def few_steps(steps: int, *, lists: int, train: TrainSection) -> str:
    """Of a run that ends before the learning rate has done anything; empty where `train.steps` asks for it."""
    if steps >= FEW_STEPS or train.steps is not None:
        return ""
    plural = "" if steps == 1 else "s"
    return (
        f"{steps} step{plural} in all ({lists} lists, {train.lists_per_step} a step): hardly anything will be learnt; "
        "give a smaller train.lists_per_step, or more train.epochs"
    )


def much_cut(audit: Audit, *, max_length: int) -> str:
    """Of completions that lose their end, or are left out, at `data.max_length`: how much longer would keep 90 %."""
    lost = audit.truncated_completions + audit.dropped_completions
    of = audit.completions + audit.dropped_completions
    if not of or lost / of < MUCH_CUT:
        return ""
    what = "truncated" if audit.truncated_completions >= audit.dropped_completions else "left out"
    enough = 64 * math.ceil(audit.sequence_tokens["p90"] / 64)
    if enough <= max_length:  # a prompt's own bound cut them, or they had no token
        return ""
    return f"{lost / of:.0%} of the completions are {what}; data.max_length={enough} would keep 90%"


def few_heldout(lists: int) -> str:
    """Of held-out figures that chance decides; empty where nothing is held out.

    A share of n lists has a standard error of sqrt(p (1 - p) / n), 0.5 / sqrt(n) at most.
    """
    if not 0 < lists < FEW_HELDOUT:
        return ""
    return (
        f"{lists} held-out list{'' if lists == 1 else 's'}: a share of so few is known to within "
        f"{0.5 / math.sqrt(lists):.2f} (standard error); raise data.eval_fraction, or give data.eval_sources"
    )
