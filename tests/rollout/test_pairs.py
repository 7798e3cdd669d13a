"""Pairs of requests that must run in step."""

import math

import pytest

from align.errors import UserError
from align.rollout.pairs import Pair, Room, batches

PAIRS = [Pair(i // 3, i % 3, [5] * (1 + 7 * i % 40), [6] * (3 + 5 * i % 50)) for i in range(30)]


@pytest.mark.parametrize("room", [Room(6, 10**6, 10**6, 32), Room(10**6, 100, 10**6, 32), Room(10**6, 10**6, 12, 32)])
def test_what_starts_together_has_room_to_the_end(room):
    found = list(batches(PAIRS, 20, room))
    assert [pair for batch in found for pair in batch] == PAIRS
    for batch, following in zip(found, [*found[1:], []], strict=True):
        for pairs, fits in ((batch, True), ([*batch, *following[:1]], not following)):
            prompts = [ids for pair in pairs for ids in (pair.own, pair.against)]
            tokens = sum(map(len, prompts))
            blocks = sum(math.ceil((len(ids) + 20) / 32) for ids in prompts)
            assert fits == (len(prompts) <= room.requests and tokens <= room.step_tokens and blocks < room.blocks)


@pytest.mark.parametrize("room", [Room(1, 1000, 1000, 32), Room(8, 79, 1000, 32), Room(8, 1000, 4, 32)])
def test_a_pair_without_room_is_named(room):
    with pytest.raises(UserError, match="a prompt of 40 tokens and its contrast of 40 do not fit vLLM together; raise"):
        list(batches([Pair(0, 0, [5] * 40, [6] * 40)], 20, room))
