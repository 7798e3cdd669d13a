"""What a step cannot do without: matrix products, counted and timed."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from align.data.steps import packed_size
from align.model.forward import base_model
from align.packing.batch import Example

REPEATS = 5


def gemm_floor_ms(model: torch.nn.Module, batches: Sequence[list[Example]], dtype: torch.dtype) -> float:
    """Milliseconds of a step's matrix products at this machine's own rate for their shapes, mean over batches.

    Frozen layers take two products per token (forward and input gradient), the head two per completion token; the
    adapter's thin products, attention and everything elementwise are above the floor.
    """
    base = base_model(model)
    head: Any = base.get_output_embeddings()
    layers = [m for m in base.get_decoder().modules() if type(m) is torch.nn.Linear and min(m.weight.shape) > 64]
    total = 0.0
    times: dict[tuple[int, int, int], float] = {}
    for examples in batches:
        tokens = sum(map(packed_size, examples))
        completions = sum(len(ids) for e in examples for ids in e["completion_ids"])
        shapes = [(tokens, layer.weight.shape) for layer in layers] + [(completions, head.weight.shape)]
        for rows, (outputs, inputs) in shapes:
            key = rows, outputs, inputs
            if key not in times:
                times[key] = _two_products_ms(*key, dtype, head.weight.device)
            total += times[key]
    return total / len(batches)


def _two_products_ms(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> float:
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    samples = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        y = x @ weight.T
        y @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


def flops(shape: dict[str, Any], examples: Sequence[Example], *, packed: bool, head: bool) -> float:
    """Floating-point operations of forward and backward under a frozen base: products with weights, and attention."""
    hidden, layers, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    total = 0.0
    for example in examples:
        prompt, sizes = len(example["prompt_ids"]), [len(ids) for ids in example["completion_ids"]]
        if packed:
            tokens = packed_size(example)
            seen = prompt**2 / 2 + sum(size * prompt + size**2 / 2 for size in sizes)
        else:
            longest = prompt + max(sizes)
            tokens = len(sizes) * longest
            seen = len(sizes) * longest**2 / 2
        total += 4 * tokens * weights  # two operations per weight and token, forward and input gradient
        total += layers * 14 * hidden * seen  # two products forward, five backward
        if head:
            total += 4 * sum(sizes) * hidden * shape["vocab_size"]
    return total
