"""A server of our own that speaks OpenAI's chat completions, whose judge is a function of the question."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any] | bytes


def spoken(tokens: list[str], last: dict[str, float] | None = None) -> dict[str, Any]:
    """A choice of these tokens; the last one could have been others, with these probabilities."""
    alternatives = [{"token": word, "logprob": math.log(p)} for word, p in (last or {}).items()]
    content = [{"token": own, "logprob": 0.0, "top_logprobs": []} for own in tokens]
    content[-1]["top_logprobs"] = alternatives
    message = {"role": "assistant", "content": "".join(tokens)}
    return {"choices": [{"message": message, "logprobs": {"content": content} if last else None}]}


def answers(question: str) -> tuple[str, str]:
    """What a question of pairs shows as A and B."""
    first, _, rest = question.partition("Answer A:\n")[2].partition("\n\nAnswer B:\n")
    return first, rest.partition("\n\nWhich answer is better?")[0]


@contextmanager
def serving(judge: Callable[[str], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address, and all that is asked."""
    bodies: list[dict[str, Any]] = []

    class Stub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            reply = judge(body["messages"][-1]["content"])
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/v1", bodies
    server.shutdown()
