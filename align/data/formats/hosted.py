"""Rows that hosted services take for preference tuning."""

from typing import Any

from align.data.columns import Columns
from align.data.content import parsed
from align.data.formats.base import FORMAT, Format
from align.data.formats.respelled import as_answer, as_conversation, read_as_general
from align.data.messages import Message
from align.data.parts import has_prompt, parts_of, take
from align.data.schema import BadRow, is_messages
from align.data.tools import TOOLS

OUTPUTS = ("preferred_output", "non_preferred_output")
SYSTEM_INSTRUCTIONS = ("system_instruction", "systemInstruction")
LABELS = {"preferred": 1.0, "non-preferred": 0.0}


@FORMAT.add
class OpenAIPreference(Format):
    """A pair as OpenAI's preference fine-tuning takes it; a side is one message or several, tools stand in `input`.

    Source: OpenAI's guide to direct preference optimization; Azure's, Together's and Fireworks' documentation
    """

    name = "openai_preference"
    shape = "{input: {messages, tools}, preferred_output, non_preferred_output}"
    published = "OpenAI, Azure, Together, Fireworks"
    any_of = OUTPUTS

    @staticmethod
    def read(columns: Columns) -> Columns:
        asked = take(columns, "input")
        asked = parsed(asked, "input") if isinstance(asked, str) else asked
        own: Columns = dict(asked) if isinstance(asked, dict) else {"messages": asked}
        prompt = as_conversation(take(own, "messages", "input"), "input.messages")
        answers = [as_answer(take(columns, name), name) for name in OUTPUTS]
        offered = next((own[name] for name in TOOLS if own.get(name)), None)
        others = {name: value for name, value in own.items() if name not in TOOLS and value is not None}
        unread = {f"input[].{name}": value for name, value in others.items() if name != "messages"}
        parts = parts_of(prompt, answers, OUTPUTS, grades=[1.0, 0.0], prompt_called="input.messages[{}]")
        return {**parts, "unread": unread, **({"tools": offered} if offered else {})}


@FORMAT.add
class GeminiPreference(Format):
    """A conversation of `parts` and the model's answers to it with a score each, 1 for the preferred one; without
    `completions` the last turn is the answer.

    Source: Google's "Prepare preference tuning data for Gemini models"
    """

    name = "gemini_preference"
    shape = "{system_instruction, contents, completions: [{score, completion}]}"
    published = "Gemini on Vertex AI"
    needs = ("contents",)
    before = ("items",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return "contents" in columns and not has_prompt(columns)

    @classmethod
    def holds_answers(cls, columns: Columns) -> bool:
        last = columns["contents"][-1] if is_messages(columns["contents"]) else {}
        return "completions" in columns or last.get("role") == "model"

    @staticmethod
    def read(columns: Columns) -> Columns:
        system = [message for name in SYSTEM_INSTRUCTIONS for message in _instructions(columns.pop(name, None), name)]
        prompt = [*system, *as_conversation(columns.pop("contents"), "contents")]
        if "completions" not in columns:
            columns["messages"] = prompt
            return read_as_general(columns, {"messages": "contents"})
        items = columns.pop("completions")
        if items == [""]:  # the prompt alone counts
            return parts_of(prompt, items, "completions[{}]", prompt_called="contents[{}]")
        if not is_messages(items):
            raise BadRow("completions", "not a list of objects", "give objects of `score` and `completion`")
        places = [f"completions[{k}]" for k in range(len(items))]
        given = [take(item, "score", where) for item, where in zip(items, places, strict=True)]
        scores = [float(score) if isinstance(score, bool) else score for score in given]
        answers = [
            _of_model(take(item, "completion", w), f"{w}.completion") for item, w in zip(items, places, strict=True)
        ]
        graded: Columns = {"rewards": scores, "rewards_called": "completions[{}].score"}
        if all(score in (0, 1) for score in scores):
            graded = {"grades": scores, "grades_called": "completions[{}].score"}
        return parts_of(prompt, answers, "completions[{}].completion", prompt_called="contents[{}]", **graded)


@FORMAT.add
class NovaPreference(Format):
    """A conversation of Bedrock's whose last turn has `candidates`, each `preferred` or `non-preferred`.

    Source: Amazon Nova's user guide, "Direct Preference Optimization", data format
    """

    name = "nova_preference"
    shape = "{system, messages: [..., {role, candidates: [{content, preferenceLabel}]}]}"
    published = "Amazon Nova"
    needs = ("messages",)
    before = ("conversation",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        messages = columns.get("messages")
        return is_messages(messages) and bool(messages[-1].get("candidates"))  # type: ignore[index]

    @staticmethod
    def read(columns: Columns) -> Columns:
        messages = columns.pop("messages")
        place = f"messages[{len(messages) - 1}].candidates"
        candidates = messages[-1]["candidates"]
        if not is_messages(candidates):
            raise BadRow(place, "not a list of objects", "give objects of `content` and `preferenceLabel`")
        given = [take(own, "preferenceLabel", f"{place}[{k}]") for k, own in enumerate(candidates)]
        labels = [label.lower().replace("_", "-") if isinstance(label, str) else "" for label in given]
        for k, label in enumerate(labels):
            if label not in LABELS:
                problem = f"{given[k]!r} is no label"
                raise BadRow(f"{place}[{k}].preferenceLabel", problem, f"give {' or '.join(LABELS)}")
        answers = [
            as_answer({"role": "assistant", "content": take(own, "content", f"{place}[{k}]")}, f"{place}[{k}]")
            for k, own in enumerate(candidates)
        ]
        system = _instructions(columns.pop("system", None), "system")
        prompt = [*system, *as_conversation(messages[:-1], "messages")]
        offered = {"tools": _bedrock_tools(columns.pop("toolConfig"))} if "toolConfig" in columns else {}
        grades = [LABELS[label] for label in labels]
        return {**parts_of(prompt, answers, f"{place}[{{}}]", grades=grades, prompt_called="messages[{}]"), **offered}


def _instructions(value: Any, where: str) -> list[Message]:
    """What stands beside the conversation as a message of the system's."""
    if not value:
        return []
    if isinstance(value, str):
        return [{"role": "system", "content": value}]
    own = value if isinstance(value, dict) else {"content": value}
    return as_answer({**own, "role": "system"}, where)


def _of_model(value: object, where: str) -> list[Message]:
    """An answer, whose role may be left out."""
    if not isinstance(value, dict):
        return as_answer(value, where)
    return as_answer({"role": "model", **{key: own for key, own in value.items() if own is not None}}, where)


def _bedrock_tools(config: Any) -> Any:
    """The tools of Bedrock's `toolConfig`, each with its schema under `inputSchema.json`."""
    tools = config.get("tools") if isinstance(config, dict) else config
    if not is_messages(tools):
        raise BadRow("toolConfig.tools", "not a list of objects", "give a `toolSpec` each, or leave it out")
    own = [tool.get("toolSpec") or tool for tool in tools]  # type: ignore[union-attr]
    return [{**tool, **_schema(tool.get("inputSchema"))} for tool in own]


def _schema(value: Any) -> Columns:
    return {"inputSchema": value["json"]} if isinstance(value, dict) and "json" in value else {}
