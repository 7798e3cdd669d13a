"""A worker process without vLLM: answers like `align.rollout.worker`, and fails as its argument says.

python stub_worker.py FOLDER FAILURE: FOLDER/starts grows by a line with each start, FOLDER/loads with each load.
"""

import json
import os
import sys
import time
from pathlib import Path

from fake_engine import fake_completions  # this folder is on the path

folder, failure = Path(sys.argv[1]), sys.argv[2]


def note(name: str, text: str) -> None:
    with (folder / name).open("a") as file:
        file.write(text + "\n")


def reply(**content) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


note("starts", str(os.getpid()))
starts = len((folder / "starts").read_text().splitlines())
if failure == "never starts":
    sys.exit(1)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "load":
        note("loads", request["weights"]["name"])
    if request["do"] == "sample":
        sampling = request["sampling"]
        for index in sorted(range(len(request["prompts"])), key=lambda i: (i % 2, -i)):
            if failure == "refuses":
                reply(error="prompt too long")
                break
            if failure == "dies twice" and starts < 3 and index % 2:
                os.kill(os.getpid(), 9)
            if failure == "hangs once" and starts < 2 and index < 3:
                time.sleep(60)
            prompt = request["prompts"][index] + request.get("contexts", [[]] * (index + 1))[index]
            drawn = fake_completions(prompt, sampling["seed"], sampling["completions"], sampling["max_tokens"])
            reply(index=index, completions=drawn)
        else:
            reply(done="sample")
    else:
        reply(done=request["do"])
