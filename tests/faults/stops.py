"""Commands of `align` that are stopped at the nth thing that they do to files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
STOPPED = 137


class Ended(NamedTuple):
    code: int
    """Exit code; STOPPED where it was stopped."""
    seen: int
    """Things done to files below the folder; -1 where it was stopped."""


class Stops:
    """A process that runs commands in its children, with the hook of stop.c in them.

    `run(["train", "r.yaml"], below=folder, at=7)` stops at the seventh creation, write (in its middle), rename,
    removal, sync or making of a folder below `folder`, from 0; without `at` it runs to its end.
    """

    def __init__(self, build: Path) -> None:
        """Args:
        build: folder for the compiled hook and the commands' messages.
        """
        self.log, self.begins = build / "stops.log", 0
        library = build / "stop.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler, "a C compiler is needed, as for align's own kernels"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "stop.c"), "-ldl"], check=True
        )
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
        environment |= {"HF_DATASETS_CACHE": str(build / "datasets"), "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, str(HERE / "stops_driver.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        assert self._answer() == "ready", self.said()

    def _answer(self) -> str:
        assert self.driver.stdout
        return self.driver.stdout.readline().strip()

    def run(self, arguments: list[str], *, below: Path, at: int | None = None) -> Ended:
        assert self.driver.stdin
        self.begins = self.log.stat().st_size
        command = {"arguments": arguments, "below": str(below), "at": -1 if at is None else at, "log": str(self.log)}
        self.driver.stdin.write(json.dumps(command) + "\n")
        self.driver.stdin.flush()
        return Ended(**json.loads(self._answer()))

    def said(self) -> str:
        """The end of what the last command said."""
        return self.log.read_bytes()[self.begins :].decode(errors="replace")[-4000:]

    def close(self) -> None:
        assert self.driver.stdin
        self.driver.stdin.close()
        self.driver.wait(timeout=60)
