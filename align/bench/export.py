"""Exported = trained: each format and adapter kind, by the largest and mean difference of a token's log-probability."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align.bench.measure import machine
from align.errors import UserError
from align.export.export import FIGURES, export
from align.export.formats import FORMATS
from align.files import read_json
from align.recipe import load_recipe
from align.training.train import train

ADAPTERS = ("lora", "pissa", "dora", "full", "olora", "rslora", "eva", "adalora", "miss", "ia3")
STEPS, LISTS = 2, 4
ROWS = (("sources", "train", 8), ("eval_sources", "heldout", 4))
RECIPE = "recipes/lipo_lambda.yaml"
KEPT = (
    "max_logprob_difference",
    "mean_logprob_difference",
    "pair_accuracy_before",
    "pair_accuracy_after",
    "token_ids_equal",
    "tolerance",
    "engine",
    "lists",
    "tokens",
)


def run() -> list[dict[str, Any]]:
    """Train a run of a few steps with every adapter, and export each as everything.

    Returns:
        One entry for each adapter, format and what weights are stored in; `refused` says why there are no figures.
    """
    found: list[dict[str, Any]] = []
    for adapter in os.environ.get("ALIGN_BENCH_ADAPTERS", " ".join(ADAPTERS)).split():
        with tempfile.TemporaryDirectory() as folder:
            trained = _run(adapter, Path(folder))
            for name, dtype in _pairs():
                found.append({"adapter": adapter, "format": name, "dtype": dtype, **_one(trained, name, dtype)})
    _print(found)
    return [{"machine": machine(torch.device("cpu")), "steps": STEPS, "lists": LISTS}, *found]


def _print(found: list[dict[str, Any]]) -> None:
    table = Table("adapter", "format", "stored in", "largest", "mean", "pairs before", "pairs after")
    for one in found:
        figures = (
            [one["refused"].partition(";")[0]]
            if "refused" in one
            else [f"{one[f'{kind}_logprob_difference']:.1e}" for kind in ("max", "mean")]
            + [f"{one[f'pair_accuracy_{when}']:.3f}" for when in ("before", "after")]
        )
        table.add_row(one["adapter"], one["format"], one["dtype"], *figures)
    Console().print(table)


def _run(adapter: str, folder: Path) -> Path:
    rate = {"full": "1e-4", "ia3": "1e-2"}.get(adapter, "1e-3")
    rows = [f"data.{name}=[{{path: data/story-lists/{file}.jsonl.gz, limit: {limit}}}]" for name, file, limit in ROWS]
    given = [f"policy.adapter={{name: {adapter}}}", f"output={folder}/run", f"train.learning_rate={rate}", *rows]
    few = [f"train.steps={STEPS}", "train.lists_per_step=2", "sampling.prompts=0"]
    return train(load_recipe(RECIPE, [*given, *few])).path


def _pairs() -> Iterator[tuple[str, str]]:
    """Formats with what weights are stored in; of GGUF's many types three."""
    for name in FORMATS:
        every = FORMATS[name].stored_in
        kept = [one for one in every if name != "gguf" or one in ("float32", "bfloat16", "q8_0", "q4_k_m")]
        yield from ((name, dtype) for dtype in kept)


def _one(trained: Path, name: str, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        try:
            export(trained, out, to=name, dtype=dtype, lists=LISTS)
        except UserError as error:
            return {"refused": str(error)}
        figures = read_json(out / FIGURES)
    return {key: figures[key] for key in KEPT}
