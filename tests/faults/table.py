"""The table of faults: what is done to commands, how each ends, and what is lost.

    python tests/faults/table.py [--short] [--cases CASES] [--json FILE] [WORD ...]

runs the tests of faults, and prints a line for each case and a table of the kinds; a WORD chooses among the tests, as
pytest's -k does. `--short` takes the cases of the default run. Tests whose cases stand in CASES already, a file of JSON
lines, are not run again: so the table can be made in parts. A FILE keeps the kinds that other calls have put there.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
FILES = {
    "faults/test_stops.py": "killed at a moment",
    "training/test_kills.py": "killed at random",
    "scoring/test_kills.py": "killed at random",
    "rollout/test_kills.py": "killed at random",
    "faults/test_kills_of_processes.py": "one of two processes killed",
    "training/test_signals.py": "signals",
    "faults/test_power_cut.py": "power cuts",
    "faults/test_damaged_runs.py": "damaged files",
    "test_lacks.py": "no disk, memory, files",
    "faults/test_hostile.py": "hostile folders",
}
"""Files of tests, and what the cases of each are; a test that records none is a case itself."""
MEMORY = 14 * 2**30
"""Address space, so that what asks for all memory is a fault of its own and not the machine's end."""


class Cases:
    """What the tests have recorded, as pytest reports it."""

    def __init__(self, file: Path | None) -> None:
        """Goes on from the cases in a file."""
        self.file = file
        lines = file.read_text().splitlines() if file and file.exists() else []
        self.known = {own["test"]: own for own in map(json.loads, lines)}
        self.kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for own in self.known.values():
            self.kinds[own["kind"]] += own["cases"]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not report.failed:
            return
        kind = next(own for file, own in FILES.items() if report.nodeid.split("::")[0].endswith(file))
        cases = [value for name, value in report.user_properties if name == "case"]
        if not cases or report.failed and not any(case["wrong"] for case in cases):
            wrong = "" if report.passed else f"red: {report.longreprtext.strip().splitlines()[-1]}"
            cases.append({"case": report.nodeid.split("::")[-1], "code": None, "said": "", "wrong": wrong})
        self.kinds[kind] += cases
        if self.file:
            with self.file.open("a") as file:
                file.write(json.dumps({"test": report.nodeid, "kind": kind, "cases": cases}) + "\n")
        for case in cases:
            print(f"{'FAIL' if case['wrong'] else 'ok  '} {kind}: {case['case']}: exit {case['code']} {case['said']}")
            if case["wrong"]:
                print(f"     {case['wrong']}")


def case(what: str, *, code: int, said: str = "", wrong: object = "") -> tuple[str, dict[str, Any]]:
    """What a test gives `record_property` of one case.

    Args:
        what: the command, and what was done to it.
        code: with which it ended when it was called again, or met the fault.
        said: the sentence with which it was refused.
        wrong: a traceback, what is lost, what has run; nothing where all is well.
    """
    return "case", {"case": what, "code": code, "said": said, "wrong": str(wrong or "")}


def figures(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one kind: how many cases, their exit codes, and how many went wrong, with a traceback or without."""
    wrong = [case["wrong"] for case in cases if case["wrong"]]
    codes = Counter("as asserted" if case["code"] is None else str(case["code"]) for case in cases)
    return {
        "cases": len(cases),
        "exit codes": dict(sorted(codes.items())),
        "wrong": len(wrong),
        "tracebacks": sum("raceback" in own for own in wrong),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", type=Path)
    given = parser.parse_args()
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    cases, began = Cases(given.cases), time.monotonic()
    marks = [] if given.short else ["-m", "long or not long"]
    words = ["-k", " and ".join(given.words)] if given.words else []
    quiet = ["-q", "-s", "--no-header", "-p", "no:cacheprovider", "--disable-warnings"]
    code = pytest.main([*quiet, *marks, *words, *(str(TESTS / file) for file in FILES)], plugins=[cases])
    kinds = {kind: figures(own) for kind, own in cases.kinds.items()}
    for kind, own in kinds.items():
        print(f"{kind}: {own}")
    print(f"{time.monotonic() - began:.0f} s")
    if given.json:
        known = json.loads(given.json.read_text())["kinds"] if given.json.exists() else {}
        machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
        machine |= {"date": time.strftime("%Y-%m-%d")}
        value = {"command": "python tests/faults/table.py --json FILE", **machine, "kinds": known | kinds}
        given.json.write_text(json.dumps(value, indent=1) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
