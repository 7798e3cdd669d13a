"""What measurements count."""

import torch

from align.bench.measure import allocated_bytes, most_held

CPU = torch.device("cpu")
NUMBERS = 30_000


def test_the_most_that_is_held_at_once_counts():
    def task():
        first = torch.empty(NUMBERS)
        del first
        kept = [torch.empty(NUMBERS // 2), torch.empty(NUMBERS)]
        kept.clear()
        torch.empty(NUMBERS)

    assert allocated_bytes(task, CPU) == 4 * (NUMBERS // 2 + NUMBERS)


def test_what_goes_without_having_been_taken_does_not_count():
    old, new = 1, 2
    changes = [(0, -80, old), (1, 50, old), (2, 10, new), (3, -10, new), (4, -50, old), (5, -70, new), (6, 40, new)]
    assert most_held(reversed(changes)) == 60
