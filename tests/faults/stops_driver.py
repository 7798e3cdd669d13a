"""Runs commands of `align` in children that are stopped at the nth thing they do to files; see stops.py.

Started with stop.c preloaded. torch is loaded once, and every command runs in a fork of this process.
"""

import ctypes
import json
import os
import sys
import traceback

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401

import align.evaluate.rows
import align.export.export
import align.scoring.command
import align.training.train  # noqa: F401
from align.cli import main


def run(command: dict, report: int) -> None:
    """One command, to its end or to the stop; what it counted goes to the pipe."""
    hook = ctypes.CDLL(None)
    with open(command["log"], "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = 0
    hook.faults_arm(command["below"].encode(), ctypes.c_long(command["at"]))
    try:
        main(command["arguments"])
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    seen = hook.faults_seen()
    os.write(report, str(seen).encode())
    os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            run(json.loads(line), write)
        os.close(write)
        with os.fdopen(read) as pipe:
            seen = pipe.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seen": int(seen or -1)}), flush=True)


if __name__ == "__main__":
    serve()
