"""The arguments that vLLM is started with, and whether our sampler fits its version."""

import logging
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from align.errors import UserError
from align.export.served import room_for
from align.export.vllm_start import CACHE_BYTES, on_cpu
from align.rollout.inside_vllm.draw import COLUMNS
from align.rollout.inside_vllm.request import CONFIG

log = logging.getLogger("align")

FIRST_RUNNER, SECOND_RUNNER = ("0.25", "0.31", "0.32"), ("0.31", "0.32")
"""Versions of vLLM whose two model runners take our sampler: those whose sources were compared."""
OURS = {
    "additional_config",
    "generation_config",
    "logits_processors",
    "logprobs_mode",
    "max_logprobs",
    "override_generation_config",
    "worker_extension_cls",
}
"""Arguments of vllm.LLM without which tokens or log-probabilities would silently be others."""


@dataclass(frozen=True)
class VllmArguments:
    """What a VllmEngine is made from; plain values, since they travel to its process."""

    folder: str
    """The base model's."""
    dtype: str
    """What the weights are held in, and the model is run in."""
    max_length: int
    """Tokens of prompt plus completion at most."""
    lora_rank: int = 0
    """Of the adapters to come; 0 where there will be none."""
    cache_bytes: int = CACHE_BYTES
    """Key-value cache, on a CPU."""
    trusted: bool = False
    """Whether model code from the hub may run."""
    sampler: Literal["auto", "align", "vllm"] = "auto"
    """What draws the tokens; auto: our kernel, in versions of vLLM that it is known to fit."""
    decoding: dict[str, Any] | None = None
    """The recipe's `rollout.decoding`."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of vllm.LLM."""


def takes_our_sampler(wanted: str) -> bool:
    """Whether our kernel draws the tokens.

    Args:
        wanted: auto, align or vllm.

    Raises:
        UserError: it is asked for, and vLLM's version is not one that it fits.
    """
    from vllm import __version__

    known = SECOND_RUNNER if uses_second_runner() else FIRST_RUNNER
    fits = any(__version__.startswith(f"{version}.") for version in known)
    if wanted == "align" and not fits:
        raise UserError(f"rollout.engine.sampler: ours fits vLLM {', '.join(known)}, not {__version__}; leave it out")
    if wanted == "auto" and not fits:
        log.warning("vLLM %s draws the tokens with its own sampler: ours is not known to fit it", __version__)
    return fits and wanted != "vllm"


def uses_second_runner() -> bool:
    """Whether the user has chosen vLLM's second model runner; `environment` chooses the first."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("0", "false", "False")


def llm_arguments(arguments: VllmArguments, *, ours: bool) -> dict[str, Any]:
    """Arguments of vllm.LLM.

    Args:
        ours: our kernel draws the tokens.

    Raises:
        UserError: an option that would make results wrong.
    """
    if arguments.options.get("model_impl") == "transformers":
        raise UserError("rollout.engine.options: model_impl patches transformers' classes; use `engine: transformers`")
    if arguments.decoding and not ours:  # vLLM's own may draw different tokens for the two sides of a contrast
        raise UserError("rollout.decoding: needs our sampler; leave `rollout.engine.sampler` out, or take another vLLM")
    if ours and arguments.options.get("speculative_config"):
        raise UserError(
            "rollout.engine.options: speculative_config has vLLM look at several tokens of a request at once, which "
            "our sampler does not draw; set `rollout.engine.sampler: vllm`"
        )
    spread = any(arguments.options.get(f"{kind}_parallel_size", 1) > 1 for kind in ("tensor", "pipeline", "data"))
    if spread and (arguments.decoding or {}).get("name") == "transfer_q":
        raise UserError("rollout.decoding: transfer_q's baseline runs in vLLM's own process; leave it on one device")
    given: dict[str, Any] = {
        "dtype": arguments.dtype,  # `auto` would cast float32 checkpoints to bfloat16
        "max_model_len": arguments.max_length,
        "seed": 0,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": COLUMNS,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "override_generation_config": {},
        "trust_remote_code": arguments.trusted,
        "disable_log_stats": True,
    }
    if arguments.lora_rank:
        room = room_for(arguments.lora_rank)
        at_once = 2 if arguments.decoding else 1
        given |= {"enable_lora": True, "max_lora_rank": room, "max_loras": at_once, "max_cpu_loras": 2 * at_once}
    if ours:
        runner = "runner_v2" if uses_second_runner() else "runner_v1"
        given["logits_processors"] = [f"align.rollout.inside_vllm.{runner}:Requests"]
        given["worker_extension_cls"] = "align.rollout.inside_vllm.extension.OurSampler"
    if arguments.decoding:
        given["additional_config"] = {CONFIG: {"section": arguments.decoding, "engine": asdict(baseline(arguments))}}
    if torch.cuda.is_available():
        given |= {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}  # the trainer has its model there too
    else:
        given |= on_cpu(arguments.max_length, arguments.cache_bytes)
    if taken := OURS & given.keys() & arguments.options.keys():
        raise UserError(f"rollout.engine.options: {min(taken)} is set by Align, which draws by it; take it out")
    return given | arguments.options


def baseline(arguments: VllmArguments) -> VllmArguments:
    """The engine beside a policy's that continues texts for Transfer Q*."""
    assert arguments.decoding is not None
    folder = str(Path(arguments.decoding.get("baseline") or arguments.folder).expanduser())
    # The policy has half of the memory, the trainer more; and only one engine of a process can sleep.
    room = {"gpu_memory_utilization": 0.2, "enable_sleep_mode": False} if torch.cuda.is_available() else {}
    options = arguments.options | room
    return replace(arguments, folder=folder, sampler="vllm", decoding=None, lora_rank=0, options=options)
