"""T-REG and CHES on the shipped stories: what a step costs, what training reaches, what CHES foretells, and kills.

Run it in the project's root. The kills use public data and a model beside the checkout, and are left out without them.
"""

import gzip
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from align.bench.measure import Task, alternate, machine
from align.data import read_source
from align.data.steps import micro_batches
from align.evaluate.lists import evaluate_lists
from align.evaluate.rows import load_run, loss_of_run
from align.losses.metrics import list_metrics
from align.model.forward import TokenScorer
from align.model.policy import load_policy
from align.recipe import Recipe, load_recipe
from align.report.displacement import spearman
from align.runs.build import policy_loss, prepare
from align.training.annotate import annotate_lists, list_ches
from align.training.train import train

RECIPE = "recipes/treg.yaml"
DPO = ["objective={name: logistic}", "data.select=best_worst"]
CASES = {
    "DPO": [*DPO, "regularizer=null"],
    "DPO + T-REG": DPO,
    "LiPO-lambda": ["regularizer=null"],
    "LiPO-lambda + T-REG": [],
}
"""What is compared -> overrides of the recipe; the steps are the same."""
SHORT = ["sampling.prompts=100", "sampling.max_tokens=64"]
"""One epoch of the shipped lists of eight: 25 steps."""
HELD_OUT = 100
SEEDS = (0, 1, 2)
FIGURES = ("sample_reward", "ndcg", "likelihood_ndcg", "margin", "best_logprob_change", "best_fell_share")
ROUNDS = 7
LISTS = 4
"""Lists of a timed step."""
PAIRS = 64
"""Constructed pairs, trained on four a step."""
KILLS = 5
PUBLIC = Path("../shared/data")
PART_PER_BATCH = (
    "import sys; from align.model import reference; reference.SHARD_SECONDS = 0; from align.cli import main; "
    "main(sys.argv[1:])"
)
"""The align command, which writes a part of the cache after every batch."""
PUBLIC_ROWS = (("alpaca_eval2_listwise", 24), ("chat_pairs_demo/pairs.jsonl.gz", 40))
"""Data set and rows of it."""


def run() -> dict[str, Any]:
    """All parts."""
    torch.set_num_threads(1)
    parts = {"overhead": overhead, "ches": ches, "kills": kills, "stories": stories}
    results = {name: part() for name, part in parts.items()}
    return {"machine": machine(torch.device("cpu")), "date": time.strftime("%Y-%m-%d"), **results}


def overhead() -> dict[str, Any]:
    """A training step with and without the regularizer, token rewards and reference cached; in turn, on equal lists."""
    with tempfile.TemporaryDirectory() as folder:
        shared = [f"reference.cache_dir={folder}", f"data.limit={LISTS}", "sampling.prompts=0"]
        recipe = load_recipe(RECIPE, shared)
        policy = load_policy(recipe.policy)
        prepared = prepare(recipe)
        lists = annotate_lists(recipe, policy, prepared, reference=True, ches=False).train
        steps: dict[str, Task] = {
            name: _step(load_recipe(RECIPE, [*shared, *CASES[name]]), lists)
            for name in ("LiPO-lambda", "LiPO-lambda + T-REG")
        }
        times = alternate(steps, ROUNDS, torch.device("cpu"))
    base, ours = (times[name]["cpu_median_ms"] for name in steps)
    print(f"step {base:.0f} ms, with T-REG {ours:.0f} ms: {ours / base - 1:+.2%}")
    return {"steps": times, "ratio": ours / base}


def _step(recipe: Recipe, lists: Dataset) -> Task:
    """An optimizer step as AlignTrainer takes it."""
    policy = load_policy(recipe.policy)
    scorer, loss = TokenScorer(policy).train(), policy_loss(recipe)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-5)
    examples = lists.to_list()

    def step() -> None:
        for part in micro_batches(examples, tokens_per_batch=recipe.train.batch_tokens, packed=policy.packing):
            batch = policy.collate(part)
            stats = scorer(batch, ("logprob", "entropy"))
            losses = loss(stats, batch.reference_logprobs, batch)
            scores = loss.scores(stats, batch.reference_logprobs, batch).detach()
            list_metrics(batch, stats, batch.reference_logprobs, scores)
            (losses.sum() / len(examples)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stories() -> dict[str, Any]:
    """Four objectives, three seeds, equal steps: before and after on the held-out lists and sampled completions."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        heldout = Path(folder) / "heldout.jsonl"
        rows = gzip.decompress(Path("data/story-lists/heldout.jsonl.gz").read_bytes()).splitlines()[:HELD_OUT]
        heldout.write_bytes(b"\n".join(rows))
        for seed in SEEDS:
            for name, overrides in CASES.items():
                output = f"output={folder}/{len(results[name])}-{list(CASES).index(name)}"
                options = [
                    *SHORT,
                    *overrides,
                    f"train.seed={seed}",
                    output,
                    f"reference.cache_dir={folder}/cache",
                    f"data.eval_sources=[{heldout}]",
                ]
                summary = train(load_recipe(RECIPE, options)).summary
                kept = ("seed", "steps", "eval_before", "eval_after", "annotation", "displacement", "train_seconds")
                results[name].append({key: summary[key] for key in kept})
                print(name, seed, {key: round(summary["eval_after"][key], 4) for key in FIGURES}, flush=True)
    table = Table("", *FIGURES, title=f"before -> after, mean over {len(SEEDS)} seeds (spread of after)")
    for name, runs in results.items():
        table.add_row(
            name, *(_cell([r["eval_before"][k] for r in runs], [r["eval_after"][k] for r in runs]) for k in FIGURES)
        )
    Console(width=170).print(table)
    return results


def _cell(before: list[float], after: list[float]) -> str:
    spread = max(after) - min(after)
    return f"{statistics.mean(before):.3f} -> {statistics.mean(after):.3f} ({spread:.3f})"


def ches() -> dict[str, Any]:
    """Pairs whose sides are nearly the same, and pairs whose sides are other stories: does CHES know which will fall?

    One epoch of DPO on all; on the half with the lowest scores; on the half with the highest.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = list(_constructed())
        scored = _displacement(folder, "all", rows, [])
        order = np.argsort(scored["ches"])
        highest = [rows[i] for i in order[len(rows) // 2 :]]
        halves = {
            "lowest half": _displacement(folder, "lowest", rows, ["data.ches={keep_fraction: 0.5}"]),
            "highest half": _displacement(folder, "highest", highest, []),
        }
    near = np.array([row["meta"]["near"] for row in rows])
    found: dict[str, Any] = {
        "pairs": len(rows),
        "rank_correlation": spearman(scored["ches"], [-change for change in scored["changes"]]),
        "mean_ches": {kind: float(np.mean(np.array(scored["ches"])[near == side])) for kind, side in KINDS.items()},
        "mean_change_by_kind": {
            kind: float(np.mean(np.array(scored["changes"])[near == side])) for kind, side in KINDS.items()
        },
        "trained_on": {kind: _fall(part) for kind, part in {"all": scored, **halves}.items()},
    }
    print(json.dumps(found, indent=1))
    return found


KINDS = {"nearly the same": True, "other story": False}


def _constructed() -> Iterator[dict[str, Any]]:
    """A story against itself with two words exchanged, and against another story; every second row each."""
    generator = random.Random(0)
    for number, row in enumerate(read_source("data/story-lists/train.jsonl.gz", limit=PAIRS).rows):
        chosen, other = (str(text) for text in row.completions[:2])
        near = number % 2 == 0
        words = chosen.split(" ")
        for place in generator.sample(range(2, len(words)), 2) if near and len(words) > 4 else ():
            words[place] = generator.choice(words[1:])
        rejected = " ".join(words) if near else other
        if rejected != chosen:
            yield {"prompt": row.prompt, "chosen": chosen, "rejected": rejected, "meta": {"near": near}}


def _displacement(folder: Path, name: str, rows: list[dict[str, Any]], overrides: list[str]) -> dict[str, Any]:
    """One epoch of DPO on rows; CHES and the change of the chosen log-probability of all of them."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*CASES["DPO"], f"data.sources=[{path}]", "sampling={prompts: 0, token_lists: 0}", "train.seed=0"]
    options += ["train.lists_per_step=4", "data.eval_sources=[]", "data.eval_fraction=0"]
    options += ["data.limit=null", f"output={folder}/run-{name}", f"reference.cache_dir={folder}/cache"]
    recipe = load_recipe(RECIPE, [*options, *overrides])
    steps = train(recipe).summary["steps"]
    policy, _ = load_run(Path(recipe.output), None, "cpu")
    loss = loss_of_run(Path(recipe.output))
    prepared = prepare(recipe)
    lists = annotate_lists(recipe, policy, prepared, reference=True, ches=True).train
    changes: dict[int, float] = {}
    options_ = {"tokens_per_batch": recipe.train.tokens_per_batch, "accelerator": Accelerator(cpu=True)}
    evaluate_lists(TokenScorer(policy), policy, loss, lists, by_list={"best_logprob_change": changes}, **options_)
    scores = np.array(list_ches(lists))
    kept = (
        np.argsort(scores, kind="stable")[: round(len(scores) * (recipe.data.ches.keep_fraction or 1))]
        if (recipe.data.ches)
        else np.arange(len(scores))
    )
    ordered = [changes[i] for i in range(len(scores))]
    return {"ches": scores.tolist(), "changes": ordered, "trained": kept.tolist(), "steps": steps}


def _fall(part: dict[str, Any]) -> dict[str, float]:
    changes = np.array(part["changes"])[part["trained"]]
    return {
        "steps": part["steps"],
        "lists": len(changes),
        "mean_change": float(changes.mean()),
        "fell_share": float((changes < 0).mean()),
    }


def kills() -> dict[str, Any]:
    """`align annotate` on public data, killed at random moments: the cache in the end is that of an undisturbed run."""
    found: dict[str, Any] = {}
    for name, limit in PUBLIC_ROWS:
        if not (PUBLIC / name).exists():
            print(f"{PUBLIC / name} is not here: left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = [f"data.sources=[{PUBLIC / name}]", "data.eval_sources=[]", f"data.limit={limit}"]
            options += [f"policy.model={PUBLIC}/models/stories260k", "data.max_length=384"]
            options += ["policy.chat_template=plain", "token_rewards={name: contrast}"]
            options += ["train.tokens_per_batch=4096"]
            found[name] = _kill_and_compare(options, Path(folder))
            print(name, found[name])
    return found


def _kill_and_compare(options: list[str], folder: Path) -> dict[str, Any]:
    """Kills with SIGKILL at five random stages of the work, counted in parts of the cache."""

    def start(cache: str) -> subprocess.Popen:
        arguments = ["annotate", RECIPE, *options, f"reference.cache_dir={folder / cache}"]
        command = [sys.executable, "-c", PART_PER_BATCH, *arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def parts() -> int:
        return len(list((folder / "killed").rglob("*.safetensors")))

    if start("whole").wait():
        raise RuntimeError("align annotate failed")
    moments, stored = random.Random(0), []
    total = len(list((folder / "whole").rglob("*.safetensors")))
    for target in sorted(moments.sample(range(1, total), KILLS)):
        process = start("killed")
        while parts() < target and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        if process.wait() == 0:
            raise RuntimeError("it ended before it was killed")
        stored.append(len(_read(folder / "killed")))
    if start("killed").wait():
        raise RuntimeError("align annotate failed after a kill")
    whole, after = _read(folder / "whole"), _read(folder / "killed")
    same = whole.keys() == after.keys() and all(np.array_equal(whole[key], after[key]) for key in whole)
    return {"values": len(whole), "kills": len(stored), "values_after_each_kill": stored, "bit_for_bit_the_same": same}


def _read(cache: Path) -> dict[tuple[str, bytes], np.ndarray]:
    """Everything in a cache."""
    found: dict[tuple[str, bytes], np.ndarray] = {}
    for file in cache.rglob("*.safetensors"):
        tensors = load_file(file)
        values = np.split(tensors["values"], np.cumsum(tensors["sizes"])[:-1])
        found |= {(file.parent.name, key.tobytes()): own for key, own in zip(tensors["keys"], values, strict=True)}
    return found
