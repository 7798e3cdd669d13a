"""The table at the end of a run."""

import shlex
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from align.progress import counted
from align.report.displacement import sentence
from align.tables import Table

ROWS = (
    ("loss", "loss", "{:.4f}"),
    ("ndcg", "NDCG by implicit reward", "{:.4f}"),
    ("kendall_tau", "Kendall tau by implicit reward", "{:+.4f}"),
    ("pair_accuracy", "pair accuracy by implicit reward", "{:.4f}"),
    ("top1_agreement", "top-1 agreement by implicit reward", "{:.4f}"),
    ("likelihood_ndcg", "NDCG by mean token log-probability", "{:.4f}"),
    ("likelihood_pair_accuracy", "pair accuracy by mean token log-probability", "{:.4f}"),
    ("margin", "margin, best over worst (nats)", "{:+.3f}"),
    ("best_logprob_change", "best completion's log-probability, change (nats)", "{:+.3f}"),
    ("best_fell_share", "share of lists whose best completion fell", "{:.3f}"),
    ("prompt_sensitivity", "log-probability apart between wordings (nats a token)", "{:.4f}"),
    ("sample_reward", "mean reward of sampled completions", "{:+.4f}"),
)
"""Key of `eval_before` and `eval_after`, what it is called, and its format."""
FEWEST, FEW = 5, 30
"""Lists below which a standard error says nothing, and below which only large changes show."""
LOWER_IS_BETTER = {"loss", "best_fell_share"}
SQUARED_ERROR = "squared_error/"
"""How the keys of a reward model's attributes begin."""


def print_summary(path: str, summary: dict[str, Any], *, show: int, console: Console | None = None) -> None:
    """Before and after on the held-out lists, the sampled completions, and where the run is."""
    console = console or Console(soft_wrap=False)
    before, after = summary["eval_before"], summary["eval_after"]
    if "iterations" in summary:
        console.print(_iterations(summary))
    elif before:
        lists = summary["data"]["heldout_lists"]
        console.print(_table(before, after, summary.get("eval_change", {}), lists, task=summary["task"]))
        if lists < FEW:
            console.print(few_lists(lists))
    if "displacement" in summary:
        console.print(sentence(summary["displacement"]))
    if summary["samples"][:show]:
        rewarded = ", with their rewards in brackets" if "reward_after" in summary["samples"][0] else ""
        console.print(f"sampled completions of held-out prompts, before and after training{rewarded}")
    for sample in summary["samples"][:show]:
        console.print(_sample(sample))
    console.print(
        f"{counted(summary['steps'], 'step')} in {summary['train_seconds']:.0f} s, "
        f"{summary['tokens_per_second']:.0f} completion tokens/s, "
        f"peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    console.print(Text(f"run directory: {path}"), soft_wrap=True)


def next_steps(path: str, task: str, *, to: Literal["transformers", "peft"]) -> str:
    """What a newcomer does with a finished run.

    Args:
        to: the format that every base has a place for.
    """
    run = shlex.quote(path)
    made = f"`align export {run} FOLDER --to {to}` makes {'a model' if to == 'transformers' else 'an adapter'}"
    if task == "reward":
        return f"next: {made}, `align score IN OUT --reward FOLDER` uses it"
    return f"next: `align chat {run}` answers side by side, {made}"


def few_lists(lists: int) -> str:
    """What so small a held-out set cannot show, and how to make it larger."""
    show = "shows" if lists == 1 else "show"
    return (
        f"{counted(lists, 'held-out list')} {show} large changes only; a larger `data.eval_fraction`, or rows of "
        f"their own in `data.eval_sources`, shows smaller ones ({FEW} or more are worth having)"
    )


def verdict(key: str, change: dict[str, float] | None) -> str:
    """What a paired change says: better or worse only where it is more than twice its standard error.

    Args:
        key: of `ROWS`.
        change: a figure of `eval_change`; None where it is not known.

    Returns:
        better, worse, within noise, too few lists, or nothing.
    """
    if change is None:
        return ""
    if change["lists"] < FEWEST:
        return "too few lists"
    difference = change["difference"]
    if difference == 0 or abs(difference) <= 2 * change["standard_error"]:
        return "within noise"
    return "better" if (difference < 0) == (key in LOWER_IS_BETTER) else "worse"


def _table(
    before: dict[str, float], after: dict[str, float], changes: dict[str, dict[str, float]], lists: int, *, task: str
) -> Table:
    table = Table(title=counted(lists, "held-out list"), title_justify="left")
    columns = [("", "left"), ("before", "right"), ("after", "right"), ("change", "right"), ("", "left")]
    for header, justify in columns if changes else columns[:3]:
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for key, label, pattern in ROWS:
        if key in after:
            figures = (figure(pattern, before[key]), figure(pattern, after[key]))
            change = changes.get(key)
            told = (plus_minus(pattern, change), verdict(key, change)) if changes else ()
            table.add_row(in_words(label, task), *figures, *told)
    for key in sorted(key for key in after if key.startswith(SQUARED_ERROR)):
        label = f"squared error of {key.removeprefix(SQUARED_ERROR)}"
        table.add_row(label, f"{before[key]:.4f}", f"{after[key]:.4f}")
    return table


def plus_minus(pattern: str, change: dict[str, float] | None) -> str:
    """A change and its standard error, in a figure's format; nothing where it is not known."""
    if change is None:
        return ""
    digits = pattern[pattern.index(".") :]
    return f"{figure('{:+' + digits, change['difference'])} ± {figure('{:' + digits, change['standard_error'])}"


def figure(pattern: str, value: float) -> str:
    """A formatted number; what rounds to zero has no minus."""
    text = pattern.format(value)
    return pattern.format(0.0) if float(text.rstrip("%")) == 0 else text


def in_words(label: str, task: str) -> str:
    """A row's name; a reward model's reward is its output, in no unit."""
    return label.replace("implicit reward", "reward").replace(" (nats)", "") if task == "reward" else label


ITERATION_COLUMNS = (
    ("sampled_reward", "rollouts", "{:+.3f}"),
    ("reward_before", "held out", "{:+.3f}"),
    ("reward_after", "after", "{:+.3f}"),
    ("lists", "lists", "{}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("entropy", "entropy", "{:.3f}"),
)
"""Key of an online run's iteration, what it is called, and its format."""


def _iterations(summary: dict[str, Any]) -> Table:
    """All of an online run in one table: what was measured before it and after each iteration, and what that took."""
    table = Table(title=counted(summary["data"]["heldout_lists"], "held-out list"), title_justify="left")
    iterations = summary["iterations"]
    for header in ("", "before", *(f"after {one['iteration']}" for one in iterations)):
        table.add_column(header, justify="right" if header else "left")
    moments = [summary["eval_before"], *(one.get("eval_after", {}) for one in iterations)]
    for key, label, pattern in ROWS:
        if any(key in moment for moment in moments):
            table.add_row(label, *(_cell(moment.get(key), pattern) for moment in moments))
    table.add_section()
    for key, label, pattern in OF_AN_ITERATION:
        if any(one.get(key) is not None for one in iterations):
            table.add_row(label, "", *(_cell(one.get(key), pattern) for one in iterations))
    for stage in dict.fromkeys(name for one in iterations for name in one["seconds"]):
        table.add_row(f"seconds to {stage}", "", *(_cell(one["seconds"].get(stage), "{:.0f}") for one in iterations))
    return table


def _cell(value: float | None, pattern: str) -> str:
    return "" if value is None else figure(pattern, value)


OF_AN_ITERATION = (
    ("sampled_reward", "mean reward of the rollouts", "{:+.3f}"),
    ("lists", "lists trained on", "{}"),
    ("tokens_per_second", "rollouts' tokens/s", "{:.0f}"),
    ("entropy", "rollouts' entropy (nats)", "{:.3f}"),
)
"""Key of an iteration, what it is called, and its format."""


def _sample(sample: dict[str, Any]) -> Text:
    text = Text("\n")
    text.append("prompt  ", style="bold").append(_one_line(sample["prompt"]) + "\n")
    for when in ("before", "after"):
        reward = sample.get(f"reward_{when}")
        text.append(f"{when:7} ", style="bold")
        text.append(_one_line(sample[when]))
        text.append(f"  [{reward:+.2f}]\n" if reward is not None else "\n", style="dim")
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())
