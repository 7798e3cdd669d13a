"""Fuzz every reader with inputs that coverage guides (atheris, libFuzzer's Python): whatever a target raises that no
user is told is shown with its input, and the exit code is 1.

    pip install atheris
    python tests/faults/fuzz.py --seconds 60 [--corpus FOLDER] [TARGET ...]
    python tests/faults/fuzz.py --drawn 40000 [--seed 0] [TARGET ...]      # drawn alone, ten to a hundred times as fast

Each target runs in a process of its own, since a library's own code may end it. What a target has found goes on from
FOLDER. A table of inputs tried stands at the end.
"""

import argparse
import importlib.util
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "rewards")]
SLOWEST = 20
"""Seconds of one input, beyond which it counts as a fault."""


def run_one(name: str, corpus: Path, seconds: int) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["align", "rewards"]):
        import targets
    target, tried, written = targets.targets()[name], 0, 0.0
    count = corpus / f"{name}.count"

    def try_input(data: bytes) -> None:
        nonlocal tried, written
        tried += 1
        if time.monotonic() - written > 1:  # libFuzzer ends the process without a word to Python
            count.write_text(str(tried))
            written = time.monotonic()
        targets.attempt(target, data if target.begin else target.made(data))

    options = [f"-max_total_time={seconds}", f"-timeout={SLOWEST}", "-rss_limit_mb=6000", "-max_len=8192"]
    options += [f"-artifact_prefix={corpus}/{name}.", "-print_final_stats=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(corpus / name), *options], try_input)
    atheris.Fuzz()


def draw_one(name: str, corpus: Path, number: int, seed: int) -> None:
    """Try this many inputs of one target in this process."""
    import targets

    logging.disable(logging.CRITICAL)  # damaged caches are said, and made again
    target, drawn = targets.targets()[name], random.Random(f"{name} {seed}")
    for tried in range(number):
        data = drawn.randbytes(drawn.randrange(2, 25))
        signal.setitimer(signal.ITIMER_PROF, SLOWEST)  # of computing: the process ends there
        try:
            targets.attempt(target, target.made(data))
        except BaseException:
            print(f"bytes.fromhex({data.hex()!r})")
            raise
        if tried % 100 == 99 or tried + 1 == number:
            (corpus / f"{name}.count").write_text(str(tried + 1))
    signal.setitimer(signal.ITIMER_PROF, 0)


def run(names: list[str], corpus: Path, how: list[str]) -> int:
    """Fuzz targets one after the other; how many of them have failed.

    Args:
        how: options of each target's own process.
    """
    import targets

    failed, total = 0, 0
    for name in names or list(targets.targets()):
        begin = corpus / name
        begin.mkdir(parents=True, exist_ok=True)
        for k, data in enumerate(targets.targets()[name].begin or [bytes([k, 3 * k]) for k in range(40)]):
            (begin / f"begin-{k}").write_bytes(data)
        command = [sys.executable, __file__, "--one", name, *how, "--corpus", str(corpus)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=os.environ)
        count = corpus / f"{name}.count"
        tried = int(count.read_text()) if count.exists() else 0
        failed, total = failed + (done.returncode != 0), total + tried
        print(f"{name:15} {tried:9} inputs  {'a fault' if done.returncode else 'none'}", flush=True)
        if done.returncode:
            print((done.stdout + done.stderr)[-4000:], flush=True)
    print(f"{'all':15} {total:9} inputs  {failed} targets with a fault")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="of each target (default 60)")
    parser.add_argument(
        "--corpus", type=Path, help="where inputs are kept (default: a folder that goes with the process)"
    )
    parser.add_argument("--drawn", type=int, default=0, help="inputs of each target, which no coverage guides")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.drawn and importlib.util.find_spec("atheris") is None:
        sys.exit("atheris is not installed, so that coverage guides nothing: pip install atheris, or give --drawn")
    if given.one and given.drawn:
        draw_one(given.one, given.corpus, given.drawn, given.seed)
    elif given.one:
        run_one(given.one, given.corpus, given.seconds)
    else:
        how = ["--seconds", str(given.seconds), "--drawn", str(given.drawn), "--seed", str(given.seed)]
        with tempfile.TemporaryDirectory() as own:
            sys.exit(min(run(given.targets, given.corpus or Path(own), how), 1))


if __name__ == "__main__":
    main()
