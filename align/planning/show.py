"""A plan on the terminal."""

from rich.console import Console, Group, RenderableType
from rich.text import Text

from align.planning.plan import Plan
from align.tables import Table

NAMES = {"one": "one device", "ddp": "DDP", "zero2": "ZeRO-2", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}


def render(plan: Plan, *, rate: float | None, measured: bool) -> RenderableType:
    """Every part in GB for every way, what does not fit, hours and disk.

    Args:
        rate: operations per second of one device, where it is known.
        measured: whether it is that of a step on this machine.
    """
    table = Table(box=None, pad_edge=False, title="GB on one device", title_justify="left")
    table.add_column("")
    for way in plan.memory:
        table.add_column(NAMES[way], justify="right")
    names = list(dict.fromkeys(name for own in plan.memory.values() for name in own))
    for name in names:
        table.add_row(name, *(_gb(own.get(name, 0)) for own in plan.memory.values()))
    table.add_row("in all", *(_gb(plan.total(way)) for way in plan.memory), style="bold")
    table.add_row(f"of {_gb(plan.devices.memory)}", *("fits" if plan.fits(way) else "too much" for way in plan.memory))
    lines = [_run(plan), _time(plan, rate, measured), _disk(plan), *(f"to save: {one}" for one in plan.remedies)]
    return Group(table, *(Text(line) for line in lines if line))


def print_plan(plan: Plan, *, rate: float | None, measured: bool) -> None:
    Console(width=None).print(render(plan, rate=rate, measured=measured))


def _run(plan: Plan) -> str:
    looked = "" if plan.looked_at == plan.steps else f" (found in {plan.looked_at} of them, evenly taken)"
    return (
        f"{plan.parameters:,} parameters, {plan.trained:,} of them trained; {plan.steps} steps of up to {plan.passes} "
        f"passes, the largest of {plan.largest_pass} tokens{looked}; {plan.checkpointed} of {plan.layers} layers "
        "compute again"
    )


def _time(plan: Plan, rate: float | None, measured: bool) -> str:
    parts = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in plan.operations.items())
    if rate is None:
        return f"TFLOP: {parts}; --rate TFLOP/s or --measure turns them into hours"
    source = "as a step here ran" if measured else "as given"
    return f"{plan.hours(rate):.3g} hours at {rate / 1e12:.3g} TFLOP/s a device, {source} (TFLOP: {parts})"


def _disk(plan: Plan) -> str:
    return "disk: " + ", ".join(f"{name} {_gb(size)} GB" for name, size in plan.disk.items())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
