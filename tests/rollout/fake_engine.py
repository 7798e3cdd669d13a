"""Completions that stub engines write: a function of prompt and seed, in plain Python so that a stub starts at once."""

from typing import Any


def fake_completions(prompt: list[int], seed: int, count: int, length: int) -> list[dict[str, Any]]:
    """Fields of `count` Sampled of `length` tokens at most."""
    seeds = [7 * seed + 31 * sum(prompt) + 5 * len(prompt) + k * k for k in range(count)]
    return [
        {
            "ids": [3 + s % 50] * (1 + s % length),
            "logprobs": [-0.5] * (1 + s % length),
            "ended": s % length < length - 1,
        }
        for s in seeds
    ]
