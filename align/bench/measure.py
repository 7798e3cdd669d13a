"""Timing in alternation, peak memory, and what the machine is."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from align.kernels import native
from align.kernels.head import workspace

Task = Callable[[], object]


def alternate(tasks: dict[str, Task], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Time tasks in turn, `rounds` times after one warm-up each.

    Returns:
        Per task, milliseconds: median, fastest and slowest by the wall clock, and on a CPU the median of the time this
        process had the processor ("cpu_median_ms"), which other programs disturb less.
    """
    for task in tasks.values():
        task()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            times[name].append(_once(task, device))
    return {name: _summary(samples, device) for name, samples in times.items()}


def _once(task: Task, device: torch.device) -> tuple[float, float]:
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    task()
    _wait(device)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(samples: list[tuple[float, float]], device: torch.device) -> dict[str, float]:
    wall = [sample[0] for sample in samples]
    figures = {"median_ms": statistics.median(wall), "min_ms": min(wall), "max_ms": max(wall)}
    if device.type == "cpu":
        figures["cpu_median_ms"] = statistics.median(sample[1] for sample in samples)
    return figures


def peak_bytes(task: Task, device: torch.device) -> int:
    """Memory a task needs beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        return torch.cuda.max_memory_allocated(device) - before
    workspace.release()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # so that what earlier tasks left free is not this one's for nothing
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present size
    before = _status("VmRSS")
    task()
    return _status("VmHWM") - before


def allocated_bytes(task: Task, device: torch.device) -> int:
    """Most memory that torch's allocator held during a task beyond what it held before, to the byte."""
    if device.type == "cuda":
        return peak_bytes(task, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        task()
    results: Any = profile.profiler
    return most_held(_changes(results.kineto_results.experimental_event_tree()))


def most_held(changes: Iterable[tuple[int, int, int]]) -> int:
    """The most bytes held at once, of changes as (time, bytes taken or given back, address), in any order.

    What goes from an address that none of them took is not counted: torch's profiler remembers a block that was given
    back after an earlier profile had ended, and reports that block's size when another at its address goes.
    """
    taken, held, most = set[int](), 0, 0
    for _, change, address in sorted(changes):
        if change > 0:
            taken.add(address)
        elif address in taken:
            taken.remove(address)
        else:
            continue
        held += change
        most = max(most, held)
    return most


def _changes(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr
        yield from _changes(event.children)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set(),
    }


def _cpu() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
