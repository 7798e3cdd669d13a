"""Which pairs of requests vLLM can run in step: together from the first token on, without one waiting for room."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align.errors import UserError


@dataclass(frozen=True)
class Pair:
    """A completion, written by two requests that get the same tokens."""

    prompt: int
    sample: int
    own: list[int]
    """The tokens that it follows."""
    against: list[int]
    """Those that it follows in the other request."""


@dataclass(frozen=True)
class Room:
    """What vLLM can take at once."""

    requests: int
    step_tokens: int
    """Of prompts, in one step."""
    blocks: int
    """Of the key-value cache."""
    block_size: int

    @classmethod
    def of(cls, vllm_config: Any) -> "Room":
        """By vLLM's configuration."""
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        block = cache.block_size
        return cls(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, cache.num_gpu_blocks, block)


def batches(pairs: Sequence[Pair], max_tokens: int, room: Room) -> Iterator[list[Pair]]:
    """Pairs in their order, as many at a time as all start in one step and never lose their place in the cache.

    Args:
        max_tokens: of a completion.

    Raises:
        UserError: there is no room for one pair.
    """
    batch: list[Pair] = []
    tokens = blocks = 0
    for pair in pairs:
        more_tokens = len(pair.own) + len(pair.against)
        more_blocks = sum(math.ceil((len(ids) + max_tokens) / room.block_size) for ids in (pair.own, pair.against))
        # One block of the cache is vLLM's own.
        if more_tokens > room.step_tokens or more_blocks > room.blocks - 1 or room.requests < 2:
            raise UserError(
                f"rollout.decoding: a prompt of {len(pair.own)} tokens and its contrast of {len(pair.against)} do not "
                "fit vLLM together; raise rollout.engine.cache_gib, or options.max_num_batched_tokens"
            )
        full = 2 * len(batch) + 2 > room.requests or tokens + more_tokens > room.step_tokens
        if batch and (full or blocks + more_blocks > room.blocks - 1):
            yield batch
            batch, tokens, blocks = [], 0, 0
        batch.append(pair)
        tokens, blocks = tokens + more_tokens, blocks + more_blocks
    if batch:
        yield batch
