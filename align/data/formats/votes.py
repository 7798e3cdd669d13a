"""Pairs and lists that people voted on, as they were published."""

import re
from typing import Any

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.verdicts import winner_of
from align.data.parts import parts_of, take
from align.data.schema import ATTRIBUTES, BadRow, is_messages

SAFE_SIDES = ("response_0", "response_1")
SAFE_VERDICTS = ("better_response_id", "safer_response_id")
OF_A_SIDE = re.compile(r"(?:is_)?response_[01]_\w+")
REDDIT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
NEWS = "Article:\n\n{article}\n\nTL;DR:"


@FORMAT.add
class SafeRlhf(Format):
    """Two responses with two preferences. `better_response_id`, the more helpful one, is the row's order, and
    `safer_response_id` stays with it; with `data.ignore=[better_response_id]` the safer one is.

    Source: PKU-Alignment/PKU-SafeRLHF
    """

    name = "safe_rlhf"
    shape = "{prompt, response_0, response_1, better_response_id, safer_response_id}"
    published = "PKU-SafeRLHF"
    needs = SAFE_SIDES
    numbers = SAFE_VERDICTS
    keeps = SAFE_VERDICTS

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return super().detect(columns) and any(name in columns for name in SAFE_VERDICTS)

    @staticmethod
    def read(columns: Columns) -> Columns:
        verdict = next(name for name in SAFE_VERDICTS if name in columns)
        grades = winner_of(columns.pop(verdict), verdict)
        sides = [columns.pop(name) for name in SAFE_SIDES]
        kept = {name: columns.pop(name) for name in [*columns] if OF_A_SIDE.fullmatch(name)}
        return {**parts_of(take(columns, "prompt"), sides, SAFE_SIDES, grades=grades), "kept": kept}


@FORMAT.add
class Shp(Format):
    """Two comments on a post of Reddit; `labels` is 1 where the first has more votes. The votes stay as rewards.

    Source: stanfordnlp/SHP and SHP-2
    """

    name = "shp"
    shape = "{history, human_ref_A, human_ref_B, labels, score_A, score_B}"
    published = "Stanford Human Preferences"
    needs = ("history", "human_ref_A", "human_ref_B", "labels")
    numbers = ("labels", "score_A", "score_B")

    @staticmethod
    def read(columns: Columns) -> Columns:
        first, second = winner_of(columns.pop("labels"), "labels")
        sides = ("human_ref_A", "human_ref_B")
        votes = [columns.pop(name, None) for name in ("score_A", "score_B")]
        return parts_of(
            columns.pop("history"),
            [columns.pop(name) for name in sides],
            sides,
            grades=[second, first],
            rewards=None if None in votes else votes,
            rewards_called=("score_A", "score_B"),
            prompt_called="history[{}]",
        )


@FORMAT.add
class WebGpt(Format):
    """A question and two answers, each with the score that it was given beside the other; equal scores are a tie.

    Source: openai/webgpt_comparisons
    """

    name = "webgpt"
    shape = "{question: {full_text}, answer_0, answer_1, score_0, score_1}"
    published = "OpenAI WebGPT comparisons"
    needs = ("question", "answer_0", "answer_1", "score_0", "score_1")
    numbers = ("score_0", "score_1")
    keeps = ("quotes_0", "quotes_1", "tokens_0", "tokens_1")

    @staticmethod
    def read(columns: Columns) -> Columns:
        question = columns.pop("question")
        asked = take(question, "full_text", "question") if isinstance(question, dict) else question
        sides, scores = ("answer_0", "answer_1"), ("score_0", "score_1")
        return parts_of(
            asked,
            [columns.pop(name) for name in sides],
            sides,
            rewards=[columns.pop(name) for name in scores],
            rewards_called=scores,
            prompt_called="question.full_text[{}]",
        )


@FORMAT.add
class SummaryComparison(Format):
    """A post or an article, two summaries and the number of the better one; the prompt is written as OpenAI wrote it,
    up to `TL;DR:`.

    Source: openai/summarize_from_feedback, configuration `comparisons`; its prompts from openai/summarize-from-feedback
    """

    name = "summary_comparison"
    shape = "{info: {subreddit, title, post | article}, summaries: [{text}], choice}"
    published = "OpenAI summarize-from-feedback"
    needs = ("info", "summaries", "choice")
    numbers = ("choice",)
    keeps = ("extra", "worker", "batch", "split")

    @staticmethod
    def read(columns: Columns) -> Columns:
        summaries = columns.pop("summaries")
        if not is_messages(summaries) or len(summaries) != 2:
            raise BadRow("summaries", "not two objects", "give the two summaries, each with its `text`")
        texts = [take(own, "text", f"summaries[{k}]") for k, own in enumerate(summaries)]
        grades = winner_of(columns.pop("choice"), "choice")
        called = {"called": "summaries[{}].text", "prompt_called": "info[{}]"}
        return {**parts_of(_task(columns.pop("info")), texts, grades=grades, **called), "unread": _others(summaries)}


@FORMAT.add
class SummaryAxes(Format):
    """A post or an article and one summary, rated on several axes, which stay with it as `attributes`; `overall` is its
    reward.

    Source: openai/summarize_from_feedback, configuration `axis`
    """

    name = "summary_axes"
    shape = "{info: {subreddit, title, post | article}, summary: {text, axes: {overall, ...}}}"
    published = "OpenAI summarize-from-feedback"
    needs = ("info", "summary")
    keeps = SummaryComparison.keeps

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return super().detect(columns) and isinstance(columns["summary"], dict) and "axes" in columns["summary"]

    @staticmethod
    def read(columns: Columns) -> Columns:
        summary = columns.pop("summary")
        axes = summary["axes"] if isinstance(summary["axes"], dict) else {}
        rated = {name: value for name, value in axes.items() if value is not None}
        columns[ATTRIBUTES] = [rated]
        rewards = [rated["overall"]] if "overall" in rated else None
        called = {"called": ("summary.text",), "rewards_called": ("summary.axes.overall",), "prompt_called": "info[{}]"}
        text = take(summary, "text", "summary")
        return parts_of(_task(columns.pop("info")), [text], rewards=rewards, **called)  # type: ignore[arg-type]


@FORMAT.add
class StackExchange(Format):
    """A question and its answers with what their votes come to, `pm_score`, which is their reward.

    Source: HuggingFaceH4/stack-exchange-preferences
    """

    name = "stack_exchange"
    shape = "{qid, question, answers: [{text, pm_score, selected}]}"
    published = "Stack Exchange preferences"
    needs = ("question", "answers")
    before = ("items",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return super().detect(columns) and is_messages(columns["answers"]) and "pm_score" in columns["answers"][0]

    @staticmethod
    def read(columns: Columns) -> Columns:
        answers = columns.pop("answers")
        texts, votes = (
            [take(own, name, f"answers[{k}]") for k, own in enumerate(answers)] for name in ("text", "pm_score")
        )
        called = {"called": "answers[{}].text", "rewards_called": "answers[{}].pm_score"}
        parts = parts_of(columns.pop("question"), texts, rewards=votes, prompt_called="question[{}]", **called)
        return {**parts, "unread": _others(answers, "answers", ("text", "pm_score"))}


def _task(info: Any) -> str:
    """The prompt of a summary."""
    if not isinstance(info, dict):
        raise BadRow("info", "not an object", "give `subreddit`, `title` and `post`, or an `article`")
    given = {name: value for name, value in info.items() if isinstance(value, str)}
    template = NEWS if "article" in given and "post" not in given else REDDIT
    try:
        return template.format_map(given)
    except KeyError as error:
        name = error.args[0]
        found = ", ".join(given) or "nothing"
        raise BadRow(f"info.{name}", f"missing (found: {found})", f"give `{name}`, or remove the row") from None


def _others(entries: list[Columns], name: str = "summaries", read: tuple[str, ...] = ("text",)) -> Columns:
    """What the objects of a list hold besides what is read of them."""
    names = dict.fromkeys(key for own in entries for key, value in own.items() if value is not None and key not in read)
    return {f"{name}[].{key}": [own.get(key) for own in entries] for key in names}
