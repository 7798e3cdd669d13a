"""An engine in a process of its own, started again if it dies, hangs or is killed."""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Container, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.evaluate.sampling import Sampled
from align.export.vllm_start import environment
from align.rollout.engine import Contexts, Prompts, Sampling, Weights
from align.rollout.vllm_arguments import VllmArguments

log = logging.getLogger("align")

STARTS = 4
"""In a row without a prompt finished or weights loaded, after which it is given up."""
START_SECONDS = 600.0


class EngineDied(RuntimeError):
    """The process ended, or answered nothing for too long."""


class EngineProcess:
    """A VllmEngine behind a pipe. This process needs no vLLM, and what that does to its own does not reach it."""

    def __init__(self, arguments: VllmArguments, *, timeout: float, log_file: Path) -> None:
        """Args:
        arguments: of the engine.
        timeout: seconds without an answer after which it is taken for stuck.
        log_file: what the process prints is added there.
        """
        self.arguments, self.timeout, self.log_file = arguments, timeout, log_file
        self.weights: Weights | None = None
        self.process: subprocess.Popen | None = None
        self.replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.command = [sys.executable, "-m", "align.rollout.worker"]

    @property
    def pid(self) -> int | None:
        """Of the process, if it runs."""
        return self.process.pid if self.process else None

    def sample(
        self, prompts: Prompts, sampling: Sampling, contexts: Contexts | None = None, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """As every engine; prompts that were not finished when the process died are sampled again, to the same end."""
        left = {place: prompt for place, prompt in enumerate(prompts) if place not in done}
        starts = 0
        while left:
            places = list(left)
            try:
                self._start()
                request: dict[str, Any] = {"prompts": [left[place] for place in places], "sampling": asdict(sampling)}
                if contexts is not None:
                    request["contexts"] = [contexts[place] for place in places]
                for reply in self._ask("sample", **request):
                    starts = 0
                    place = places[reply["index"]]
                    del left[place]
                    yield place, [Sampled(**one) for one in reply["completions"]]
            except GeneratorExit:  # no one reads the rest
                self.close()
                raise
            except EngineDied as error:
                starts = self._after_death(error, starts)

    def load(self, weights: Weights) -> None:
        """As every engine."""
        self.weights = weights
        starts = 0
        while True:
            try:
                if not self._start():
                    self._wait("load", weights=asdict(weights))
                return
            except EngineDied as error:
                starts = self._after_death(error, starts)

    def rest(self, *, stop: bool) -> None:
        """As every engine."""
        try:
            if self.process and not stop:
                self._wait("rest")
                return
        except EngineDied as error:
            log.warning("the engine's process failed (%s); it is started again when it is needed", error)
        self.close()

    def close(self) -> None:
        """Kill the process group: the engine keeps nothing that must be written."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _start(self) -> bool:
        """Make sure that it runs with the present weights; whether it had to be started."""
        if self.process and self.process.poll() is None:
            return False
        self.close()
        log.info("starting vLLM; what it prints goes to %s", self.log_file)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=os.environ | environment(os.environ),
                start_new_session=True,  # so that its own children can be killed with it
                text=True,
            )
        self.replies = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self.replies), daemon=True).start()
        self._wait("start", **asdict(self.arguments))
        if self.weights:
            self._wait("load", weights=asdict(self.weights))
        return True

    def _wait(self, operation: str, **content: Any) -> None:
        for _ in self._ask(operation, **content):
            pass

    def _ask(self, operation: str, **content: Any) -> Iterator[dict[str, Any]]:
        """Send a request and give its replies until it is done.

        Raises:
            UserError: the engine cannot do it, and would not the next time.
            EngineDied: it might.
        """
        assert self.process is not None
        try:
            self.process.stdin.write(json.dumps({"do": operation, **content}) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            raise EngineDied("it ended") from None
        patience = max(self.timeout, START_SECONDS) if operation == "start" else self.timeout
        while True:
            try:
                reply = self.replies.get(timeout=patience)
            except queue.Empty:
                raise EngineDied(f"no answer to `{operation}` in {patience:.0f} s") from None
            if reply is None:
                raise EngineDied("it ended")
            if "error" in reply:
                self.close()
                raise UserError(f"rollout.engine: {reply['error']}; {self.log_file} has all that was printed")
            if "done" in reply:
                return
            yield reply

    def _after_death(self, error: EngineDied, starts: int) -> int:
        self.close()
        if starts + 1 >= STARTS:
            raise UserError(
                f"rollout.engine: vLLM's process failed {STARTS} times in a row ({error}); {self.log_file} says why, "
                "and `rollout.engine: transformers` does without it"
            )
        log.warning("the engine's process failed (%s); starting it again", error)
        return starts + 1


def _read(lines: Any, replies: queue.Queue) -> None:
    for line in lines:
        replies.put(json.loads(line))
    replies.put(None)
