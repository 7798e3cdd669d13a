"""Records of Argilla: fields, and what people or models said of them."""

import re
from collections.abc import Iterator
from statistics import mean
from typing import Any

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.respelled import read_as_general
from align.data.parts import PROMPTS, parts_of, prompt_name
from align.data.schema import BadRow, UnusableRow, is_messages, number

Answers = dict[str, list[Any]]
"""Question -> what each annotator said, or the suggestion where nobody did."""

ANSWERED, SUGGESTED = re.compile(r"(.+)\.responses"), re.compile(r"(.+)[.-]suggestion")
BESIDE = re.compile(r"(.+)(\.responses\.\w+|[.-]suggestion[.-]\w+)")
"""Who said it, how sure, and whether it was submitted."""
RATINGS = ("{}-rating", "{}_rating", "rating-{}", "rating_{}", "{}-score", "{}_score")
"""What the question is called that rates a field."""
TIE = re.compile(r"tie|both|neither|equal|same", re.IGNORECASE)
OF_RECORD = ("status", "_server_id", "external_id", "metadata", "vectors", "inserted_at", "updated_at")


@FORMAT.add
class ArgillaRecord(Format):
    """A record of Argilla's: a ranking, a label or ratings of the fields that hold answers, as annotators gave them
    (their mean; the share of votes), or as suggested where nobody did; nested as it exports, or flat.

    Source: Argilla's records/_io/_generic.py (`to_list`) and FeedbackDataset's rows on the hub; distilabel's
    PreferenceToArgilla
    """

    name = "argilla_record"
    shape = "{fields, responses, suggestions}"
    published = "Argilla"
    keeps = OF_RECORD
    before = ("lists", "items", "preference", "implicit_preference", "chosen_response", "completion", "alpaca")

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        if isinstance(columns.get("fields"), dict):
            return "responses" in columns or "suggestions" in columns
        return not columns.keys().isdisjoint(PROMPTS) and any(map(_is_said, columns, columns.values()))

    @staticmethod
    def read(columns: Columns) -> Columns:
        nested = "fields" in columns
        answers = _nested_answers(columns) if nested else _flat_answers(columns)
        fields: Columns = dict(columns.pop("fields")) if nested else columns
        asked = prompt_name(fields)
        if asked is None:
            found = ", ".join(fields) or "none"
            raise BadRow("fields", f"no prompt among them ({found})", f"call one of them {', '.join(PROMPTS)}")
        texts = {name: value for name, value in fields.items() if name not in PROMPTS and _is_text(value)}
        rewards, questions = _rewards(answers, texts, nested)
        if not rewards:
            return _of_sides(fields, answers, nested)
        called = "fields.{}" if nested else "{}"
        prompt, completions = fields.pop(asked), [fields.pop(name) for name in rewards]
        parts = parts_of(
            prompt,
            completions,
            tuple(called.format(name) for name in rewards),
            rewards=[*rewards.values()],
            rewards_called=tuple(questions.values()),
            prompt_called=called.format(asked) + "[{}]",
        )
        others = {name: said for name, said in answers.items() if name not in questions.values()}
        return {**parts, "unread": _unread(fields, others, nested)}


def _nested_answers(columns: Columns) -> Answers:
    """What was said by question: objects by question, or the older lists of one object for each annotator."""
    given, suggested = columns.pop("responses", None) or {}, columns.pop("suggestions", None) or {}
    if is_messages(given):
        values = [_by_question(own.get("values") or {}, f"responses[{k}].values") for k, own in enumerate(given)]
        pairs = [
            (question, {"status": own.get("status"), "value": _value(value)})
            for own, said in zip(given, values, strict=True)
            for question, value in said.items()
        ]
        given = {question: [own for other, own in pairs if other == question] for question, _ in pairs}
    if is_messages(suggested):
        suggested = {str(own.get("question_name")): own for own in suggested}
    given, suggested = _by_question(given, "responses"), _by_question(suggested, "suggestions")
    answers = {name: [value] for name, own in suggested.items() if (value := _value(own)) is not None}
    for name, said in given.items():
        values = [*_submitted(said if isinstance(said, list) else [said])]
        answers |= {name: values} if values else {}
    return answers


def _by_question(value: Any, where: str) -> Columns:
    if not isinstance(value, dict):
        raise BadRow(where, "not an object of answers by question", "export the records again, or remove the row")
    return value


def _flat_answers(columns: Columns) -> Answers:
    """What was said by question, taken out of the columns that are called after it."""
    found: Answers = {}
    beside = {name: columns.pop(name) for name in [*columns] if BESIDE.fullmatch(name)}
    for name in [name for name in columns if SUGGESTED.fullmatch(name)]:
        question = SUGGESTED.fullmatch(name)[1]  # type: ignore[index]
        found[question] = [columns.pop(name)]
    for name in [name for name, value in columns.items() if _is_annotated(value) or (name in found and value == [])]:
        found[name] = [*_submitted(columns.pop(name))] or found.get(name, [])
    for name in [name for name in columns if ANSWERED.fullmatch(name)]:
        question = ANSWERED.fullmatch(name)[1]  # type: ignore[index]
        values, states = columns.pop(name), beside.get(f"{name}.status")
        entries = [{"value": value} for value in values] if isinstance(values, list) else []
        if isinstance(states, list) and len(states) == len(entries):
            entries = [{**entry, "status": state} for entry, state in zip(entries, states, strict=True)]
        found[question] = [*_submitted(entries)] or found.get(question, [])
    return {question: values for question, values in found.items() if values}


def _is_said(name: str, value: object) -> bool:
    """Whether a flat record's column holds what was said."""
    return name.endswith((".responses", ".suggestion", "-suggestion")) or _is_annotated(value)


def _is_annotated(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and "user_id" in first and "value" in first


def _submitted(said: list[Any]) -> Iterator[Any]:
    for own in said:
        if not isinstance(own, dict) or own.get("status") in (None, "submitted"):
            value = _value(own)
            if value is not None:
                yield value


def _value(own: Any) -> Any:
    return own.get("value") if isinstance(own, dict) and "value" in own else own


def _is_text(value: object) -> bool:
    return isinstance(value, str) or is_messages(value)


def _rewards(answers: Answers, texts: Columns, nested: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Field -> how good it is, and the question that says so; both empty where none does.

    Raises:
        UnusableRow: only one field is rated.
    """
    forms = {name: [form.format(name) for form in RATINGS] for name in texts}
    asked = {name: next((form for form in own if form in answers), "") for name, own in forms.items()}
    if rated := {name: question for name, question in asked.items() if question}:
        if len(rated) < 2:
            raise UnusableRow("an Argilla record with one rated field")
        return {name: mean(number(value, q) for value in answers[q]) for name, q in rated.items()}, rated
    for question, said in answers.items():
        found = _ranked(said, question, texts) or _voted(said, texts, nested)
        if found:
            ordered = {name: found[name] for name in texts if name in found}
            return ordered, dict.fromkeys(ordered, question)
    return {}, {}


def _ranked(said: list[Any], question: str, texts: Columns) -> dict[str, float]:
    """Field -> its mean rank turned round, 1 is the best; nothing where these are no rankings of fields."""
    ranks = []
    for value in said:
        entries = value if isinstance(value, list) else []
        places = [own.get("rank", k) if isinstance(own, dict) else k for k, own in enumerate(entries, start=1)]
        names = [_value(own) for own in entries]
        if len(names) > 1 and all(isinstance(name, str) and name in texts for name in names):
            ranks.append({name: number(place, question) for name, place in zip(names, places, strict=True)})
    named = ranks[0] if ranks else {}
    return {name: -mean(own.get(name, len(own)) for own in ranks) for name in named}


def _voted(said: list[Any], texts: Columns, nested: bool) -> dict[str, float]:
    """Field -> its share of the votes, of which a tie is everyone's; nothing where these are no names of fields."""
    votes = [value for value in said if isinstance(value, str) and value in texts]
    ties = [value for value in said if isinstance(value, str) and value not in texts and TIE.search(value)]
    if not votes or len(votes) + len(ties) < len(said):
        return {}
    rivals = [name for name in texts if _stem(name) == _stem(votes[0])]
    rivals = rivals if len(rivals) > 1 else [*texts] if nested else []
    shares = {name: (votes.count(name) + len(ties) / len(rivals)) / len(said) for name in rivals}
    return shares if set(votes) <= shares.keys() else {}


def _stem(name: str) -> str:
    """What `response-1` and `response-2`, `answer_a` and `answer_b` or `A` and `B` have in common."""
    return re.sub(r"([-_. ]?[0-9]+|(^|[-_. ])[a-zA-Z])$", "", name)


def _of_sides(fields: Columns, answers: Answers, nested: bool) -> Columns:
    """A pair whose fields say which side is which; what was said of it stays unread by its question's name."""
    if not {"chosen", "rejected"} <= fields.keys():
        if not answers:
            raise UnusableRow("an Argilla record without responses")
        problem = f"no question ranks, labels or rates the fields (questions: {', '.join(answers)})"
        raise BadRow("responses", problem, "give rows with `chosen` and `rejected`, or `completions` with `ratings`")
    parts = read_as_general(fields, {name: f"fields.{name}" for name in fields} if nested else {})
    return {**parts, "unread": {**_unread(fields, answers, nested), **parts.get("unread", {})}}


def _unread(fields: Columns, answers: Answers, nested: bool) -> Columns:
    """What else the record holds, by the names under which it can be ignored."""
    said = {f"responses[].{question}" if nested else question: values for question, values in answers.items()}
    return {**({f"fields[].{name}": value for name, value in fields.items()} if nested else {}), **said}
