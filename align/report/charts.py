"""Curves over the optimizer steps: which there are, and their geometry.

A line's points are the logged values themselves, in the power of ten of the axis's size, since browsers do not draw
what they must stretch by 1e8; an SVG transform carries them into the picture. So the file holds each number once, the
page's script reads them from there, and the pictures need no script.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from align.losses.metrics import LOG_NAMES
from align.report.reading import Line, Run

COLOURS = 8
"""Line colours that style.css has."""
WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 10, 24
"""Margins that hold the tick labels."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """Metrics that share a picture."""

    title: str
    unit: str
    metrics: dict[str, str]
    """Name in metrics.jsonl -> label."""
    note: str = ""
    share: bool = False
    """The axis goes from 0 to 1."""
    smooth: bool = True


MAIN = (
    Plot("Loss", "per list", {"loss": "training"}, "Mean of the objective over a step's lists."),
    Plot(
        "Margin",
        "implicit reward",
        {"rewards/margins": "best over worst"},
        "Implicit reward of the best-graded completion less that of the worst-graded.",
    ),
    Plot(
        "Log-probability",
        "nats per completion",
        {"logps/chosen": "best", "logps/rejected": "worst"},
        "Of the best- and the worst-graded completion under the policy; it moves with the lists of the step too.",
    ),
    Plot(
        "Displacement",
        "share of lists",
        {"best_fell_share": "best fell"},
        "Lists whose best completion is less probable than under the reference.",
        share=True,
    ),
    Plot(
        "Change of the best completion",
        "nats",
        {"best_logprob_change": "best"},
        "Its log-probability less the reference's; below 0 it has lost probability.",
    ),
    Plot("Gradient norm", "before clipping", {"grad_norm": "norm"}, "Spikes say that a step's lists pull hard."),
    Plot("Learning rate", "", {"learning_rate": "rate"}, "As the schedule sets it.", smooth=False),
    Plot(
        "Pair accuracy",
        "share of pairs",
        {"rewards/accuracies": "by implicit reward", "likelihood_pair_accuracy": "by likelihood"},
        "Graded pairs in the right order; a tie counts one half.",
        share=True,
    ),
    Plot(
        "NDCG",
        "at most 1",
        {"ndcg": "by implicit reward", "likelihood_ndcg": "by likelihood"},
        "How well the completions are ordered, the first places counting most.",
    ),
)
UNITS = {
    "kl": "nats per token",
    "entropy": "nats per token",
    "token_logprob_best": "nats per token",
    "token_logprob_worst": "nats per token",
    "rewards/chosen": "implicit reward",
    "rewards/rejected": "implicit reward",
    "completion_tokens_per_second": "tokens/s",
    "lists_per_second": "lists/s",
}
PLACES = {"step", "seconds", "epoch"}
"""What says when a line was written."""
HELD_OUT = {logged: f"eval_{name}" for name, logged in LOG_NAMES.items()}


@dataclass(frozen=True)
class Series:
    """One metric of one run."""

    metric: str
    run: str
    label: str
    colour: int
    dashed: bool
    raw: Points
    smooth: Points
    held_out: Points

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.run}, {self.label}" if self.run else self.label


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with ticks placed in the picture."""

    low: float
    high: float
    ticks: list[Tick]


@dataclass(frozen=True)
class Chart:
    """A plot with its runs' values."""

    plot: Plot
    series: list[Series]
    x: Axis
    y: Axis
    unknown: int
    """Logged values that are infinite or not a number; they cannot be drawn."""

    @property
    def power(self) -> int:
        """Points are values over ten to this."""
        return math.floor(math.log10(self.y.high - self.y.low))

    @property
    def transform(self) -> str:
        """From (step, point) to the picture."""
        across = self.x
        a = (WIDTH - LEFT - RIGHT) / (across.high - across.low)
        unit = 10.0**self.power
        d = -(HEIGHT - TOP - BOTTOM) / (self.y.high - self.y.low) * unit
        return f"matrix({a:.9g} 0 0 {d:.9g} {LEFT - a * across.low:.9g} {TOP - d * self.y.high / unit:.9g})"

    @property
    def description(self) -> str:
        """What one who does not see the picture should know."""
        lines = [
            f"{s.name}: {s.raw[0][1]:.4g} at step {s.raw[0][0]:g}, {s.raw[-1][1]:.4g} at step {s.raw[-1][0]:g}, "
            f"lowest {min(v for _, v in s.raw):.4g}, highest {max(v for _, v in s.raw):.4g}"
            for s in self.series
        ]
        return f"{self.plot.title} by optimizer step. {'; '.join(lines)}."


def main_charts(runs: Sequence[Run]) -> list[Chart]:
    """The curves that a run is judged by; those that no run logged are absent."""
    return _drawn(MAIN, runs)


def other_charts(runs: Sequence[Run]) -> list[Chart]:
    """Everything else that was logged, a picture each."""
    shown = PLACES.union(*(plot.metrics for plot in MAIN))
    names = dict.fromkeys(name for run in runs for line in run.steps for name in line if name not in shown)
    return _drawn([Plot(name, UNITS.get(name, ""), {name: name}) for name in names], runs)


def _drawn(plots: Sequence[Plot], runs: Sequence[Run]) -> list[Chart]:
    return [chart for chart in (_chart(plot, runs) for plot in plots) if chart]


def _chart(plot: Plot, runs: Sequence[Run]) -> Chart | None:
    series = [
        _series(run, plot, metric, number=i, among=len(runs), place=place)
        for i, run in enumerate(runs)
        for place, metric in enumerate(plot.metrics)
    ]
    series = [one for one in series if one.raw]
    if not series:
        return None
    steps = [step for s in series for step, _ in s.raw + s.held_out]
    values = [value for s in series for _, value in s.raw + s.held_out]
    return Chart(
        plot=plot,
        series=series,
        x=_step_axis(min(steps), max(steps)),
        y=_value_axis(*((0.0, 1.0) if plot.share else (min(values), max(values)))),
        unknown=sum(
            not math.isfinite(line[metric])
            for run in runs
            for line in run.steps
            for metric in plot.metrics
            if metric in line
        ),
    )


def _series(run: Run, plot: Plot, metric: str, *, number: int, among: int, place: int) -> Series:
    """One run's colours are its metrics'; of several runs each has a colour, and metrics differ by dashes."""
    raw = _points(run.steps, metric)
    return Series(
        metric=metric,
        run=run.name if among > 1 else "",
        label=plot.metrics[metric],
        colour=number if among > 1 else place,
        dashed=among > 1 and place > 0,
        raw=raw,
        smooth=_smoothed(raw) if plot.smooth else [],
        held_out=_points(run.evaluations, HELD_OUT.get(metric, f"eval_{metric}")),
    )


def _points(lines: Sequence[Line], metric: str) -> Points:
    return [(line["step"], line[metric]) for line in lines if math.isfinite(line.get(metric, math.nan))]


def smoothing_window(points: int) -> int:
    """Values that a smoothed one is the mean of: an odd number, about a fifteenth of the run."""
    return 2 * max(1, points // 30) + 1


def _smoothed(points: Points) -> Points:
    """Mean over the steps around each; the window is shorter at both ends."""
    half = smoothing_window(len(points)) // 2
    values = [value for _, value in points]
    return [(step, fmean(values[max(0, i - half) : i + half + 1])) for i, (step, _) in enumerate(points)]


def _step_axis(first: float, last: float) -> Axis:
    if first == last:
        first, last = first - 1, last + 1
    size = max(1, round(round_size((last - first) / 5)))
    inside = range(math.ceil(first / size), math.floor(last / size) + 1)
    scale = (WIDTH - LEFT - RIGHT) / (last - first)
    return Axis(first, last, [Tick(LEFT + (i * size - first) * scale, str(i * size)) for i in inside])


def _value_axis(low: float, high: float) -> Axis:
    if math.isclose(low, high, rel_tol=1e-6):
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    size = round_size((high - low) / 4)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    scale = (HEIGHT - TOP - BOTTOM) / ((last - first) * size)
    text = number_format(size, max(abs(first), abs(last)) * size)
    ticks = [Tick(TOP + (last - i) * size * scale, text(i * size)) for i in range(first, last + 1)]
    return Axis(first * size, last * size, ticks)


def round_size(size: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= size * 0.999)


def number_format(size: float, largest: float) -> Callable[[float], str]:
    """As few digits as tell ticks of this distance apart."""
    digits = 1 + (f"{size:.1e}"[2] != "0")  # of the distance itself
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))

    def text(value: float) -> str:
        if value == 0 or (decimals <= 4 and largest < 1e5):
            return f"{value:.{decimals if value else 0}f}".replace("-", "−")
        power = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**power:.{digits + power - math.floor(math.log10(size))}g}e{power}".replace("-", "−")

    return text
