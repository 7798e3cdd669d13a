"""What the shipped quick start reaches: three objectives, three seeds, on the story lists."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align.bench.measure import machine
from align.recipe import load_recipe
from align.training.train import train

RECIPES = {
    "DPO, best against worst": ("recipes/dpo.yaml", []),
    "logistic, all pairs": ("recipes/lipo_lambda.yaml", ["objective={name: logistic}"]),
    "LiPO-lambda": ("recipes/lipo_lambda.yaml", []),
}
"""What is compared -> recipe and overrides."""
SEEDS = (0, 1, 2)
FIGURES = ("sample_reward", "ndcg", "kendall_tau", "pair_accuracy", "likelihood_ndcg", "best_fell_share")


def run() -> dict[str, Any]:
    """Train every recipe with every seed; run it in the project's root."""
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, overrides) in RECIPES.items():
            results[name] = []
            for seed in SEEDS:
                output = Path(folder) / f"{len(results)}-{seed}"
                began = time.monotonic()
                summary = train(load_recipe(path, [*overrides, f"train.seed={seed}", f"output={output}"])).summary
                kept = {key: summary[key] for key in ("seed", "eval_before", "eval_after", "train_seconds")}
                results[name].append(kept | {"wall_seconds": time.monotonic() - began})
    Console(width=150).print(_table(results))
    return {"machine": machine(torch.device("cpu")), "date": time.strftime("%Y-%m-%d"), "runs": results}


def _table(results: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("", *FIGURES, "seconds", title=f"before -> after, mean over {len(SEEDS)} seeds (spread of after)")
    for name, runs in results.items():
        cells = [_cell([r["eval_before"][key] for r in runs], [r["eval_after"][key] for r in runs]) for key in FIGURES]
        table.add_row(name, *cells, f"{statistics.mean(r['wall_seconds'] for r in runs):.0f}")
    return table


def _cell(before: list[float], after: list[float]) -> str:
    spread = max(after) - min(after)
    return f"{statistics.mean(before):.3f} -> {statistics.mean(after):.3f} ({spread:.3f})"
