"""vLLM's own process: `python -m align.rollout.worker`, which reads requests as lines of JSON and writes replies so.

It ends with its parent: when its input closes, it kills its process group, whatever it is doing.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from typing import Any, TextIO

from align.errors import UserError
from align.rollout.engine import Sampling, Weights
from align.rollout.vllm_arguments import VllmArguments
from align.rollout.vllm_engine import VllmEngine


def main() -> None:
    """Serve requests until the input closes."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    engine: VllmEngine | None = None
    while True:
        request = requests.get()
        operation = request.pop("do")
        try:
            if operation == "start":
                engine = VllmEngine(VllmArguments(**request))
            else:
                assert engine is not None
                _serve(engine, operation, request, replies)
        except UserError as error:
            _reply(replies, error=str(error))
            continue
        except Exception as error:
            traceback.print_exc()
            _reply(replies, error=f"vLLM says {type(error).__name__}: {error}")
            continue
        _reply(replies, done=operation)


def _serve(engine: VllmEngine, operation: str, request: dict[str, Any], replies: TextIO) -> None:
    if operation == "sample":
        sampling = Sampling(**request["sampling"])
        for index, completions in engine.sample(request["prompts"], sampling, request.get("contexts")):
            _reply(replies, index=index, completions=[asdict(one) for one in completions])
    elif operation == "load":
        engine.load(Weights(**request["weights"]))
    elif operation == "rest":
        engine.rest(stop=False)


def _reply(replies: TextIO, **content: Any) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def _read(requests: queue.Queue) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
