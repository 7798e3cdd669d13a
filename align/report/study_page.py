"""The page and the plot of a study, from its study.json alone."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.files import read_json, write_json, write_text
from align.report.charts import Tick, number_format, round_size
from align.report.page import page_parts, templates
from align.report.summary import LOWER_IS_BETTER, ROWS, figure

STUDY, PLOT, PAGE = "study.json", "study.svg", "report.html"
LABELS = {key: label for key, label, _ in ROWS}
ROW, WIDTH, LEFT, RIGHT, TOP, BOTTOM = 22, 560, 190, 16, 8, 26
"""Height of an arm's row, width of a picture, and its margins."""


@dataclass(frozen=True)
class Bar:
    """One arm in a picture: a dot for each seed, the mean and its interval, placed."""

    name: str
    y: float
    dots: list[float]
    mean: float
    low: float
    high: float
    has_interval: bool
    told: str


@dataclass(frozen=True)
class Strip:
    """One figure of all arms, one below the other."""

    key: str
    title: str
    better: str
    bars: list[Bar]
    ticks: list[Tick]
    height: float
    zero: float | None

    @property
    def description(self) -> str:
        """What one who does not see the picture should know."""
        return f"{self.title} by arm. " + "; ".join(f"{bar.name}: {bar.told}" for bar in self.bars) + "."


def write_study(folder: Path, result: dict[str, Any]) -> None:
    """Write study.json, and beside it the plot and the page of what it says."""
    write_json(folder / STUDY, result)
    strips = [strip for key in result["figures"] if (strip := _strip(result, key))]
    picture = templates().get_template("study.svg.jinja").render(strips=strips, size=_size())
    write_text(folder / PLOT, picture)
    write_text(folder / PAGE, render_study(folder.resolve().name, result))


def read_study(folder: Path) -> dict[str, Any]:
    """What study.json of a folder holds.

    Raises:
        UserError: it is damaged, or none.
    """
    result = read_json(folder / STUDY)
    if not isinstance(result, dict) or not {"arms", "figures", "seeds", "compute"} <= result.keys():
        raise UserError(f"{folder / STUDY}: no figures of a study; run `align study` again")
    return result


def render_study(title: str, result: dict[str, Any]) -> str:
    """The page; everything from a file is escaped by the template engine."""
    every = [key for arm in result["arms"].values() for key in arm["figures"]]
    return (
        templates()
        .get_template("study.html.jinja")
        .render(
            title=title,
            kind="Align study",
            study=result,
            strips=[strip for key in result["figures"] if (strip := _strip(result, key))],
            others=[key for key in dict.fromkeys(every) if key not in result["figures"]],
            labels=LABELS,
            size=_size(),
            told=in_interval,
            in_line=lambda value: json.dumps(value, ensure_ascii=False),
            **page_parts(),
        )
    )


def in_interval(value: dict[str, Any] | None, *, signed: bool = False) -> str:
    """A mean with half of its interval, to the digits that the interval leaves; alone where one value has none."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    if value["low"] is None:
        return f"{value['mean']:{sign}.4g}"
    half = (value["high"] - value["low"]) / 2
    digits = 4 if half <= 0 else min(6, max(0, 1 - math.floor(math.log10(half))))
    return f"{figure(f'{{:{sign}.{digits}f}}', value['mean'])} ± {half:.{digits}f}"


def _size() -> dict[str, float]:
    return {"ROW": ROW, "WIDTH": WIDTH, "LEFT": LEFT, "RIGHT": RIGHT, "TOP": TOP, "BOTTOM": BOTTOM}


def _strip(result: dict[str, Any], key: str) -> Strip | None:
    """The picture of one figure; None where no arm has it."""
    arms = {name: arm for name, arm in result["arms"].items() if key in arm["figures"]}
    if not arms:
        return None
    values = {
        name: [run["figures"][key] for run in arm["runs"] if key in run.get("figures", {})]
        for name, arm in arms.items()
    }
    ends = [end for name, arm in arms.items() for end in (*values[name], *_ends(arm["figures"][key]))]
    low, high, ticks, place = _axis(ends)
    bars = [
        Bar(
            name=name,
            y=TOP + ROW * (row + 0.5),
            dots=[place(value) for value in values[name]],
            mean=place(arm["figures"][key]["mean"]),
            low=place(_ends(arm["figures"][key])[0]),
            high=place(_ends(arm["figures"][key])[1]),
            has_interval=arm["figures"][key]["low"] is not None,
            told=in_interval(arm["figures"][key]),
        )
        for row, (name, arm) in enumerate(arms.items())
    ]
    better = "smaller is better" if key in LOWER_IS_BETTER else ""
    height = TOP + ROW * len(bars) + BOTTOM
    return Strip(key, LABELS.get(key, key), better, bars, ticks, height, place(0.0) if low < 0 < high else None)


def _ends(value: dict[str, Any]) -> tuple[float, float]:
    """An interval, or a mean without one."""
    return (value["mean"],) * 2 if value["low"] is None else (value["low"], value["high"])


def _axis(values: Sequence[float]) -> tuple[float, float, list[Tick], Any]:
    """Bounds, ticks, and from a value to its place."""
    low, high = min(values), max(values)
    if math.isclose(low, high, rel_tol=1e-6):
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    unit = round_size((high - low) / 5)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    scale = (WIDTH - LEFT - RIGHT) / ((last - first) * unit)

    def place(value: float) -> float:
        return LEFT + (value - first * unit) * scale

    text = number_format(unit, max(abs(first), abs(last)) * unit)
    return first * unit, last * unit, [Tick(place(i * unit), text(i * unit)) for i in range(first, last + 1)], place
