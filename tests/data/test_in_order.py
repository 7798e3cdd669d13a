"""Work in several processes ends, whatever ends it."""

import subprocess
import sys

ROUNDS = """
from align.data.in_order import in_order
from align.stopping import stoppable

ballast = bytearray(200_000_000)  # so that a fork takes its time

def fails(window):
    raise ValueError(window)

with stoppable():
    for _ in range(40):
        try:
            list(in_order(fails, range(4), 6))
        except ValueError:
            pass
print("ended")
"""


def test_processes_that_have_hardly_begun_end_with_the_work():
    """Python forgets a signal that comes between a fork and itself: a pool then waited for good, one time in 40."""
    ended = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "ended\n", ended.stderr
