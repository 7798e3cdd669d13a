"""What there is to run on: how many devices, of how much memory, and how a launch spreads a run over them."""

import re
from pathlib import Path

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from align.errors import UserError
from align.planning.plan import Devices

UNITS = {"": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may take."""


def size_of(text: str) -> int:
    """Bytes of a size such as 80GB or 24GiB.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in UNITS:
        raise UserError(f"--memory: {text} is no size; give one such as 80GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def devices(count: int | None = None, memory: str | None = None) -> Devices:
    """The devices of this machine, or as many of so much memory each: those that are named are GPUs."""
    if memory is not None:
        return Devices("cuda", count or 1, size_of(memory))
    if torch.cuda.is_available():
        return Devices("cuda", count or 1, torch.cuda.get_device_properties(0).total_memory)
    return Devices("cpu", count or 1, host_memory() // (count or 1))


def host_memory() -> int:
    """Bytes that this machine, or the container that this is, may use."""
    limits = [psutil.virtual_memory().total]
    for path in map(Path, CGROUPS):
        text = path.read_text().strip() if path.is_file() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def of_launch(arguments: TrainingArguments) -> tuple[Devices, str]:
    """The devices of the processes that were started, and how they spread the run."""
    count = arguments.world_size
    if arguments.device.type == "cuda":
        found = Devices("cuda", count, torch.cuda.get_device_properties(arguments.device).total_memory)
    else:
        found = Devices("cpu", count, host_memory() // count)
    return found, way_of(arguments)


def way_of(arguments: TrainingArguments) -> str:
    """How the processes that were started spread a run: a key of `align.planning.show.NAMES`."""
    count = arguments.world_size
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and count > 1:
        return "fsdp2"
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "zero3" if getattr(plugin, "zero_stage", 3) == 3 else "zero2"
    return "one" if count == 1 else "ddp"
