"""The recipe's `rollout.decoding` inside vLLM's workers."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from align.rollout.config import DecodingConfig, TransferQ
from align.rollout.inside_vllm.contrast import Contrasted
from align.rollout.inside_vllm.request import CONFIG, Decoding, Request
from align.rollout.inside_vllm.transfer_q import open_guided

__all__ = ["Decoding", "Request", "open_decoding"]


def open_decoding(additional_config: Mapping[str, Any]) -> Decoding | None:
    """What vLLM's configuration asks for."""
    if CONFIG not in additional_config:
        return None
    config: Any = TypeAdapter(DecodingConfig).validate_python(additional_config[CONFIG]["section"])
    if isinstance(config, TransferQ):
        return open_guided(config, additional_config[CONFIG]["engine"])
    return Contrasted(config)
