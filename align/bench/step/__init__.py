"""Our preference step against TRL's DPOTrainer: same model, adapter, dtype, pairs and batches, equal losses.

Off CUDA, TRL's head scores every position, prompt and padding too; here it gets completion positions only everywhere.
"""

import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import transformers
import trl
from trl.trainer import utils as trl_utils

from align.bench.measure import Task, allocated_bytes, alternate, machine, peak_bytes
from align.bench.step.floor import flops, gemm_floor_ms
from align.bench.step.shapes import CHAT, GPU_SHAPES, PAIRS, SHAPES, USUAL, Lengths, random_list, random_lists, save
from align.bench.step.sides import Layers, Ours, Side, Theirs
from align.data.steps import packed_size
from align.packing.batch import Example

ROUNDS = 3
FIXED = {"4:1": (512, 128), "1:1": (256, 256), "1:4": (64, 256)}
"""Prompt and completion tokens of lists."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
"""Largest difference of losses; bfloat16 rounds on either side."""

Groups = list[dict[str, Side]]


def run() -> dict[str, object]:
    """K = 2 at every shape, then lists at the smallest; prints a line per implementation. One thread on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    trl_utils._use_triton = _on_completions
    shapes = list(GPU_SHAPES if device.type == "cuda" else SHAPES)
    cases = [_pairs(shape, USUAL, device) for shape in shapes]
    cases.append(_pairs(shapes[0], CHAT, device))
    cases += [_lists(shapes[0], k, *lengths, device) for k in (4, 8) for lengths in FIXED.items()]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    return {"machine": machine(device) | versions, "date": str(date.today()), "cases": cases}


def _on_completions(device: torch.device) -> bool:
    """TRL's test for a device whose head takes completion positions only."""
    return True


def _pairs(shape: str, lengths: Lengths, device: torch.device) -> dict[str, object]:
    """K = 2. Off a GPU in float32 against TRL's best settings too; in bfloat16 against its best and its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), shape)
        batches = [list(random_lists(shape, PAIRS[shape], seed, lengths)) for seed in range(2)]
        half: dict[str, Side] = {
            "ours, bf16": Ours(folder, batches, device, dtype=torch.bfloat16),
            "ours, bf16, checkpointing": Ours(folder, batches, device, checkpointing=True, dtype=torch.bfloat16),
            "trl default, bf16": Theirs(
                folder, batches, device, checkpointing=True, cached=False, dtype=torch.bfloat16
            ),
        }
        groups: Groups = [half]
        if device.type == "cuda":
            half["trl best, bf16"] = Theirs(folder, batches, device, dtype=torch.bfloat16)
        else:
            exact: dict[str, Side] = {
                "ours": Ours(folder, batches, device),
                "ours, checkpointing": Ours(folder, batches, device, checkpointing=True),
                "ours, padded rows": Ours(folder, batches, device, packing=False),
                "trl best": Theirs(folder, batches, device),
                "trl checkpointing": Theirs(folder, batches, device, checkpointing=True),
            }
            groups.insert(0, exact)
        kind = "chat lengths" if lengths == CHAT else "prompts 128-512, completions 32-256"
        return _measure(f"{shape}, K = 2, {kind}", shape, groups, batches, device)


def _lists(shape: str, k: int, ratio: str, lengths: tuple[int, int], device: torch.device) -> dict[str, object]:
    """One list a step; TRL gets all of its pairs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), shape)
        batches = [[random_list(shape, lengths[0], [lengths[1]] * k, seed)] for seed in range(2)]
        sides: dict[str, Side] = {
            "ours": Ours(folder, batches, device, dtype=dtype),
            "ours, padded rows": Ours(folder, batches, device, packing=False, dtype=dtype),
        }
        if ratio == "4:1":
            sides["trl best"] = Theirs(folder, batches, device, dtype=dtype)
        layers: dict[str, Side] = {
            "layers": Layers(folder, batches, device, dtype=dtype),
            "layers, padded rows": Layers(folder, batches, device, packing=False, dtype=dtype),
        }
        return _measure(f"{shape}, K = {k}, prompt:completion {ratio}", shape, [sides, layers], batches, device)


def _measure(
    name: str, shape: str, groups: Groups, batches: Sequence[list[Example]], device: torch.device
) -> dict[str, object]:
    """Time every side in turn, then memory; refuses losses that differ within a group."""
    sides = {label: side for group in groups for label, side in group.items()}
    tasks: dict[str, Task] = {label: side.step for label, side in sides.items()}
    results = alternate(tasks, ROUNDS, device)
    references = alternate({label: side.reference_pass for label, side in sides.items()}, 1, device)
    clock = "cpu_median_ms" if device.type == "cpu" else "median_ms"
    tokens = sum(packed_size(e) for batch in batches for e in batch) / len(batches)
    print(name)
    for group in groups:
        first = next(iter(group))
        for label, side in group.items():
            figures = results[label]
            figures["peak_bytes"] = peak_bytes(tasks[label], device)
            figures["allocated_bytes"] = allocated_bytes(tasks[label], device)
            figures["reference_ms"] = references[label][clock]
            figures["tokens_per_second"] = tokens / figures[clock] * 1e3
            figures["times_ours"] = figures[clock] / results[first][clock]
            one_epoch = [results[of][clock] + references[of][clock] for of in (label, first)]
            figures["times_ours_with_reference"] = one_epoch[0] / one_epoch[1]
            figures["loss_difference"] = _loss_difference(side, group[first])
            if label == first and type(side) is Ours:
                figures["gemm_floor_share"] = gemm_floor_ms(side.model, side.batches, side.dtype) / figures[clock]
            print("  " + label.ljust(26) + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    counted = _flop_ratios(shape, batches)
    print("  " + "  ".join(f"{k} {v:.3g}" for k, v in counted.items()))
    return {"name": name, "tokens": tokens, **counted, "implementations": results}


def _flop_ratios(shape: str, batches: Sequence[list[Example]]) -> dict[str, float]:
    """Operations of padded rows over those of packed ones."""
    examples = [e for batch in batches for e in batch]
    sizes = (SHAPES | GPU_SHAPES)[shape]

    def ratio(head: bool) -> float:
        padded, packed = (flops(sizes, examples, packed=packed, head=head) for packed in (False, True))
        return padded / packed

    return {"flop_ratio_layers": ratio(False), "flop_ratio_step": ratio(True)}


def _loss_difference(side: Side, ours: Side) -> float:
    steps = min(len(side.losses), len(ours.losses))
    difference = max(abs(a - b) for a, b in zip(side.losses[:steps], ours.losses[:steps], strict=True))
    if not difference <= TOLERANCE[side.dtype]:
        raise RuntimeError(f"losses differ by {difference:.2g}: {side.losses[:steps]} and {ours.losses[:steps]}")
    return difference
