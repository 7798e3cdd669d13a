"""What a run's held-out figures say, in words."""

from dataclasses import dataclass

from align.report.reading import Run
from align.report.summary import ROWS, figure, plus_minus, verdict

SMALL = 0.005
"""A change of less than this, in a share or against the larger of two figures, is called none."""
CARDS = (
    "sample_reward",
    "pair_accuracy",
    "likelihood_pair_accuracy",
    "margin",
    "best_logprob_change",
    "best_fell_share",
    "loss",
)
"""The figures that open the page, in this order."""
NAMES = {
    "sample_reward": "Reward of samples",
    "pair_accuracy": "Pairs right, by implicit reward",
    "likelihood_pair_accuracy": "Pairs right, by likelihood",
    "margin": "Margin, best over worst",
    "best_logprob_change": "Log-prob of the best, nats",
    "best_fell_share": "Lists whose best fell",
    "loss": "Loss",
}
PERCENT = {"pair_accuracy", "likelihood_pair_accuracy", "best_fell_share"}
BOUNDED = PERCENT | {"ndcg", "kendall_tau", "top1_agreement", "likelihood_ndcg"}
SENTENCES = {
    "sample_reward": "What the policy writes earns {after} on average from the reward model, {before} before.",
    "pair_accuracy": "The implicit reward puts {after} of the graded pairs in the right order; chance gets 50 %.",
    "likelihood_pair_accuracy": "Probability per token puts {after} of the pairs in the right order, {before} before.",
    "margin": "The best completion's implicit reward less the worst one's is {after}, {before} before.",
    "best_logprob_change": "The best completion's log-probability changed by {after} nats on average.",
    "best_fell_share": "In {after} of the lists the best completion is less probable than before.",
    "loss": "The loss on the held-out lists went from {before} to {after}.",
}


@dataclass(frozen=True)
class Figure:
    """One held-out figure before and after training, as text."""

    key: str
    label: str
    before: str
    after: str
    change: str
    verdict: str
    """better, worse, unchanged, within noise, too few lists; empty where neither direction is good by itself, or where
    the run did not keep how sure the change is."""

    @property
    def sentence(self) -> str:
        return SENTENCES[self.key].format(before=self.before, after=self.after)


def cards(run: Run) -> list[Figure]:
    """The figures that open the page."""
    patterns = {key: pattern for key, _, pattern in ROWS} | dict.fromkeys(PERCENT, "{:.1%}")
    figures = (_figure(run, key, NAMES[key], patterns[key]) for key in CARDS)
    return [figure for figure in figures if figure]


def table(run: Run) -> dict[str, Figure]:
    """Every figure of the table at the end of `align train`, by label."""
    figures = (_figure(run, key, label, pattern) for key, label, pattern in ROWS)
    return {figure.label: figure for figure in figures if figure}


def other_figures(run: Run) -> dict[str, Figure]:
    """The held-out figures that no table explains."""
    explained = {key for key, *_ in ROWS}
    names = [name for name in _evaluated(run)[1] if name not in explained]
    figures = (_figure(run, name, name, "{:.4f}") for name in names)
    return {figure.label: figure for figure in figures if figure}


def _evaluated(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    summary = run.summary or {}
    return summary.get("eval_before") or {}, summary.get("eval_after") or {}


def _figure(run: Run, key: str, label: str, pattern: str) -> Figure | None:
    before, after = (figures.get(key) for figures in _evaluated(run))
    if before is None or after is None:
        return None
    paired = (run.summary or {}).get("eval_change", {}).get(key)
    change = plus_minus(pattern, paired) or figure("{:+" + pattern[pattern.index(".") :], after - before)
    was, now = _typeset(figure(pattern, before)), _typeset(figure(pattern, after))
    return Figure(key, label, was, now, _typeset(change), _verdict(key, before, after, paired))


def _verdict(key: str, before: float, after: float, change: dict[str, float] | None) -> str:
    if key not in {row for row, *_ in ROWS}:
        return ""
    if abs(after - before) < SMALL * (1 if key in BOUNDED else max(abs(before), abs(after))) or after == before:
        return "unchanged"
    return verdict(key, change)


def _typeset(text: str) -> str:
    return text.replace("-", "−").replace("%", " %")
