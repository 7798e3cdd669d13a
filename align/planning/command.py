"""`align doctor --plan RECIPE`: what a run would need, without loading a weight."""

import json
from typing import Any

from align.data import Prepared
from align.errors import UserError
from align.planning.devices import devices as devices_of
from align.planning.lengths import written
from align.planning.measure import measured_rate
from align.planning.plan import Plan, make_plan
from align.planning.remedies import remedies
from align.planning.show import print_plan
from align.progress import stage
from align.recipe import Recipe, load_recipe
from align.rollout.prompts import read_prompts
from align.runs.build import prepare


def plan_recipe(
    plan: list[str],
    *,
    devices: int | None = None,
    memory: str | None = None,
    rate: float | None = None,
    measure: bool = False,
    as_json: bool = False,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> Plan:
    """Print what the run of a recipe needs, as a table or as JSON.

    Args:
        plan: a recipe's file or name, and keys laid over it.
        devices: how many; by default one.
        memory: of one, such as 80GB; by default that of this machine's device.
        rate: TFLOP/s of one device.
        measure: find the rate by a pass of the model here.
        trust_remote_code: run the code that the model comes with.
        allow_code: call the functions that a recipe names although it may be a stranger's.

    Raises:
        UserError: the recipe, its rows or its model cannot be planned with, or two rates are asked for.
    """
    if rate is not None and measure:
        raise UserError("--rate and --measure: keep one of them")
    recipe = load_recipe(plan[0], plan[1:], trust_remote_code=trust_remote_code, allow_code=allow_code)
    found, prepared = _plan(recipe, devices_of(devices, memory))
    speed = rate * 1e12 if rate else None
    if measure:
        if prepared is None:
            raise UserError("--measure: an online run has no rows yet; give --rate")
        speed = measured_rate(recipe, prepared, found)
    if as_json:
        print(json.dumps(found.as_dict() | {"rate": speed, "hours": found.hours(speed) if speed else None}, indent=1))
    else:
        print_plan(found, rate=speed, measured=measure)
    return found


def _plan(recipe: Recipe, devices: Any) -> tuple[Plan, Prepared | None]:
    if recipe.online:
        prompts = read_prompts(recipe)
        lists = written(prompts.ids, completions=recipe.rollout.completions, tokens=recipe.rollout.max_tokens)
        train, heldout, prepared = lists, lists.select([]), None
    else:
        prepared = prepare(recipe)
        train, heldout = prepared.train, prepared.heldout
    with stage("planning, on tensors without values"):
        found = make_plan(recipe, train, heldout, devices)
    way = "ddp" if devices.count > 1 else "one"
    if not found.fits(way):
        found.remedies += remedies(recipe, found, way)
    return found, prepared
