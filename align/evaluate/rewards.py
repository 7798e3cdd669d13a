"""`align evaluate rewards`: how good and how calibrated a scorer is, or the rewards that rows hold."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.console import Console

from align.data.columns import how_to_ignore
from align.data.one_form import Form
from align.data.row_numbers import WEIGHT
from align.data.schema import Row, Text
from align.data.source_view import mapping_of
from align.data.sources import read_source
from align.errors import UserError
from align.evaluate.reward_tables import ALL, sentences, tables
from align.files import write_json
from align.progress import stage
from align.runs.memory import scoring_in_words
from align.runs.scorers import load_scorer
from rewards import Reward, read_reward
from rewards.benchmarks import (
    RAG_REWARDBENCH,
    STYLES,
    TiesPrompt,
    accuracy,
    calibration,
    fitted_temperature,
    group_figures,
    in_buckets,
    length_figures,
    off_topic_answers,
    pair_margins,
    rag_means,
    rag_scenario,
    rewardbench,
    rm_bench_domain,
    style_matrix,
    ties_score,
)
from rewards.digest import reads_text_without_template
from rewards.transforms import dataset_statistics, transform
from rewards.types import Asked

Benchmark = Literal["rewardbench", "rewardbench2", "rm-bench", "rag-rewardbench"]
TIES = "ties"
"""RewardBench 2's subset with a score of its own, in lower case."""


@dataclass(frozen=True)
class Judged:
    """A row with the rewards that are measured and the grades they are measured by."""

    row: Row
    rewards: tuple[float, ...]
    grades: tuple[float, ...]

    @property
    def lengths(self) -> list[float]:
        """Characters of each completion."""
        return [float(len(_characters(text))) for text in self.row.completions]


class RewardScorer:
    """A reward as it is specified: a scorer, the transforms of its rewards, and their weight."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.of_chats = reads_text_without_template(reward.scorer)
        """Whether its model has a chat template, which it puts around messages alone."""
        self.scorer = load_scorer(reward.scorer)

    def score(self, rows: Sequence[Row], completions: Sequence[Text]) -> list[float]:
        """The scorer's own rewards, before transforms and weight, of one completion for each row's prompt.

        Raises:
            UserError: a row has no reference answer to compare with.
        """
        column = getattr(self.reward.scorer, "answer_column", None)
        answers = [[_answer(row, column) for row in rows]] if column else []
        setting = "`tokens_per_batch: {}` among the keys of --reward"
        with scoring_in_words(self.reward.scorer, setting, goes_on="it does not change the figures"):
            prompts = [Asked.of(row.prompt, row.template_arguments) for row in rows]  # type: ignore[arg-type]
            rewards: list[float] = self.scorer.score(prompts, completions, *answers)
        return rewards

    def of_lists(self, rows: Sequence[Row]) -> list[list[float]]:
        """Weighted rewards of every row's completions, after transforms."""
        flat = iter(
            self.score([row for row in rows for _ in row.completions], [t for r in rows for t in r.completions])
        )
        lists: list[tuple[list[float], Sequence[Any]]] = [
            (list(islice(flat, len(row.completions))), row.completions) for row in rows
        ]
        steps, weight = self.reward.transforms, self.reward.weight
        known = dataset_statistics(lambda: ((own, texts, ()) for own, texts in lists), steps)
        return [[weight * value for value in transform(own, texts, steps, known)] for own, texts in lists]


def evaluate_rewards(
    path: str,
    *,
    reward: str | None = None,
    split: str | None = None,
    by: str = "subset",
    ties: Literal["half", "wrong"] = "half",
    benchmark: Benchmark | None = None,
    bins: int = 10,
    buckets: str | None = None,
    limit: int | None = None,
    ignore: Sequence[str] = (),
    columns: Sequence[str] = (),
    where: str | None = None,
    json_path: str | None = None,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Accuracy by group, best of n, calibration and what is owed to length, printed and returned.

    Args:
        path: rows of two or more completions with grades: a file, a folder or a hub data set.
        reward: what `rewards.read_reward` reads; None measures the rows' own `rewards`.
        by: the column whose values are the groups.
        ties: "wrong" counts a tie 0 and not one half; RewardBench and RM-Bench do.
        benchmark: print that benchmark's own score too, by its own arithmetic.
        bins: of the reliability table.
        buckets: a column of numbers, such as difficulties: figures of five parts of the rows, its lowest values first.
        limit: read only this many rows.
        ignore: columns that count as absent.
        columns: `name=place` for each column that the rows have elsewhere.
        where: a condition on the rows' own columns; others are left out.
        json_path: where every figure is written as well.
        allow_code: consent to functions that a file of `reward` names although it may be a stranger's.

    Raises:
        UserError: a row cannot be judged, or does not fit the benchmark.
    """
    console = console or Console()
    with stage(f"reading {path}"):
        mapping = mapping_of(columns)
        source = read_source(path, split=split, limit=limit, ignore=ignore, columns=mapping, where=where)
    _refuse_weights(source.rows)
    rows = [row for row in map(_by_given_grades, source.rows) if _orders(row, scored=reward is not None)]
    if not rows:
        raise UserError(f"{path}: no row grades two completions differently, so there is nothing to judge rewards by")
    _check_groups(path, rows, by, benchmark)
    _check_buckets(rows, buckets)
    scorer = RewardScorer(read_reward(reward, allow_code=allow_code)) if reward is not None else None
    texts = [row for row in rows if isinstance(row.prompt, str)] if scorer and scorer.of_chats else []
    if benchmark is not None and texts:
        rows = [_as_conversation(row) for row in rows]
    elif texts:
        form = Form()
        for row in rows:
            form.check(row)
    judged = _judge(rows, scorer)
    worth = 0.0 if ties == "wrong" or benchmark == "rewardbench" else 0.5
    figures: dict[str, Any] = {
        "input": path,
        "reward": reward,
        "ties": worth,
        "rows": {"read": source.read, "judged": len(judged), "without_an_order": source.read - len(judged)},
        "text_rows": {
            "without_template": 0 if benchmark else len(texts),
            "as_messages": len(texts) if benchmark else 0,
        },
        **measure(judged, by=by, ties=worth, bins=bins),
    }
    if scorer is not None:
        figures["off_topic"] = off_topic_figures(judged, scorer)
    figures |= _asked_figures(judged, benchmark, buckets, ties=worth)
    for table in tables(figures):
        console.print(table)
    console.print("\n".join(sentences(figures)), highlight=False)
    if json_path:
        write_json(Path(json_path), figures)
    return figures


def _as_conversation(row: Row) -> Row:
    """A row of texts as a user's message and the assistant's, as RewardBench reads every row under a chat template."""
    if not isinstance(row.prompt, str):
        return row
    answers = tuple([{"role": "assistant", "content": text}] for text in row.completions)
    return replace(row, prompt=[{"role": "user", "content": row.prompt}], completions=answers)


def _refuse_weights(rows: Sequence[Row]) -> None:
    """Benchmarks count every row once."""
    weighted = next((row for row in rows if row.loss_weight != 1), None)
    if weighted is not None:
        raise UserError(
            f"{weighted.place}, field {WEIGHT}: {weighted.loss_weight:g}, and here every row counts once; "
            f"{how_to_ignore(WEIGHT)}"
        )


def _check_groups(path: str, rows: Sequence[Row], by: str, benchmark: Benchmark | None) -> None:
    """Refuse groups that were asked for and that no row is of."""
    names = {str(row.meta[by]): 1 for row in rows if by in row.meta}
    if by != "subset" and not names:
        raise UserError(f"{path}: no row has the column {by} to group by; give --by a column that the rows have")
    if benchmark == "rewardbench" and not rewardbench(names):
        raise UserError(f"{path}: no row's {by} is one of RewardBench's; leave --benchmark out, or give its own rows")


def measure(judged: Sequence[Judged], *, by: str, ties: float, bins: int) -> dict[str, Any]:
    """Everything that rewards and grades alone show.

    Args:
        by: the column of the groups; rows without it make none.
        ties: what a tie is worth.
    """
    groups: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        groups[str(item.row.meta.get(by, ALL))].append(item)
    figures = {name: _group(own, ties) for name, own in groups.items()}
    margins = [d for item in judged for d in pair_margins(item.rewards, item.grades)]
    gaps = [d for item in judged for d in pair_margins(item.lengths, item.grades)]
    temperature = fitted_temperature(margins)
    fitted = calibration(margins, bins=bins, temperature=temperature) if 0 < temperature < float("inf") else None
    raw = calibration(margins, bins=bins)
    return {
        "overall": _group(judged, ties),
        "groups": figures if len(figures) > 1 else {},
        "sections": rewardbench({name: own["accuracy"] for name, own in figures.items()}),
        "calibration": asdict(raw),
        "temperature": temperature,
        "calibration_at_temperature": asdict(fitted) if fitted else None,
        "length": length_figures(margins, gaps, ties=ties),
    }


@stage("scoring completions of other prompts")
def off_topic_figures(judged: Sequence[Judged], scorer: RewardScorer) -> dict[str, float]:
    """How often a prompt's own best completion beats one of another prompt that is at least twice as long.

    By rewards before transforms, which may look at a whole list.
    """
    best = [item.row.completions[max(range(len(item.grades)), key=item.grades.__getitem__)] for item in judged]
    others = off_topic_answers([_characters(text) for text in best])
    pairs = [(i, other) for i, other in enumerate(others) if other is not None]
    if not pairs:
        return {"pairs": 0}
    rows = [judged[i].row for i, _ in pairs]
    own = scorer.score(rows, [_like(best[i], row.prompt) for row, (i, _) in zip(rows, pairs, strict=True)])
    foreign = scorer.score(rows, [_like(best[k], row.prompt) for row, (_, k) in zip(rows, pairs, strict=True)])
    margins = [scorer.reward.weight * (a - b) for a, b in zip(own, foreign, strict=True)]
    return {"pairs": len(pairs), "accuracy": accuracy(margins), "margin": fmean(margins)}


def rewardbench2(judged: Sequence[Judged]) -> dict[str, float]:
    """RewardBench 2: best of four by subset, the Ties score, and their plain mean.

    Raises:
        UserError: a row of the Ties subset whose id is neither `tied:N` nor `ref:N`.
    """
    groups: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        groups[str(item.row.meta.get("subset", ALL))].append(item)
    scores = {}
    for name, own in groups.items():
        scores[name] = _ties(own) if name.lower() == TIES else _group(own, 0.5)["best_of_n"]
    return {**scores, "overall": fmean(scores.values())}


def rm_bench(judged: Sequence[Judged]) -> dict[str, Any]:
    """RM-Bench: the style matrix of every domain, and the plain means over domains.

    Raises:
        UserError: a row that is not three right and then three wrong completions.
    """
    domains: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        if item.grades != (1.0,) * STYLES + (0.0,) * STYLES:
            raise UserError(f"{item.row.place}: not {STYLES} chosen and {STYLES} rejected completions, as RM-Bench has")
        domains[rm_bench_domain(str(item.row.meta.get("domain", ALL)))].append(item)
    figures = {
        name: style_matrix([i.rewards[:STYLES] for i in own], [i.rewards[STYLES:] for i in own])
        for name, own in domains.items()
    }
    means = {name: fmean(f[name] for f in figures.values()) for name in ("hard", "normal", "easy")}
    return {"domains": figures, **means, "overall": fmean(f["average"] for f in figures.values())}


def rag_rewardbench(judged: Sequence[Judged]) -> dict[str, float]:
    """RAG-RewardBench: accuracy by scenario, and their means.

    Raises:
        UserError: a row whose subset is none of its scenarios.
    """
    scenarios: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        subset = str(item.row.meta.get("subset", ALL))
        name = rag_scenario(subset)
        if name is None:
            known = ", ".join(name for names in RAG_REWARDBENCH.values() for name in names)
            raise UserError(f"{item.row.place}: subset {subset}; RAG-RewardBench's hold one of {known} in their names")
        scenarios[name].append(item)
    return rag_means({name: _group(own, 0.5)["accuracy"] for name, own in scenarios.items()})


OWN_FIGURES: dict[str, Callable[[Sequence[Judged]], dict[str, Any]]] = {
    "rewardbench2": rewardbench2,
    "rm-bench": rm_bench,
    "rag-rewardbench": rag_rewardbench,
}
"""Benchmarks with an arithmetic of their own."""


def _asked_figures(
    judged: Sequence[Judged], benchmark: Benchmark | None, buckets: str | None, *, ties: float
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if benchmark in OWN_FIGURES:
        figures[benchmark] = OWN_FIGURES[benchmark](judged)
    if buckets is not None:
        figures["buckets"] = bucket_figures(judged, buckets, ties=ties)
    return figures


def _check_buckets(rows: Sequence[Row], column: str | None) -> None:
    """Refuse a row without a number to make buckets by, where they were asked for."""
    if column is not None:
        for row in rows:
            _number_of(row, column)


def bucket_figures(judged: Sequence[Judged], column: str, *, ties: float) -> list[dict[str, Any]]:
    """Figures of rows whose column is alike, from its lowest values up, each with the values that it holds."""
    values = [_number_of(item.row, column) for item in judged]
    return [
        {"low": min(values[i] for i in own), "high": max(values[i] for i in own)}
        | _group([judged[i] for i in own], ties)
        for own in in_buckets(values)
    ]


def _number_of(row: Row, column: str) -> float:
    value = row.meta.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise UserError(f"{row.place}, field {column}: no number for --buckets; give a column of numbers")
    return float(value)


def _by_given_grades(row: Row) -> Row:
    """Of what `align score` wrote, the grades that the row came with: its own are made from the rewards."""
    given = row.meta.get("given_grades")
    return row if given is None else replace(row, grades=tuple(given))


def _orders(row: Row, *, scored: bool) -> bool:
    """Whether a row's grades order its completions; a scorer can also be measured by other rewards."""
    grades = row.grades if row.grades is not None or not scored else row.rewards
    if grades is None and len(row.completions) > 1:
        raise UserError(f"{row.place}: no grades to judge rewards by; give `grades`, or `chosen` and `rejected`")
    if not scored and row.rewards is None:
        raise UserError(
            f"{row.place}: no `rewards`; score the rows with `align score`, or name a scorer: --reward SPEC"
        )
    return len(set(grades or ())) > 1


def _answer(row: Row, column: str) -> Any:
    answer = row.meta.get(column)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(
            f"{row.place}, field {column}: no reference answer; give text or a number, which the scorer compares with"
        )
    return answer


@stage("scoring the rows")
def _judge(rows: Sequence[Row], scorer: RewardScorer | None) -> list[Judged]:
    if scorer is None:
        return [Judged(row, row.rewards or (), row.grades or ()) for row in rows]
    rewards = scorer.of_lists(rows)
    return [Judged(row, tuple(own), row.grades or row.rewards or ()) for row, own in zip(rows, rewards, strict=True)]


def _group(judged: Sequence[Judged], ties: float) -> dict[str, Any]:
    return asdict(group_figures([item.rewards for item in judged], [item.grades for item in judged], ties=ties))


def _ties(judged: Iterable[Judged]) -> float:
    kinds: dict[str, dict[str, TiesPrompt]] = {"tied": {}, "ref": {}}
    for item in judged:
        kind, _, number = item.row.id.partition(":")
        if kind not in kinds:
            raise UserError(f"{item.row.place}: id {item.row.id}; RewardBench 2 names its ties `tied:N` and `ref:N`")
        sides: dict[bool, list[float]] = {True: [], False: []}
        for reward, grade in zip(item.rewards, item.grades, strict=True):
            sides[grade == max(item.grades)].append(reward)
        kinds[kind][number] = TiesPrompt(tuple(sides[True]), tuple(sides[False]))
    return ties_score(kinds["tied"], kinds["ref"])


def _characters(text: Text) -> str:
    """A completion's text; token ids are measured by their number."""
    if isinstance(text, str):
        return text
    return "".join(str(part.get("content", "")) if isinstance(part, dict) else "." for part in text)


def _like(completion: Text, prompt: Text) -> Text:
    """A completion in the form that goes with a prompt of another row."""
    if isinstance(prompt, str) and not isinstance(completion, str):
        return _characters(completion)
    return completion
