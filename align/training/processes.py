"""What a launcher was asked for against what runs: processes, sharding, precision."""

import atexit
import logging
import os
import sys
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed.tensor import DTensor

from align.errors import UserError

log = logging.getLogger("align")

TOLD_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""In which a cluster's launcher tells each process how many there are; torch reads WORLD_SIZE and RANK alone."""
ALIKE = {"bf16": "bfloat16", "fp16": "float16"}
"""Precisions, as accelerate and as recipes name them."""
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
}


def check_installed() -> None:
    """Raises:
    UserError: DeepSpeed was asked for and is not installed; or Megatron-LM, which does not train here.
    """
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "accelerate's configuration asks for Megatron-LM, which does not train here: give `--config_file "
            "recipes/accelerate/fsdp2.yaml` for a model that no single device holds"
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and find_spec("deepspeed") is None:
        raise UserError("accelerate's configuration asks for DeepSpeed: pip install 'align-lm[deepspeed]'")


def check_processes(world_size: int, precision: str) -> None:
    """What the environment asks for against the processes that there are and the recipe's precision.

    Raises:
        UserError: several processes were asked for, and each would work alone; or another precision.
    """
    # accelerate launch names the precision always, and a meeting place where several processes are to meet.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes, and starts one: give it --multi_gpu as well, or "
            "`--config_file recipes/accelerate/ddp.yaml` (on CPUs with ACCELERATE_USE_CPU=true, not --cpu); or "
            "--num_processes 1"
        )
    told = {name: int(os.environ[name]) for name in TOLD_SIZES if os.environ.get(name, "").isdigit()}
    if world_size == 1 and (many := [name for name, size in told.items() if size > 1]):
        raise UserError(
            f"{many[0]} is {told[many[0]]}, and each of these processes would train alone: start one torchrun or "
            "`accelerate launch` per machine, as recipes/cluster/slurm.sbatch does, or one process"
        )
    if (steps := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", "auto"):
        raise UserError(
            f"accelerate's configuration asks for gradient_accumulation_steps {steps}: a step is train.lists_per_step "
            "lists, cut by train.tokens_per_batch, over all processes; leave the key out there"
        )
    named = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    asked = ALIKE.get(named, named)
    if asked == "fp8":
        raise UserError("accelerate's configuration asks for mixed_precision fp8, which does not train here; give no")
    if asked != "no" and asked != precision:
        raise UserError(
            f"accelerate's configuration asks for mixed_precision {asked}, the recipe's train.precision is "
            f"{precision}: give `accelerate launch` --mixed_precision no, and the recipe train.precision={asked} "
            "where that is meant"
        )


def check_sharding(trainer: Any) -> None:
    """What the environment asks for against how the model is held.

    Raises:
        UserError: FSDP or DeepSpeed was asked for, and every process would hold the whole model.
    """
    accelerator: Accelerator = trainer.accelerator
    if accelerator.num_processes == 1 and accelerator.device.type == "cuda" and torch.cuda.device_count() > 1:
        log.info(
            "%d GPUs are here, and one is used; `accelerate launch` starts a process for each: see docs/distributed.md",
            torch.cuda.device_count(),
        )
    cut = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    held = {"FSDP": cut or trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    for name, what in SHARDING.items():
        if parse_flag_from_env(name) and not held[what]:
            raise UserError(
                f"accelerate's configuration asks for {what}, and it would be left out: here run "
                f"{accelerator.num_processes} processes on {accelerator.device.type}, each with the whole model; give "
                "`--config_file recipes/accelerate/ddp.yaml` where that is meant"
            )


def leave(code: int = 0) -> NoReturn:
    """Wait for the other processes, end the connections with them, and then this process at once.

    What was registered for the exit still runs and what was printed is written; Python and C++ are not taken down.
    Gloo's threads outlive their group, and one that meets another process's end in the midst of that may abort: a
    launcher then ends the processes that are not yet gone, and fails.
    """
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


ENDED = ("closed by peer", "reset by peer", "remote process exited", "Connection refused", "Broken pipe")
"""What gloo and NCCL say where another process is no longer there."""


def lost_process(error: Exception) -> str | None:
    """What to say where another process has ended; None of another error."""
    said = next((one for one in ENDED if one in str(error)), None)
    if said is None or not torch.distributed.is_initialized():
        return None
    rank = torch.distributed.get_rank()
    return (
        f"process {rank} ends because another one has ended ({said}): the reason is what that one said, or the signal "
        "that the launcher names as root cause; the same command goes on from the last checkpoint"
    )
