"""How vLLM is started: what its process needs in its environment, and what a CPU wants."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from align.errors import UserError

CACHE_BYTES = 512 << 20
"""Of keys and values, on a CPU."""


def check_installed(asked_by: str, instead: str) -> None:
    """Refuse vLLM where it is not.

    Args:
        asked_by: the key or option.
        instead: how to do without.

    Raises:
        UserError: says how to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        extra = "rollout-cpu" if torch.version.cuda is None else "rollout"
        raise UserError(f"{asked_by}: vLLM is not installed; run `align doctor --install {extra}`, or {instead}")


def environment(present: Mapping[str, str]) -> dict[str, str]:
    """Variables that vLLM's process needs, where the user has not set them.

    Raises:
        UserError: one is set in a way that cannot work.
    """
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with its parent
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # each of the two takes logits processors of its own kind
    }
    if not torch.cuda.is_available():
        # Two threads on busy cores spin; compilation takes seconds and a C++ compiler, and gains nothing when eager.
        wanted |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
        if present.get("VLLM_BATCH_INVARIANT", "0") != "0":
            raise UserError("VLLM_BATCH_INVARIANT stops vLLM on a CPU, whose results do not depend on the batch; unset")
    return {name: value for name, value in wanted.items() if name not in present}


def on_cpu(max_length: int, cache_bytes: int = CACHE_BYTES) -> dict[str, Any]:
    """Arguments of vllm.LLM on a CPU."""
    return {
        "kv_cache_memory_bytes": cache_bytes,
        "enforce_eager": True,
        "block_size": 32,  # the default of 128 leaves shorter prompts out of the prefix cache
        # A seeded request whose prompt is split over steps crashes on a CPU.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, 2 * max_length),  # two: a contrast's sides start together
    }
