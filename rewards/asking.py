"""What a judge is asked, and what its verdict is worth."""

import json
import logging
import re
from collections.abc import Sequence
from hashlib import sha256
from math import exp
from pathlib import Path
from typing import Any, Protocol

from rewards.texts import plain, text_key
from rewards.types import RowError, Text

MARK = "Verdict:"
"""Behind it a judge that reasons, or has no chat template, says its verdict."""
WHICH = "Question:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich answer is better? Reply A or B."
QUESTIONS = {
    "yes_no": "Question:\n{prompt}\n\nAnswer:\n{completion}\n\nIs this a good answer to the question? Reply Yes or No.",
    "pairwise": WHICH,
    "anchors": WHICH,
    "scale": (
        "Question:\n{prompt}\n\nAnswer:\n{completion}\n\nHow good is this answer to the question? Reply with a number "
        "from 1 to 5: 1 useless or wrong, 2 poor, 3 acceptable, 4 good, 5 excellent."
    ),
    "checklist": "Question:\n{prompt}\n\nAnswer:\n{completion}\n\n{check} Reply Yes or No.",
}
VERDICTS = {
    "yes_no": ("Yes", "No"),
    "pairwise": ("A", "B"),
    "anchors": ("A", "B"),
    "scale": ("1", "2", "3", "4", "5"),
    "checklist": ("Yes", "No"),
}
REASON = f"\nReason step by step first; then write `{MARK}` and your reply."
CHECKS = (
    "Question:\n{prompt}\n\nWrite a checklist for judging answers to this question: at most {count} questions that a "
    "reader of an answer replies to with Yes or No, one a line, where Yes speaks for the answer. Write nothing else."
)
FALLBACK = "Does this answer do what the question asks for?"
"""In place of a checklist that the judge has failed to write."""
CHECKLIST_TOKENS = 512

log = logging.getLogger("align")


class Voice(Protocol):
    """A model that is asked. Not to be subclassed: a class with these methods is one."""

    def verdicts(self, questions: Sequence[str], words: Sequence[str], *, reasoning: int) -> list[list[float] | None]:
        """Of each question, log p of every word as its reply, up to a constant; None where it gives none of them.

        Args:
            reasoning: tokens that may come before the reply.
        """
        ...

    def write(self, questions: Sequence[str], tokens: int) -> list[str]:
        """The likeliest reply to each, as text."""
        ...


def filled(question: str, texts: dict[str, str]) -> str:
    """A question with its texts, which are not read for names themselves."""
    return re.sub(r"\{(\w+)\}", lambda m: texts.get(m[1], m[0]), question)


def verdict_in(reply: str, words: Sequence[str]) -> str | None:
    """The one of the words that a reply says behind its last mark, or at all; None for none or several."""
    said = reply.rpartition(MARK)[2]
    found = {word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said)}
    return found.pop() if len(found) == 1 else None


def shares(logprobs: Sequence[float]) -> list[float]:
    """The probabilities of some words among themselves."""
    top = max(logprobs)
    weights = [exp(value - top) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


class Checklists:
    """What makes an answer to a prompt good, as questions that the judge writes once for each prompt.

    Source: TICK, arXiv:2410.03608
    """

    def __init__(self, voice: Voice, count: int, path: str | None) -> None:
        """Args:
        count: questions of a prompt, at most.
        path: where they are kept, an object a line with `prompt` and `questions`, which may be mended by hand; None to
            keep them no longer than this scorer.
        """
        self.voice, self.count = voice, count
        self.path = Path(path) if path else None
        self.known: dict[str, list[str]] = {}
        if self.path and self.path.exists():
            for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), start=1):
                if line:
                    self._take(line, number)

    def of(self, prompts: Sequence[Text]) -> list[list[str]]:
        """The questions of each prompt; those that are not known are written."""
        new = {_key(prompt): plain(prompt) for prompt in prompts if _key(prompt) not in self.known}
        if new:
            asked = [filled(CHECKS, {"prompt": text, "count": str(self.count)}) for text in new.values()]
            written = [questions_in(reply)[: self.count] for reply in self.voice.write(asked, CHECKLIST_TOKENS)]
            if empty := sum(not own for own in written):
                log.warning("the judge wrote no question for %d prompts; it is asked of them: %s", empty, FALLBACK)
            self._add({key: own or [FALLBACK] for key, own in zip(new, written, strict=True)}, new)
        return [self.known[_key(prompt)] for prompt in prompts]

    def _take(self, line: str, number: int) -> None:
        try:
            entry: Any = json.loads(line)
            self.known[entry["key"]] = [str(own) for own in entry["questions"]] or [FALLBACK]
        except (ValueError, KeyError, TypeError):
            log.warning("%s, line %d: no checklist; it is written again", self.path, number)

    def _add(self, lists: dict[str, list[str]], prompts: dict[str, str]) -> None:
        self.known |= lists
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entries = [{"key": key, "prompt": prompts[key], "questions": own} for key, own in lists.items()]
            torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")  # by a kill
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * torn + "".join(json.dumps(own, ensure_ascii=False) + "\n" for own in entries))


def questions_in(reply: str) -> list[str]:
    """The lines of a reply that are questions, without numbers and marks before them, each once."""
    lines = [re.sub(r"^[\s\-*\u2022\[\]\d.)(]+", "", line).strip() for line in reply.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.endswith("?") and len(line) > 1))


def unread(name: str) -> RowError:
    """What to say of a judge that gives no verdict on a completion."""
    return RowError(f"{name}: the judge's reply holds none of the verdicts it was asked for, or several")


def _key(prompt: Text) -> str:
    return sha256(text_key(prompt).encode()).hexdigest()[:16]
