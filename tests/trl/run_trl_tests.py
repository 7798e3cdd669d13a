"""`python tests/trl/run_trl_tests.py CHECKOUT [--trl] [--json OUT] [-k WORDS]`: TRL's own tests on our trainers.

CHECKOUT is a checkout of github.com/huggingface/trl; the installed `trl` is what its tests import, with our trainers in
place of its own (`align.trl.patch()`), or, with --trl, as it is: a test that fails there too says nothing of ours.
"""

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FILES = (
    "tests/test_dpo_trainer.py",
    "tests/test_reward_trainer.py",
    "tests/test_kto_trainer.py",
    "tests/experimental/test_cpo_trainer.py",
    "tests/experimental/test_orpo_trainer.py",
)


class Outcomes:
    """A pytest plugin that remembers what became of each test, with the one fixture of a package that is not ours."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[str, str]] = {}

    @pytest.fixture
    def lazy_shared_datadir(self) -> Path:
        return Path("tests/data").resolve()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = "" if report.passed else _reason(report)
            self.of[report.nodeid] = (report.outcome, why)
            print(f"\n{report.outcome} {report.nodeid.split('::', 1)[1]} {why}" if why else ".", end="", flush=True)


def _reason(report: Any) -> str:
    if report.skipped:
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:200]


def main() -> None:
    """Build what the tests load, run them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--trl", action="store_true", help="with TRL's own trainers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("-k", default="", help="pytest's -k")
    parser.add_argument("--files", default="", help="a part of the names of the files that run")
    parser.add_argument("--tb", default="no", help="pytest's --tb")
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "align-trl-lookalikes")
    arguments = parser.parse_args()
    os.environ |= {"HF_HOME": str(arguments.home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    import datasets
    import lookalikes
    import torch

    torch.set_num_threads(1)
    checkout = arguments.checkout.resolve()
    files = [file for file in FILES if arguments.files in file and (checkout / file).exists()]
    text = "".join((checkout / file).read_text() for file in files)
    names = set(re.findall(r'"(trl-internal-testing/(?:tiny|small)-[^"]*For(?:Causal|Sequence)[^"]*)"', text))
    for what, why in lookalikes.build(checkout, arguments.home, names).items():
        print(f"not built: {what}: {why}")
    datasets.load_dataset = lookalikes.load_dataset_from(arguments.home / "sets")
    _what_a_later_release_asks_for()
    if not arguments.trl:
        _ours()
    outcomes = Outcomes()
    os.chdir(checkout)
    selected = [
        *files,
        "-qq",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "--rootdir",
        str(checkout),
        "--tb=" + arguments.tb,
    ]
    pytest.main(selected + (["-k", arguments.k] if arguments.k else []), plugins=[outcomes])
    _show(outcomes.of)
    if arguments.json:
        arguments.json.write_text(json.dumps(outcomes.of, indent=1))


def _what_a_later_release_asks_for() -> None:
    """Questions after optional packages that the installed TRL does not know: they are not installed."""
    module = importlib.import_module("trl.import_utils")

    def missing(name: str) -> Any:
        if not re.fullmatch(r"is_\w+_available", name):
            raise AttributeError(name)
        return lambda: False

    module.__getattr__ = missing  # type: ignore[method-assign]


def _ours() -> None:
    """Our trainers in the installed TRL; on a CPU, as TRL's tests do it for TRL's configurations."""
    import align.trl
    from align.trl.config import AlignConfig

    align.trl.patch()
    plain = AlignConfig.__post_init__

    def on_cpu(self: Any) -> None:
        self.use_cpu = True
        plain(self)

    AlignConfig.__post_init__ = on_cpu  # type: ignore[method-assign]


def _show(outcomes: dict[str, tuple[str, str]]) -> None:
    for file in FILES:
        counts = Counter(outcome for test, (outcome, _) in outcomes.items() if test.startswith(file))
        print(file, dict(counts))
    for test, (outcome, why) in outcomes.items():
        if outcome == "failed":
            print(f"FAILED {test}\n    {why}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
