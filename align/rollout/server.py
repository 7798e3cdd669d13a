"""The engine that is served elsewhere: requests over HTTP to one or several vLLM servers."""

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from align.errors import UserError
from align.evaluate.sampling import Sampled, row_seed
from align.rollout.engine import Contexts, Prompts, Sampling, Weights

log = logging.getLogger("align")

LONGEST_WAIT = 30.0
"""Seconds between two attempts at most."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP codes after which another attempt may succeed."""

Answer = dict[str, Any]


class Passing(Exception):
    """A failure that another attempt, or another server, may not have."""


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
            UserError: a server does not answer, or the key's variable is not set.
        """
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.concurrency, self.tries, self.timeout, self.first_wait = concurrency, tries, timeout, first_wait
        self.headers = {"Content-Type": "application/json"}
        if api_key is not None:
            if api_key not in os.environ:
                raise UserError(f"rollout.engine.api_key: the environment has no variable {api_key}")
            self.headers["Authorization"] = f"Bearer {os.environ[api_key]}"
        self.lock = threading.Lock()
        self.in_flight = dict.fromkeys(self.urls, 0)
        self.base = model or self._get(self.urls[0], "/v1/models")["data"][0]["id"]
        self.model = self.base

    def sample(
        self, prompts: Prompts, sampling: Sampling, contexts: Contexts | None = None, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """As every engine, without a decoding of its own."""
        pool = ThreadPoolExecutor(self.concurrency * len(self.urls))
        try:
            wanted = [place for place in range(len(prompts)) if place not in done]
            asked = {pool.submit(self._complete, prompts[place], sampling): place for place in wanted}
            for finished in as_completed(asked):
                yield asked[finished], finished.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def load(self, weights: Weights) -> None:
        """As every engine, on every server; they must see the weights' folder under the same path."""
        for url in self.urls:
            if weights.kind == "adapter":
                self._load_adapter(url, weights)
            else:
                content = {"method": "reload_weights", "kwargs": {"weights_path": weights.folder}}
                self._post(url, "/collective_rpc", content, needs="VLLM_SERVER_DEV_MODE=1")
            self._reset_cache(url, must=weights.kind == "merged")
        self.model = weights.name if weights.kind == "adapter" else self.base

    def rest(self, *, stop: bool) -> None:
        """Nothing: the servers have machines of their own."""

    def close(self) -> None:
        """Nothing: the servers were there before us."""

    def _load_adapter(self, url: str, weights: Weights) -> None:
        """Under its own name, which no other weights have; then the one that we loaded before is removed."""
        served = [model["id"] for model in self._get(url, "/v1/models")["data"]]
        if weights.name not in served:
            content = {"lora_name": weights.name, "lora_path": weights.folder}
            self._post(url, "/v1/load_lora_adapter", content, needs="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
        if self.model in served and self.model not in (self.base, weights.name):
            self._post(url, "/v1/unload_lora_adapter", {"lora_name": self.model})

    def _reset_cache(self, url: str, *, must: bool) -> None:
        """New weights under an old name need it; an adapter's new name is part of the cache's keys already."""
        try:
            self._post(url, "/reset_prefix_cache", {}, needs="VLLM_SERVER_DEV_MODE=1")
        except UserError:
            if must:
                raise

    def _complete(self, prompt: list[int], sampling: Sampling) -> list[Sampled]:
        request = {
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
        answer = self._retried(lambda url: self._send(url, "/v1/completions", request))
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [_sampled(choice) for choice in choices]

    def _retried(self, attempt: Any) -> Answer:
        """Try one server after the other, with longer and longer waits."""
        failed: str | None = None
        for count in range(self.tries):
            url = self._least_busy(avoid=failed)
            try:
                return attempt(url)
            except Passing as error:
                failed, problem = url, error
                log.warning("%s: %s (attempt %d of %d)", url, error, count + 1, self.tries)
                if count + 1 < self.tries:
                    time.sleep(min(LONGEST_WAIT, self.first_wait * 2**count))
            finally:
                with self.lock:
                    self.in_flight[url] -= 1
        raise UserError(f"rollout.engine.urls: {failed} failed {self.tries} times: {problem}; start it, then go on")

    def _least_busy(self, avoid: str | None) -> str:
        with self.lock:
            url = min(self.urls, key=lambda url: (url == avoid, self.in_flight[url]))
            self.in_flight[url] += 1
        return url

    def _get(self, url: str, path: str) -> Answer:
        return self._here(url, lambda: self._send(url, path, None))

    def _post(self, url: str, path: str, content: Answer, needs: str = "") -> Answer:
        try:
            return self._here(url, lambda: self._send(url, path, content))
        except UserError as error:
            raise UserError(f"{error}{f' (start the server with {needs})' if needs else ''}") from None

    def _here(self, url: str, attempt: Any) -> Answer:
        """Try this server alone."""
        for count in range(self.tries):
            try:
                return attempt()
            except Passing as error:
                problem = error
                if count + 1 < self.tries:
                    time.sleep(min(LONGEST_WAIT, self.first_wait * 2**count))
        raise UserError(f"rollout.engine.urls: {url} does not answer ({problem}); start it, or take it out")

    def _send(self, url: str, path: str, content: Answer | None) -> Answer:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(url + path, data=data, headers=self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            if error.code in PASSING:
                raise Passing(f"HTTP {error.code}: {said}") from None
            raise UserError(f"rollout.engine.urls: {url}{path} refuses: HTTP {error.code}: {said}") from None
        except (OSError, TimeoutError) as error:
            raise Passing(str(error)) from None
        try:
            return json.loads(body)
        except json.JSONDecodeError:  # some endpoints answer with a word, or with nothing
            return {}


def _sampled(choice: Answer) -> Sampled:
    if not choice.get("token_ids"):
        raise UserError("rollout.engine.urls: the server gives no token ids; vLLM 0.25 or newer does")
    return Sampled(choice["token_ids"], choice["logprobs"]["token_logprobs"], ended=choice["finish_reason"] == "stop")
