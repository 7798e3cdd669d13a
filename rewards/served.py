"""A reward model behind HTTP, as `vllm serve` offers it."""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

from rewards.client import Client, Passing, Refused, again, without_password
from rewards.spelling import with_text_arguments
from rewards.texts import as_messages, given_of, plain
from rewards.types import RowError, ScorerError, Tally, Text

TRIES = 5
"""Attempts at a request, where a failure may pass, waiting 1, 2, 4, 8 seconds between them."""


class ServedScorer:
    """Rewards that a server computes; see `Served` for the arguments."""

    def __init__(
        self,
        *,
        url: str,
        model: str,
        endpoint: str,
        label: int,
        activation: bool,
        texts_per_request: int,
        requests_at_once: int,
        timeout: float,
    ) -> None:
        self.address = f"{url.rstrip('/')}/{endpoint}"
        self.named = without_password(self.address)
        self.model, self.endpoint, self.label, self.activation = model, endpoint, label, activation
        self.texts_per_request, self.requests_at_once = texts_per_request, requests_at_once
        self.client = Client(timeout=timeout)
        self.tally = Tally()

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """The server's reward for each completion; see Scorer.score.

        classify: prompt and completion joined are the text, or their messages go through the server's chat template
        score: the completion's relevance to the prompt, as the server's cross-encoder or embeddings say

        Raises:
            ScorerError: no answer after several attempts, or one that does not hold what was asked for.
            RowError: the server refuses a conversation.

        Source: vLLM's /classify and /score
        """
        self.tally.completions += len(prompts)
        pairs = list(zip(prompts, completions, strict=True))
        with ThreadPoolExecutor(self.requests_at_once) as pool:
            parts = pool.map(self._ask, self._requests(pairs))
            return [reward for part in parts for reward in part]

    def _requests(self, pairs: Sequence[tuple[Text, Text]]) -> Iterator[tuple[dict[str, Any], int]]:
        """Request bodies in the order of the pairs, and how many rewards each must bring."""
        common: dict[str, Any] = {"model": self.model, "use_activation": self.activation}
        for (kind, prompt), run in groupby(pairs, key=self._kind):
            texts = list(run)
            size = 1 if kind == "messages" else self.texts_per_request
            for part in (texts[i : i + size] for i in range(0, len(texts), size)):
                if kind == "messages":  # the endpoint takes one conversation
                    asked, answer = as_messages(part[0][0], "user"), as_messages(part[0][1], "assistant")
                    given = {"chat_template_kwargs": given_of(part[0][0])} if given_of(part[0][0]) else {}
                    messages = [_as_sent(message) for message in (*asked, *answer)]
                    yield {**common, **given, "messages": messages, "add_generation_prompt": False}, 1
                elif kind == "texts":
                    yield {**common, "input": [str(asked) + str(own) for asked, own in part]}, len(part)
                else:
                    yield {**common, "text_1": prompt, "text_2": [plain(own) for _, own in part]}, len(part)

    def _kind(self, pair: tuple[Text, Text]) -> tuple[str, str]:
        """Pairs of one kind can share a request."""
        if self.endpoint == "score":
            return "score", plain(pair[0])
        return ("texts" if isinstance(pair[0], str) and isinstance(pair[1], str) else "messages"), ""

    def _ask(self, request: tuple[dict[str, Any], int]) -> list[float]:
        body, count = request
        answer = self._post(body)
        try:
            entries = list(answer["data"])
            places = [entry["index"] for entry in entries]
            values = [entry["score"] if self.endpoint == "score" else entry["probs"][self.label] for entry in entries]
        except (KeyError, IndexError, TypeError) as error:
            raise ScorerError(
                f"{self.named}: the answer holds no {self.endpoint} result ({type(error).__name__}: {error}); "
                "is it a reward model's server, and `label` one of its outputs?"
            ) from None
        if len(entries) != count:
            raise ScorerError(f"{self.named}: {len(entries)} results for {count} texts")
        if any(type(place) is not int for place in places) or sorted(places) != list(range(count)):
            raise ScorerError(f"{self.named}: the results' `index` are {places[:9]}, not 0 to {count - 1} once each")
        if odd := [value for value in values if type(value) not in (int, float) or not math.isfinite(value)]:
            raise ScorerError(f"{self.named}: a result is {odd[0]!r:.50}, and no number that a reward can be")
        return [float(value) for _, value in sorted(zip(places, values, strict=True))]

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return again(lambda: self._answer(body), tries=TRIES)
        except Refused as error:
            kind = RowError if error.code in (400, 413, 422) else ScorerError
            raise kind(f"{self.named}: the server refuses the request: {error}") from None
        except Passing as error:
            raise ScorerError(
                f"{self.named}: no answer after {TRIES} attempts ({error}); is the server running?"
            ) from None

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.client.send(self.address, body))
        except (ValueError, RecursionError) as error:  # neither JSON nor text: an answer that was cut off
            raise Passing(f"the answer is no JSON: {error}") from None
        return found


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message as OpenAI's API has it: arguments of calls as JSON text, and no weight."""
    calls = {"tool_calls": with_text_arguments(message["tool_calls"])} if "tool_calls" in message else {}
    return {key: own for key, own in {**message, **calls}.items() if key != "weight"}
