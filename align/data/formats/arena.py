"""Votes between the answers of two models, as LMSYS' Chatbot Arena collects them."""

from typing import Any

from align.data.bad_row import kind
from align.data.columns import Columns
from align.data.delimited import listed_cell
from align.data.formats.base import FORMAT, Format
from align.data.formats.verdicts import WINS
from align.data.messages import Message, conversation
from align.data.parts import parts_of, take
from align.data.schema import BadRow, UnusableRow, check_characters, is_messages
from align.data.splitting import split_conversations

WINNERS = {
    "model_a": WINS[0],
    "model_b": WINS[1],
    "tie": WINS[None],
    **dict.fromkeys(("a", "response_a"), WINS[0]),
    **dict.fromkeys(("b", "response_b"), WINS[1]),
    **dict.fromkeys(("tie (bothbad)", "bothbad", "both_bad"), [0.0, 0.0]),
}
CONVERSATIONS = ("conversation_a", "conversation_b")
RESPONSES = ("response_a", "response_b")
VOTES = {"winner_model_a": "model_a", "winner_model_b": "model_b", "winner_tie": "tie"}


@FORMAT.add
class Arena(Format):
    """Two conversations with one beginning, and who won: `model_a`, `model_b`, `tie`, or `tie (bothbad)`, where both
    are graded 0. With a `turn` the vote is on that turn, and later ones are cut off.

    Source: lmsys/chatbot_arena_conversations, lmsys/mt_bench_human_judgments, lmarena-ai/arena-human-preference-100k
    and -140k
    """

    name = "arena"
    shape = "{conversation_a, conversation_b, winner}"
    published = "LMSYS Chatbot Arena, MT-Bench"
    needs = (*CONVERSATIONS, "winner")
    keeps = ("full_conversation", "conv_metadata", "judge", "turn", "model_a", "model_b")

    @staticmethod
    def read(columns: Columns) -> Columns:
        turn = columns.get("turn")
        sides = [_until(_messages(columns.pop(name), name), turn, name) for name in CONVERSATIONS]
        return _parts(sides, _winner(columns.pop("winner"), "winner"), CONVERSATIONS)


@FORMAT.add
class ArenaTable(Format):
    """The same with texts, or lists of the turns' texts as JSON, in `prompt`, `response_a` and `response_b`; who won is
    `winner` (also `A` or `B`), or the one of `winner_model_a`, `winner_model_b` and `winner_tie` that is 1.

    Source: Kaggle's LMSYS (lmarena-ai/arena-human-preference-55k) and WSDM Cup competitions
    """

    name = "arena_table"
    shape = "{prompt, response_a, response_b, winner_model_a, winner_model_b, winner_tie}"
    published = "LMSYS on Kaggle"
    needs = ("prompt", *RESPONSES)
    numbers = tuple(VOTES)
    keeps = ("model_a", "model_b")
    before = ("numbered_pair",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return super().detect(columns) and ("winner" in columns or "winner_model_a" in columns)

    @staticmethod
    def read(columns: Columns) -> Columns:
        asked = _turns(columns.pop("prompt"), "prompt")
        answered = [_turns(columns.pop(name), name) for name in RESPONSES]
        sides = [_conversation(asked, own, name) for own, name in zip(answered, RESPONSES, strict=True)]
        if "winner" in columns:
            return _parts(sides, _winner(columns.pop("winner"), "winner"), RESPONSES)
        votes = {name: take(columns, name) for name in VOTES}
        won = [name for name, vote in votes.items() if vote == 1]
        if len(won) != 1 or any(vote not in (0, 1) for vote in votes.values()):
            shown = ", ".join(f"{name} {vote!r}" for name, vote in votes.items())
            raise BadRow(
                "winner_model_a", f"not one winner ({shown})", "give 1 to one of the three and 0 to the others"
            )
        return _parts(sides, WINNERS[VOTES[won[0]]], RESPONSES)


def _winner(value: object, field: str) -> list[float]:
    named = value.strip().lower() if isinstance(value, str) else ""
    if str(value).strip() in ("0", "1", "2"):
        problem = f"{value!r} counts the sides from 0 or from 1, and they are a and b"
        raise BadRow(field, problem, "give A, B or tie")
    if named not in WINNERS:
        raise BadRow(field, f"{value!r} is no verdict", f"give one of {', '.join(WINNERS)}, or remove the row")
    return WINNERS[named]


def _messages(value: Any, name: str) -> list[Message]:
    if not is_messages(value):
        raise BadRow(name, f"{kind(value)}, not messages", "give a list of objects with `role` and `content`")
    return conversation(value, name)


def _until(messages: list[Message], turn: object, name: str) -> list[Message]:
    """The conversation up to the answer of a turn, counted from 1."""
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if turn is None:
        return messages
    if isinstance(turn, bool) or not isinstance(turn, int) or not 1 <= turn <= len(answers):
        problem = f"{turn!r}, and `{name}` has {len(answers)} answers"
        raise BadRow("turn", problem, "give the number of the turn that was judged, or leave it out")
    return messages[: answers[turn - 1] + 1]


def _parts(sides: list[list[Message]], grades: list[float], called: tuple[str, ...]) -> Columns:
    prompt, completions = split_conversations(sides)
    return parts_of(prompt, completions, called, grades=grades)


def _turns(value: Any, name: str) -> list[str]:
    """The texts of the turns, which may be JSON; a text alone is one turn."""
    turns = listed_cell(value) if isinstance(value, str) else value
    check_characters(turns, name)
    turns = turns if isinstance(turns, list) else [value]
    if None in turns:
        raise UnusableRow("a turn without a response")
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise BadRow(name, "not the texts of the turns", "give text, or a JSON list of texts")
    return turns


def _conversation(asked: list[str], answered: list[str], name: str) -> list[Message]:
    if len(asked) != len(answered):
        problem = f"{len(answered)} turns for {len(asked)} of `prompt`"
        raise BadRow(name, problem, "give an answer to each of the prompt's turns")
    pairs = zip(asked, answered, strict=True)
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
