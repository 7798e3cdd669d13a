"""Which keys make a run smaller, and by how much."""

from collections.abc import Iterator

from align.model.adapters import Full
from align.planning.plan import Plan
from align.recipe import Recipe

WORTH = 0.1
"""Share of the whole below which a change is not named."""


def remedies(recipe: Recipe, plan: Plan, way: str) -> list[str]:
    """What would help, with about how many bytes it saves on a device; the most first."""
    enough = WORTH * plan.total(way)
    found = sorted((one for one in _all(recipe, plan, way) if one[0] >= enough), key=lambda one: -one[0])
    return [f"{what} (about {size / 1e9:.3g} GB less)" for size, what in found]


def _all(recipe: Recipe, plan: Plan, way: str) -> Iterator[tuple[float, str]]:
    own = plan.memory[way]
    activations, train, policy = own["activations"], recipe.train, recipe.policy
    if plan.checkpointed < plan.layers - 1:
        yield activations * (1 - (plan.checkpointed + 2) / plan.layers), "train.gradient_checkpointing=true"
    if plan.largest_pass > 256:
        tokens = max(256, min(train.batch_tokens, plan.largest_pass) // 2)
        yield (activations + own["workspaces"]) / 2, f"train.tokens_per_batch={tokens}"
    if not train.packing:
        yield activations / 3, "train.packing=true, which reads a list's prompt once"
    if isinstance(policy.adapter, Full) and policy.start_adapter is None:
        yield own["gradients"] + own["optimizer"] + own["reference"], "policy.adapter=lora"
        if train.optimizer.name.startswith("adamw_torch"):
            yield own["optimizer"], "train.optimizer=adafactor"
    if own["reference"] and isinstance(policy.adapter, Full):
        yield own["reference"], "reference.cache=true"
    weights = own["frozen weights"] + own["trained weights"]
    if policy.dtype == "float32":
        yield weights / 2, "policy.dtype=bfloat16"
    if plan.devices.kind == "cuda" and policy.quantization is None and own["frozen weights"]:
        share = 0.86 if policy.dtype == "float32" else 0.72
        yield share * own["frozen weights"], "policy.quantization=4bit"
    if way in ("one", "ddp", "zero2"):
        other = "fsdp2" if plan.devices.count > 1 else None
        saved = (
            plan.total(way) - plan.total(other) if other else (plan.total(way) - activations - own["workspaces"]) / 2
        )
        yield saved, "`accelerate launch --config_file recipes/accelerate/fsdp2.yaml`, on two devices or more"
