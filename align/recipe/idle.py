"""Keys that are set and cannot act under the other keys: said before the work begins, so that nobody counts on them."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from align.recipe.recipe import Recipe
from align.recipe.schedules import BY_FIGURE

log = logging.getLogger("align")


class Idle(NamedTuple):
    """Keys, when they do nothing, and why, in words."""

    keys: str
    when: Callable[[Recipe], bool]
    why: str


def _nothing_cached(recipe: Recipe) -> bool:
    asked = recipe.needs_token_rewards or recipe.data.ches is not None
    return recipe.task == "reward" or not (recipe.reference.cache or asked)


UNWARMED = ("constant", "refined", *BY_FIGURE)
WITHOUT_BETAS = ("sgd", "adagrad", "rmsprop", "adafactor")

IDLE = (
    Idle("reference.cache_dir", _nothing_cached, "nothing is computed ahead"),
    Idle("reference.cache", lambda r: r.task == "reward", "a reward model has no reference"),
    Idle("reference.every reference.mixture", lambda r: r.reference.name != "moving", "the reference is not `moving`"),
    Idle("data.eval_fraction", lambda r: bool(r.data.eval_sources), "held out are the rows of `data.eval_sources`"),
    Idle("data.list_size", lambda r: r.data.select == "best_worst", "`data.select: best_worst` keeps two of a list"),
    Idle("data.select data.list_size", lambda r: r.task == "sft", "`task: sft` trains on the best of a list"),
    Idle(
        "data.max_prompt_length",
        lambda r: (r.data.max_prompt_length or 0) >= r.data.max_length,
        "it is no less than `data.max_length`",
    ),
    Idle("sampling.reward", lambda r: not r.sampling.prompts, "`sampling.prompts: 0` samples nothing"),
    Idle(
        "sampling.prompts sampling.max_tokens sampling.temperature sampling.top_k sampling.top_p sampling.reward "
        "sampling.token_lists",
        lambda r: r.task == "reward",
        "a reward model writes nothing",
    ),
    Idle("sampling.top_k sampling.top_p", lambda r: r.sampling.temperature == 0, "temperature 0 takes the likeliest"),
    Idle(
        "rollout.top_k rollout.top_p rollout.min_p",
        lambda r: r.rollout.temperature == 0,
        "temperature 0 takes the likeliest",
    ),
    Idle("rollout.agreement_bound", lambda r: not r.rollout.agreement_prompts, "no prompts are compared"),
    Idle("rollout.sync", lambda r: r.rollout.engine.name == "transformers", "it is about vLLM"),
    Idle("rollout.engine.while_training", lambda r: r.online is None, "without `online` nothing trains meanwhile"),
    Idle(
        "rollout.engine.timeout",
        lambda r: bool(getattr(r.rollout.engine, "in_process", False)),
        "the engine is in this process",
    ),
    Idle(
        "online.reference_every",
        lambda r: r.online is not None and r.online.reference != "moving",
        "the reference is not `moving`",
    ),
    Idle("train.epochs", lambda r: r.train.steps is not None, "`train.steps` says how long"),
    Idle("train.warmup_ratio", lambda r: r.train.schedule.name in UNWARMED, "the schedule has no warm-up"),
    Idle(
        "train.activation_memory_gb",
        lambda r: r.train.gradient_checkpointing != "auto",
        "`train.gradient_checkpointing` is not `auto`",
    ),
    Idle("train.project", lambda r: not r.train.report_to, "`train.report_to` names no tracker"),
    Idle(
        "train.adam_beta1 train.adam_beta2",
        lambda r: r.train.optimizer.name in WITHOUT_BETAS or r.train.optimizer.of != "transformers",
        "the optimizer has none, or takes `betas` as an option of its own",
    ),
)
"""A default counts as not set, since a run's own recipe holds every key."""


def idle_keys(recipe: Recipe) -> list[str]:
    """A sentence for every key that is not at its default and does nothing."""
    found = [
        f"{key} has no effect: {idle.why}"
        for idle in IDLE
        for key in idle.keys.split()
        if _is_set(recipe, key.split(".")) and idle.when(recipe)
    ]
    if any(source.weight != 1 for source in recipe.data.eval_sources):
        found.append("data.eval_sources: `weight` has no effect: every held-out row is measured once")
    return found


def say_idle(recipe: Recipe) -> None:
    """Log what `idle_keys` finds."""
    for sentence in idle_keys(recipe):
        log.warning("%s", sentence)


def _is_set(section: Any, path: list[str]) -> bool:
    """Whether a section has the key, at another value than its default."""
    *parents, name = path
    for parent in parents:
        section = getattr(section, parent)
    fields = {} if section is None else type(section).model_fields
    return name in fields and getattr(section, name) != fields[name].get_default(call_default_factory=True)
