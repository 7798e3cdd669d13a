"""What `align evaluate policy` prints."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from align.progress import counted
from align.report.measured import RATES
from align.tables import Table

SIDES = (
    ("reward", "reward", "{:+.4f}"),
    ("length", "characters", "{:.0f}"),
    ("distinct_1", "distinct words", "{:.3f}"),
    ("distinct_2", "distinct pairs of words", "{:.3f}"),
    ("repetition", "repeated runs of four words", "{:.3f}"),
    ("ended", "ended by itself", "{:.3f}"),
)


def show(console: Console, figures: dict[str, Any], unlabelled: str) -> None:
    """Print the tables and sentences."""
    for judge in figures["judges"]:
        console.print(_of_judge(judge, f"{figures['policy']} against {figures['against']}, by {judge['name']}"))
    console.print(_of_sides(figures))
    if figures["ranking"]:
        console.print(_of_models(figures["ranking"]))
    console.print("\n".join(sentences(figures, unlabelled)), highlight=False, markup=False)


def sentences(figures: dict[str, Any], unlabelled: str) -> Iterator[str]:
    """What the tables do not hold, a line each."""
    yield f"{counted(figures['prompts'], 'prompt')}, {counted(figures['comparisons'], 'comparison')}"
    if figures["left_out"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in figures["left_out"].items())
        yield f"prompts left out: {reasons}"
    for judge in figures["judges"]:
        name = judge["name"]
        yield f"{name}: {judge['wins']:.1%} won, {judge['losses']:.1%} lost, {judge['ties']:.1%} tied"
        if judge["position_flips"] is not None:
            yield f"{name}: {judge['position_flips']:.1%} of its verdicts follow the order in which it sees the answers"
        if judge["without_a_verdict"]:
            yield f"{name}: {counted(judge['without_a_verdict'], 'comparison')} without a verdict, left out"
        if labels := judge["labels"]:
            own = labels["accuracy"]
            yield (
                f"{name}: right in {span(own, '{:.3f}')} of {counted(labels['pairs'], 'pair')} that the rows grade; "
                f"calibration error {labels['calibration_error']:.3f}, Brier score {labels['brier']:.3f}; "
                f"`longer wins` is right in {labels['longer_wins']:.3f}"
            )
    if unlabelled:
        yield f"no judge is held against the rows: {unlabelled}"
    names = {judge["judge"]: judge["name"] for judge in figures["judges"]}
    for both in figures["agreement"]:
        kappa = "undefined" if both["kappa"] is None else f"{both['kappa']:.3f}"
        one, other = (names[spec] for spec in both["judges"])
        yield f"{one} and {other}: the same in {both['same']:.1%}, kappa {kappa}"
    if figures["kl"]:
        yield f"KL to what it was before: {span(figures['kl'], '{:.3f}')} nats, {figures['kl_per_token']:.4f} a token"


def span(own: dict[str, Any], pattern: str) -> str:
    """A mean with its interval."""
    mean = pattern.format(own["mean"])
    return mean if own["low"] is None else f"{mean} [{pattern.format(own['low'])}, {pattern.format(own['high'])}]"


def _of_judge(judge: dict[str, Any], title: str) -> Table:
    table = Table("", "mean", "95 % interval", title=Text(title), title_justify="left")
    for key, label, pattern in RATES:
        if own := judge[key]:
            low = "unknown" if own["low"] is None else f"{pattern.format(own['low'])} to {pattern.format(own['high'])}"
            table.add_row(label, pattern.format(own["mean"]), low)
    return table


def _of_sides(figures: dict[str, Any]) -> Table:
    table = Table("", escape(figures["policy"]), escape(figures["against"]))
    for key, label, pattern in SIDES:
        values = (figures[key], figures[f"{key}_against"])
        if any(value is not None for value in values):
            table.add_row(label, *("" if value is None else pattern.format(value) for value in values))
    if figures["best_of_n"]:
        for n in sorted({1, 2, 4, 8, 16, 32, len(figures["best_of_n"])} - {1}):
            if n <= len(figures["best_of_n"]):
                cells = (
                    f"{figures[f'best_of_n{side}'][n - 1]:+.4f}"
                    for side in ("", "_against")
                    if n <= len(figures[f"best_of_n{side}"])
                )
                table.add_row(f"reward of the best of {n}", *cells)
    return table


def _of_models(ranking: list[dict[str, Any]]) -> Table:
    table = Table("", "Elo", "95 % interval", title="ranking", title_justify="left")
    for own in ranking:
        table.add_row(Text(own["model"]), f"{own['elo']:.0f}", f"{own['low']:.0f} to {own['high']:.0f}")
    return table
