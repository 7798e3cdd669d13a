"""Passes of layers other than full attention over packed rows: what is shared in them, against padded rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers as t

from align.bench.measure import Task, allocated_bytes, alternate, machine
from align.bench.sharing import PATTERNS
from align.model.forward import score_tokens
from align.model.load import choose_attention
from align.model.packing import enable_packing
from align.packing import attention, packed_collate, states
from align.packing.batch import Example, collate
from align.types import ListBatch
from rewards.logits import decoder_of

ROUNDS = 3
TOLERANCE = 1e-3
"""Nats by which the mean log-probability of two ways may differ."""
SHAPE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 256, "num_hidden_layers": 2, "pad_token_id": 0}
WITH_ATTENTION = SHAPE | {"intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 4}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MODELS = {
    "Mamba 2": lambda: t.Mamba2Config(**SHAPE, state_size=32, num_heads=8, head_dim=64, n_groups=1, chunk_size=64),
    "Qwen3.5": lambda: t.Qwen3_5TextConfig(
        **WITH_ATTENTION, **DELTA, head_dim=64, layer_types=["linear_attention", "full_attention"]
    ),
    "LFM2": lambda: t.Lfm2Config(**WITH_ATTENTION, layer_types=["conv", "full_attention"]),
    "Mamba": lambda: t.MambaConfig(**SHAPE, state_size=8),
}
WINDOW = 512
ATTENDING = {
    f"Mistral, window {WINDOW}": lambda: t.MistralConfig(**WITH_ATTENTION, sliding_window=WINDOW),
    f"Gemma 2, soft-cap, window {WINDOW} in one of two layers": lambda: t.Gemma2Config(
        **WITH_ATTENTION, head_dim=64, sliding_window=WINDOW
    ),
}


def run() -> dict[str, object]:
    """One thread on a CPU; forward and backward pass in float32 for the gradients of all weights."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    cases = [_case(kind, config(), _tree(), "by sequence", _by_sequence) for kind, config in MODELS.items()]
    cases += [_case(kind, config(), _long(), "masks", _masks) for kind, config in ATTENDING.items()]
    about = {"machine": machine(device) | {"transformers": t.__version__}, "date": str(date.today()), "rounds": ROUNDS}
    return about | {"cases": cases}


@contextmanager
def _by_sequence() -> Iterator[None]:
    with patch.object(states, "fork", lambda module: False):
        yield


@contextmanager
def _masks() -> Iterator[None]:
    with patch.object(attention, "_takes_parts", lambda *_: False):
        yield


def _tree() -> list[Example]:
    """16 leaves of a binary search tree, 32 tokens an edge, behind a prompt of 128."""
    return PATTERNS["16 leaves of a binary search tree, 32 tokens an edge"](torch.Generator().manual_seed(0))


def _long() -> list[Example]:
    """A prompt of 3,072 tokens with four completions of 256."""
    generator = torch.Generator().manual_seed(0)
    first, *others = (torch.randint(3, 32000, (n,), generator=generator).tolist() for n in (3072, *[256] * 4))
    return [{"prompt_ids": first, "completion_ids": others, "grades": [0.0] * 4}]


def _case(name: str, config: Any, lists: list[Example], other: str, otherwise: Any) -> dict[str, object]:
    torch.manual_seed(0)
    attending = choose_attention(Path(name), config, None)
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation=attending).train()
    if not enable_packing(model, name=name):
        raise RuntimeError(f"{name}: it does not pack")
    decoder = decoder_of(model)
    padded, packed = collate(lists, pad_id=0), packed_collate(lists)
    values: dict[str, float] = {}

    def side(label: str, batch: ListBatch) -> None:
        model.zero_grad()
        mean = score_tokens(model, batch).logprobs.sum() / batch.completion_mask.sum()
        mean.backward()
        values[label] = mean.item()

    def packed_otherwise() -> None:
        with otherwise():
            states.take_trees(decoder)
            side(other, packed)
        states.take_trees(decoder)

    tasks: dict[str, Task] = {
        "packed": lambda: side("packed", packed),
        f"packed, {other}": packed_otherwise,
        "padded rows": lambda: side("padded", padded),
    }
    results = alternate(tasks, ROUNDS, torch.device("cpu"))
    for label, task in tasks.items():
        results[label]["allocated_bytes"] = allocated_bytes(task, torch.device("cpu"))
    if max(values.values()) - min(values.values()) > TOLERANCE:
        raise RuntimeError(f"{name}: results differ, {values}")
    tokens = {"padded rows": padded.input_ids.numel()}
    print(name, flush=True)
    for label, figures in results.items():
        figures["tokens"] = tokens.get(label, packed.input_ids.numel())
        figures["times_packed"] = figures["cpu_median_ms"] / results["packed"]["cpu_median_ms"]
        figures["times_memory"] = figures["allocated_bytes"] / results["packed"]["allocated_bytes"]
        print("  " + label.ljust(20) + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    return {"name": name, "implementations": results}
