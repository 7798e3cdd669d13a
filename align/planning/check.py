"""Before any weight is read: whether a run can fit at all."""

import logging
from pathlib import Path

from datasets import Dataset
from transformers import TrainingArguments

from align.errors import UserError
from align.model.given import object_of
from align.planning.devices import of_launch
from align.planning.empty import Unplanned, empty_model, read_config
from align.planning.memory import WAYS, of_model
from align.planning.plan import MARGIN, Devices, Plan, make_plan
from align.planning.remedies import remedies
from align.planning.show import NAMES
from align.recipe import Recipe
from align.runs.build import loss_of
from align.runs.memory import FLOOR

log = logging.getLogger("align")

FAR_BELOW = 32
"""A model whose files are so many times smaller than a device is not planned: full training in float32 of a model in
bfloat16, with AdamW and a copy as its reference, takes ten times its files."""
CELL = 160
"""Bytes that a layer keeps of a token for each number of its width, at most: what is far below is not traced."""


def refuse_unfit(recipe: Recipe, arguments: TrainingArguments, lists: Dataset | None = None) -> None:
    """Refuse a run that is beyond its device, on as many processes and spread as they were started.

    Nothing is refused that may fit: the plan must be `MARGIN` times beyond all of the memory that there is, used or
    not. Before rows are read only what does not depend on them counts: weights, gradients and the optimizer's states.

    Args:
        recipe: as it was asked for: what says `auto` counts as small as it can be made.
        lists: the tokenised training lists; with them activations count too.

    Raises:
        UserError: `activation_offload` is on where it brings nothing; or says how much the run needs of what there
            is, and which keys make it smaller.
    """
    if recipe.train.activation_offload and arguments.device.type == "cpu":
        raise UserError("train.activation_offload: on a CPU activations are in the host's memory already; leave it out")
    if object_of(Path(recipe.policy.model)) is not None:
        return  # its weights are in memory already
    devices, way = of_launch(arguments)
    try:
        found = _beyond_alone(recipe, devices, way) if lists is None else _beyond(recipe, devices, way, lists)
    except Unplanned as error:
        log.debug("%s", error)
        return
    except UserError:
        raise
    except Exception as error:  # of a model's own code on tensors without values: then training says what is wrong
        log.debug("not planned: %s: %s", type(error).__name__, error)
        return
    if found:
        raise UserError(found)


def _beyond_alone(recipe: Recipe, devices: Devices, way: str) -> str:
    """What to say of a run that is too large before its activations; empty where it is not."""
    if _files(recipe) * FAR_BELOW < devices.memory:
        return ""
    model = empty_model(recipe, read_config(recipe.policy), total_steps=2)
    held = WAYS[way](of_model(model, recipe, needs_reference=loss_of(recipe).needs_reference), devices.count)
    if sum(held.values()) <= MARGIN * devices.memory:
        return ""
    plan = Plan(0, 0, 0, 0, 0, 0, 0, 0, 1, devices, {way: held | {"activations": 0, "workspaces": 0}}, {}, {})
    return _sentence(recipe, plan, way, "before its activations")


def _beyond(recipe: Recipe, devices: Devices, way: str, lists: Dataset) -> str:
    recipe = _least(recipe)
    text = read_config(recipe.policy).get_text_config()
    cells = max(recipe.train.batch_tokens, recipe.data.max_length)
    if cells * text.hidden_size * text.num_hidden_layers * CELL < devices.memory / 2:
        return ""
    plan = make_plan(recipe, lists, lists.select([]), devices)
    return "" if plan.total(way) <= MARGIN * devices.memory else _sentence(recipe, plan, way, "with its activations")


def _least(recipe: Recipe) -> Recipe:
    """The recipe as it runs where `auto` has made its passes as small as it can."""
    least = {"tokens_per_batch": FLOOR, "gradient_checkpointing": True}
    chosen = {key: value for key, value in least.items() if getattr(recipe.train, key) == "auto"}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=chosen)})


def _files(recipe: Recipe) -> int:
    """Bytes of the model's weights on disk; beyond everything where they are not here."""
    folder = Path(recipe.policy.model).expanduser()
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")] if folder.is_dir() else []
    return sum(sizes) or 2**62


def _sentence(recipe: Recipe, plan: Plan, way: str, when: str) -> str:
    largest = sorted(plan.memory[way].items(), key=lambda part: -part[1])[:3]
    where = "the memory of this machine" if plan.devices.kind == "cpu" else "the device"
    share = f", for each of {plan.devices.count} processes," if plan.devices.count > 1 else ""
    help_ = "; or ".join(remedies(recipe, plan, way)[:3]) or "take a smaller model"
    return (
        f"this run needs about {plan.total(way) / 1e9:.3g} GB {when} ({NAMES[way]}: "
        f"{', '.join(f'{name} {size / 1e9:.3g}' for name, size in largest if size)}), and {where}{share} has "
        f"{plan.devices.memory / 1e9:.3g}: give {help_}; `align doctor --plan` shows every part"
    )
