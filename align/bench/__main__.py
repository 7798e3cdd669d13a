"""`python -m align.bench NAME --json OUT`: run one benchmark, print its table, write every figure."""

import argparse
import importlib
import json
import pkgutil
from pathlib import Path

import align.bench


def names() -> list[str]:
    """The benchmarks there are: modules of this package."""
    shared = ("__main__", "measure", "trl_generation", "plan_side", "trl_side")
    return [m.name for m in pkgutil.iter_modules(align.bench.__path__) if m.name not in shared]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m align.bench", description=__doc__)
    parser.add_argument("name", choices=names())
    parser.add_argument("--json", type=Path, required=True, help="where to write every figure")
    arguments, rest = parser.parse_known_args()
    benchmark = importlib.import_module(f"align.bench.{arguments.name}")
    if hasattr(benchmark, "add_options"):  # of a long one, which keeps in its file what it has
        own = argparse.ArgumentParser(prog=f"python -m align.bench {arguments.name}", description=benchmark.__doc__)
        benchmark.add_options(own)
        result = benchmark.run(arguments.json, **vars(own.parse_args(rest)))
    else:
        parser.parse_args()  # refuses what it has no option for
        result = benchmark.run()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
