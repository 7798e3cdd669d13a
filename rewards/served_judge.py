"""A judge behind HTTP, as OpenAI's API and the servers that speak it offer one."""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rewards.asking import MARK, verdict_in
from rewards.client import Client, Passing, Refused, again, without_password
from rewards.judge import JudgeScorer
from rewards.types import AskingOptions, RowError, ScorerError, Tally

TRIES = 5
"""Attempts at a request, where a failure may pass, waiting 1, 2, 4, 8 seconds between them."""
VERDICT_TOKENS = 8
"""Room for a verdict."""
ALTERNATIVES = 20
"""Tokens of which a server gives the log-probability; OpenAI's API has no more."""


class ServedVoice:
    """A model that a server runs; see `ServedJudge` for the arguments."""

    def __init__(
        self, *, url: str, model: str, api_key: str | None, requests_at_once: int, timeout: float, tally: Tally
    ) -> None:
        self.address = f"{url.rstrip('/')}/chat/completions"
        self.named = without_password(self.address)
        self.model, self.requests_at_once, self.tally = model, requests_at_once, tally
        if api_key is not None and not os.environ.get(api_key):
            raise ScorerError(f"api_key: the environment variable {api_key} is not set; export the key under this name")
        headers = {"Authorization": f"Bearer {os.environ[api_key]}"} if api_key else None
        self.client = Client(timeout=timeout, headers=headers)

    def verdicts(self, questions: Sequence[str], words: Sequence[str], *, reasoning: int) -> list[list[float] | None]:
        """As every voice: from `top_logprobs` where the verdict stands, else of what the reply says."""
        extra = {"logprobs": True, "top_logprobs": ALTERNATIVES}
        replies = self._replies(questions, reasoning + VERDICT_TOKENS, extra)
        return [_verdict(reply, words) for reply in replies]

    def write(self, questions: Sequence[str], tokens: int) -> list[str]:
        """As every voice."""
        return [_text(reply) for reply in self._replies(questions, tokens, {})]

    def _replies(self, questions: Sequence[str], tokens: int, extra: dict[str, Any]) -> list[dict[str, Any]]:
        common = {"model": self.model, "temperature": 0, "max_tokens": tokens, **extra}
        bodies = [{**common, "messages": [{"role": "user", "content": question}]} for question in questions]
        with ThreadPoolExecutor(self.requests_at_once) as pool:
            return list(pool.map(self._ask, bodies))

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return again(partial(self._choice, body), tries=TRIES)
        except Refused as error:
            kind = RowError if error.code in (413, 422) else ScorerError
            raise kind(f"{self.named}: the server refuses the request: {error}") from None
        except Passing as error:
            raise ScorerError(
                f"{self.named}: no answer after {TRIES} attempts ({error}); is the server running?"
            ) from None

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        sent = self.client.send(self.address, body)
        try:
            answer = json.loads(sent)
        except (ValueError, RecursionError) as error:  # neither JSON nor text: an answer that was cut off
            raise Passing(f"the answer is no JSON: {error}") from None
        try:
            choice = answer["choices"][0]
            choice["message"]["content"]  # noqa: B018 - is it there?
        except (KeyError, IndexError, TypeError):
            raise ScorerError(
                f"{self.named}: the answer holds no choices[0].message.content; is it OpenAI's chat completions?"
            ) from None
        usage = answer.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        self.tally.tokens += read if isinstance(read, int) else 0
        return choice  # type: ignore[no-any-return]


def served_judge(
    *, url: str, model: str, api_key: str | None, requests_at_once: int, timeout: float, **asking: Any
) -> JudgeScorer:
    """A judge that a server runs; see `ServedJudge` for the arguments."""
    own: AskingOptions = asking  # type: ignore[assignment]
    running = {"requests_at_once": requests_at_once, "timeout": timeout}
    tally = Tally()
    voice = ServedVoice(url=url, model=model, api_key=api_key, tally=tally, **running)  # type: ignore[arg-type]
    return JudgeScorer(voice, name=model, tally=tally, **own)


def _text(choice: dict[str, Any]) -> str:
    content = choice["message"]["content"]
    return content if isinstance(content, str) else ""


def _verdict(choice: dict[str, Any], words: Sequence[str]) -> list[float] | None:
    """log p of each word where the reply gives its verdict; certainty where the server gives no log-probabilities."""
    found = _alternatives(choice)
    if found is not None:
        sums = [math.fsum(math.exp(value) for token, value in found if token == word.lower()) for word in words]
        if any(sums):
            return [math.log(own) if own else -math.inf for own in sums]
    said = verdict_in(_text(choice), words)
    return None if said is None else [0.0 if word == said else -math.inf for word in words]


def _alternatives(choice: dict[str, Any]) -> list[tuple[str, float]] | None:
    """The tokens that could stand where the verdict does, which is the first word behind the last mark, or at all."""
    try:
        tokens = [(str(own["token"]), own["top_logprobs"]) for own in choice["logprobs"]["content"]]
        text = "".join(token for token, _ in tokens)
        start = text.rindex(MARK) + len(MARK) if MARK in text else 0
        place = 0
        for token, alternatives in tokens:
            if place + len(token) > start and token.strip(" \n*\"'`#:"):
                pairs = [(str(own["token"]).strip().lower(), float(own["logprob"])) for own in alternatives]
                return [pair for pair in pairs if pair[1] <= 0]
            place += len(token)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return None
