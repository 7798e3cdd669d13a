"""The engine that is served elsewhere: requests over HTTP to one or several vLLM servers."""

import json
import logging
import math
import os
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from align.errors import UserError
from align.evaluate.sampling import Sampled, row_seed
from align.rollout.endpoints import Endpoints, Passing
from align.rollout.engine import Contexts, Prompts, Sampling, Weights
from rewards.client import Client, Refused

log = logging.getLogger("align")

FLAGS = "--generation-config vllm --logprobs-mode processed_logprobs"
"""What every server is to be started with."""
NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "length_penalty": 1.0,
    "temperature": 1.0,
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "ignore_eos": False,
    "use_beam_search": False,
    "watermarking": False,
    "bad_words": [],
    "stop": [],
    "stop_token_ids": [],
    "echo": False,
}
"""Sampling parameters that change nothing. All are sent: a server puts its model's own where a request has none."""
PROBE = {"prompt": [3, 4, 3, 4, 3, 4, 3, 4], "max_tokens": 4, "seed": 1, "logprobs": 0, "return_token_ids": True}
NOISE = 0.02
"""Nats by which two equal requests may differ in half precision."""

Answer = dict[str, Any]


class VllmServers:
    """Servers that hold the same model; a request goes to the one with the fewest in flight."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | None = None,
        concurrency: int = 16,
        tries: int = 6,
        timeout: float = 600.0,
        api_key: str | None = None,
        first_wait: float = 1.0,
    ) -> None:
        """Args as in the recipe; `first_wait`: seconds before the second attempt.

        Raises:
            UserError: no server answers, one serves another model or draws in another way than it is asked to, or the
                key's variable is not set.
        """
        self.concurrency = concurrency
        if api_key is not None and api_key not in os.environ:
            raise UserError(f"rollout.engine.api_key: the environment has no variable {api_key}")
        self.client = Client(
            timeout=timeout, headers={"Authorization": f"Bearer {os.environ[api_key]}"} if api_key else None
        )
        self.base = model
        self.weights: Weights | None = None
        self.names: set[str] = set()
        addresses = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.endpoints = Endpoints(addresses, self._prepare, tries=tries, first_wait=first_wait)
        self.endpoints.everywhere()

    def sample(
        self, prompts: Prompts, sampling: Sampling, contexts: Contexts | None = None, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """As every engine, without a decoding of its own."""
        pool = ThreadPoolExecutor(self.concurrency * len(self.endpoints.all))
        try:
            wanted = [place for place in range(len(prompts)) if place not in done]
            asked = {pool.submit(self._complete, prompts[place], sampling): place for place in wanted}
            for finished in as_completed(asked):
                yield asked[finished], finished.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def load(self, weights: Weights) -> None:
        """As every engine, on every server that answers, and on the others when they do; they must see the weights'
        folder under the same path."""
        self.weights = weights
        self.endpoints.everywhere()

    def rest(self, *, stop: bool) -> None:
        """Nothing: the servers have machines of their own."""

    def close(self) -> None:
        """Nothing: the servers were there before us."""

    @property
    def model(self) -> str:
        """What a request names: the base model, or the adapter that was loaded last."""
        return self.weights.name if self.weights and self.weights.kind == "adapter" else str(self.base)

    def _prepare(self, url: str) -> None:
        """See that a server has the base model and draws as it is asked to, and give it the policy: it may be new."""
        listed = self._send(url, "/v1/models").get("data", [])
        served = [str(own["id"]) for own in listed if isinstance(own, dict) and "id" in own]
        self.base = self.base or (served[0] if served else None)
        if self.base not in served:
            raise UserError(f"rollout.engine.urls: {url} serves {', '.join(served) or 'no model'}, not {self.base}")
        self._probe(url)
        if self.weights is None:
            return
        if self.weights.kind == "adapter":
            self._load_adapter(url, self.weights, served)
        else:
            content = {"method": "reload_weights", "kwargs": {"weights_path": self.weights.folder}}
            self._send(url, "/collective_rpc", content, needs="VLLM_SERVER_DEV_MODE=1")
        self._reset_cache(url, must=self.weights.kind == "merged")

    def _probe(self, url: str) -> None:
        """Ask for what can be known beforehand: what a server does to requests and log-probabilities unasked.

        With one token allowed its log-probability is 0, if it is that of the distribution that was drawn from. A
        request without sampling parameters gives what one with neutral ones does, if the server adds none.

        Raises:
            UserError: the log-probabilities are others.
        """
        plain = PROBE | {"model": self.base, "ignore_eos": True}
        forced = self._choices(url, NEUTRAL | plain | {"allowed_token_ids": [5], "max_tokens": 1})[0]
        if abs(forced["logprobs"]["token_logprobs"][0]) > 1e-6:
            raise UserError(
                f"rollout.engine.urls: the log-probabilities of {url} are not those that it draws by, so no check could"
                f" see what it does to them; start it with {FLAGS}"
            )
        bare, neutral = (self._choices(url, request)[0] for request in (plain, NEUTRAL | plain))
        pairs = zip(bare["logprobs"]["token_logprobs"], neutral["logprobs"]["token_logprobs"], strict=False)
        if bare["token_ids"] != neutral["token_ids"] or any(abs(a - b) > NOISE for a, b in pairs):
            log.warning(
                "%s puts sampling parameters of its own, such as those of the model's generation_config.json, where a "
                "request has none; each of ours has all that Align knows, but start the server with %s",
                url,
                FLAGS,
            )

    def _load_adapter(self, url: str, weights: Weights, served: list[str]) -> None:
        """Under its own name, which no other weights have; then those that we loaded before are removed."""
        if weights.name not in served:
            content = {"lora_name": weights.name, "lora_path": weights.folder}
            self._send(url, "/v1/load_lora_adapter", content, needs="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
        self.names.add(weights.name)
        for old in self.names.intersection(served) - {weights.name}:
            self._send(url, "/v1/unload_lora_adapter", {"lora_name": old})

    def _reset_cache(self, url: str, *, must: bool) -> None:
        """New weights under an old name need it; an adapter's new name is part of the cache's keys already."""
        try:
            self._send(url, "/reset_prefix_cache", {}, needs="VLLM_SERVER_DEV_MODE=1")
        except UserError:
            if must:
                raise

    def _complete(self, prompt: list[int], sampling: Sampling) -> list[Sampled]:
        request = NEUTRAL | {
            "model": self.model,
            "prompt": prompt,
            "n": sampling.completions,
            "seed": row_seed(sampling.seed, prompt, 0),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
        }
        return self.endpoints.anywhere(
            lambda url: [_sampled(url, choice, sampling) for choice in self._choices(url, request)]
        )

    def _choices(self, url: str, request: Answer) -> list[Answer]:
        found = self._send(url, "/v1/completions", request).get("choices")
        wanted = int(request.get("n", 1))
        if not isinstance(found, list) or not all(isinstance(choice, dict) for choice in found):
            raise UserError(f"rollout.engine.urls: {url} gives no `choices`; is it a server of vLLM's?")
        if any(not choice.get("token_ids") for choice in found):
            raise UserError(f"rollout.engine.urls: {url} gives no token ids; vLLM 0.25 or newer does")
        if [c.get("index") for c in found] != list(range(wanted)):
            found.sort(key=lambda choice: str(choice.get("index")).zfill(9))
        if [c.get("index") for c in found] != list(range(wanted)) or not all(map(_is_whole, found)):
            raise UserError(
                f"rollout.engine.urls: {url} answers {wanted} completions with others in number, order or kind: each "
                "is to have its own index, token ids, and a log-probability for each of them"
            )
        return found

    def _send(self, url: str, path: str, content: Answer | None = None, needs: str = "") -> Answer:
        """A request without content asks; `needs`: what a server that refuses was to be started with.

        Raises:
            Passing: another attempt may have an answer.
            UserError: the server refuses.
        """
        try:
            body = self.client.send(url + path, content)
        except Refused as error:
            remedy = f" (start the server with {needs})" if needs else ""
            raise UserError(f"rollout.engine.urls: {url}{path} refuses: {error}{remedy}") from None
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):  # some endpoints answer with a word, or with nothing
            return {}
        return answer if isinstance(answer, dict) else {}


def _is_whole(choice: Answer) -> bool:
    """Whether a choice has token ids and as many log-probabilities."""
    ids, logprobs = choice["token_ids"], choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return (
        isinstance(ids, list)
        and isinstance(values, list)
        and len(ids) == len(values)
        and all(type(own) is int and own >= 0 for own in ids)
        and all(type(own) in (int, float) and math.isfinite(own) for own in values)
    )


def _sampled(url: str, choice: Answer, sampling: Sampling) -> Sampled:
    """A completion, if it is what was asked for.

    Raises:
        Passing: the server gave it up.
        UserError: it was cut short, or ended by a token that ends none here.
    """
    ids, why = choice["token_ids"], choice["finish_reason"]
    if why not in ("stop", "length"):
        raise Passing(f"a completion ended by `{why}`")
    if why == "length" and len(ids) < sampling.max_tokens:
        raise UserError(
            f"rollout.engine.urls: {url} cuts completions at {len(ids)} of {sampling.max_tokens} tokens; start it with "
            f"a larger --max-model-len and with {FLAGS}"
        )
    if why == "stop" and not isinstance(choice.get("stop_reason"), str) and ids[-1] not in sampling.stop_ids:
        raise UserError(
            f"rollout.engine.urls: {url} ends completions at token {ids[-1]}, which ends none of policy.model's; give "
            "it the same model and tokenizer, or put the token into rollout.stop_ids"
        )
    return Sampled(ids, choice["logprobs"]["token_logprobs"], ended=why == "stop")
