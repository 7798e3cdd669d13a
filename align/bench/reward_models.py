"""What small reward models reach on public human judgements: run it in the project's root, beside shared data.

Each run trains a story model of 3 M parameters, or an encoder of its size from random weights, for one or two minutes
on one CPU core. The length baseline stands beside every pair accuracy. Stopped, the benchmark goes on where it was.
"""

import gzip
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import processors
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from align.bench.measure import machine
from align.errors import UserError
from align.files import write_json
from align.recipe import parse_recipe
from align.report.displacement import spearman
from align.training.train import train
from rewards import load_scorer
from rewards.benchmarks import accuracy, length_figures, pair_margins

DATA = Path("../shared/data")
WORK = Path("runs/bench_reward_models")
"""Where the runs and their figures are kept."""
SEED = 0
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A data set as training and held-out rows, and how it is learnt."""

    train: Rows
    heldout: Rows
    objective: dict[str, Any]
    outputs: tuple[str, ...] = ("reward",)
    epochs: float = 1.0
    lists_per_step: int = 16
    max_length: int = 256


def run() -> dict[str, Any]:
    """Train and measure every task."""
    if not DATA.exists():
        raise UserError(f"{DATA}: no such folder; run the benchmark in the project's root, beside the shared data")
    results = {}
    for name, (make, model, rate) in _runs(_encoder(WORK / "encoder")).items():
        folder = WORK / name.replace(" ", "-")
        if not (folder / "figures.json").exists():
            write_json(folder / "figures.json", _measure(make(), model, rate, folder))
        results[name] = json.loads((folder / "figures.json").read_text())
        Console(width=120).print(_table(name, results[name]))
    return {"machine": machine(torch.device("cpu")), "date": time.strftime("%Y-%m-%d"), "runs": results}


def _runs(encoder: Path) -> dict[str, tuple[Callable[[], Task], Path, float]]:
    story = DATA / "models/stories3m"
    return {
        "sentence_polarity, stories3m": (_polarity, story, 5e-4),
        "human_attributes topical_chat, stories3m": (_topical_chat, story, 1e-3),
        "ukp_convincing, stories3m": (_ukp, story, 5e-4),
        "sentence_polarity, encoder from scratch": (_polarity, encoder, 1e-3),
        "human_attributes data2text, stories3m": (_data2text, story, 1e-3),
        "justeval_attributes, stories3m": (_justeval, story, 1e-3),
    }


def _measure(task: Task, model: Path, rate: float, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "task": "reward",
        "output": str(folder / "run"),
        "policy": {"model": str(model), "adapter": {"name": "full"}},
        "data": {
            "sources": [_write(folder / "train.jsonl", task.train)],
            "eval_fraction": 0.0,  # a scorer measures the held-out rows, as a user would
            "max_length": task.max_length,
        },
        "reward": {"outputs": task.outputs},
        "objective": task.objective,
        "train": {
            "learning_rate": rate,
            "epochs": task.epochs,
            "lists_per_step": task.lists_per_step,
            "threads": 1,
            "logging_steps": 20,
            "seed": SEED,
        },
    }
    summary = train(parse_recipe(tree, origin="reward_models")).summary
    merged = str(folder / "run" / "adapter")  # every weight was trained, so this is the whole classifier
    kept = {key: summary[key] for key in ("steps", "train_seconds")}
    counts = {"train_lists": summary["data"]["train_lists"], "heldout_lists": len(task.heldout)}
    settings = {"model": model.name, "learning_rate": rate, "epochs": task.epochs, "objective": task.objective}
    figures = _attributes(task, merged) if task.objective["name"] == "attributes" else _pairs(task, merged)
    return {**settings, **counts, **kept, "heldout": figures}


def _pairs(task: Task, model: str) -> dict[str, float]:
    """Accuracy of the held-out pairs, what it owes to length, and how well single rewards tell good from bad."""
    lists = [(row["prompt"], row["completions"], row["grades"]) for row in task.heldout]
    rewards = _score(model, None, lists)
    margins = [d for own, (_, _, grades) in zip(rewards, lists, strict=True) for d in pair_margins(own, grades)]
    gaps = [d for _, texts, grades in lists for d in pair_margins([float(len(t)) for t in texts], grades)]
    lengths = length_figures(margins, gaps)
    flat = [
        (r, g) for own, (_, _, grades) in zip(rewards, lists, strict=True) for r, g in zip(own, grades, strict=True)
    ]
    middle = float(np.median([r for r, _ in flat]))
    single = float(np.mean([(r > middle) == (g > 0) for r, g in flat]))
    return {"pairs": len(margins), "pair_accuracy": accuracy(margins), "above_median_is_better": single, **lengths}


def _attributes(task: Task, model: str) -> dict[str, Any]:
    """Pearson and Spearman correlation, and R2, of every attribute on the held-out completions."""
    figures = {}
    lists = [(row["prompt"], row["completions"], row["attributes"]) for row in task.heldout]
    for name in task.outputs:
        rewards = [r for own in _score(model, name, lists) for r in own]
        ratings = [a[name] for _, _, rated in lists for a in rated]
        known = [i for i, rating in enumerate(ratings) if rating is not None]
        x, y = np.array([rewards[i] for i in known]), np.array([float(ratings[i]) for i in known])
        figures[name] = {
            "count": len(known),
            "pearson": _correlation(x, y),
            "spearman": spearman(x, y),
            "r2": 1 - float(((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
        }
    return figures


def _score(model: str, label: str | None, lists: Sequence[tuple[str, list[str], Any]]) -> list[list[float]]:
    scorer = load_scorer({"model": model, "label": label, "max_length": 256})
    prompts = [prompt for prompt, texts, _ in lists for _ in texts]
    rewards = iter(scorer.score(prompts, [text for _, texts, _ in lists for text in texts]))
    return [[next(rewards) for _ in texts] for _, texts, _ in lists]


def _ukp() -> Task:
    """Three questions are held out whole, as the publication does with topics; 800 of their pairs are measured."""
    rows = _read("ukp_convincing/pairs.jsonl.gz")
    questions = sorted({row["question"] for row in rows})
    held = set(random.Random(SEED).sample(questions, 3))
    sides: dict[bool, Rows] = defaultdict(list)
    for row in rows:
        pair = [row["chosen"], row["rejected"]]
        sides[row["question"] in held].append({"prompt": row["prompt"] + "\n", "completions": pair, "grades": [1, 0]})
    random.Random(SEED).shuffle(sides[False])
    random.Random(SEED).shuffle(sides[True])
    return Task(sides[False], sides[True][:800], {"name": "bradley_terry", "center": 0.01}, max_length=160)


def _polarity() -> Task:
    """Lists of four positive and four negative sentences; the last 831 pairs are held out."""
    by_label: dict[int, list[str]] = defaultdict(list)
    for row in _read("sentence_polarity/sentences.jsonl.gz"):
        by_label[row["label"]].append(row["text"])
    good, bad = by_label[1], by_label[0]
    cut = len(good) - 831

    def lists(start: int, stop: int, size: int) -> Rows:
        return [
            {"prompt": "review:", "completions": [f" {t}" for t in good[i : i + size] + bad[i : i + size]],
             "grades": [1] * size + [0] * size}
            for i in range(start, stop, size)
        ]  # fmt: skip

    return Task(lists(0, cut, 4), lists(cut, len(good), 1), {"name": "bradley_terry", "center": 0.01}, epochs=2)


def _data2text() -> Task:
    names = ("informativeness", "naturalness", "overall")
    rows = [
        {"prompt": f"{row['source']}\n", "completions": [row["text"]], "attributes": [row["scores"]]}
        for row in _read("human_attributes/data2text.jsonl.gz")
    ]
    return Task(*_split(rows), {"name": "attributes"}, names, epochs=4)


def _topical_chat() -> Task:
    names = ("understandability", "naturalness", "coherence", "engagingness", "groundedness", "overall")
    rows = []
    for row in _read("human_attributes/topical_chat_lists.jsonl.gz"):
        texts, scores = [item["text"] for item in row["items"]], [item["scores"] for item in row["items"]]
        last = row["dialogue"].strip().splitlines()[-1]
        rows.append({"prompt": f"{last}\n", "completions": texts, "attributes": scores})
    return Task(*_split(rows), {"name": "attributes"}, names, epochs=8, lists_per_step=8)


def _justeval() -> Task:
    names = ("helpfulness", "clarity", "factuality", "depth", "engagement")
    rows = [
        {"prompt": f"{row['prompt']}\n", "completions": [row["response"]], "attributes": [row["scores"]]}
        for row in _read("justeval_attributes/attributes.jsonl.gz")
    ]
    return Task(*_split(rows), {"name": "attributes"}, names, epochs=4, max_length=448)


def _split(rows: Rows) -> tuple[Rows, Rows]:
    """A fifth of the prompts is held out."""
    prompts = sorted({row["prompt"] for row in rows})
    held = set(random.Random(SEED).sample(prompts, len(prompts) // 5))
    return [row for row in rows if row["prompt"] not in held], [row for row in rows if row["prompt"] in held]


def _encoder(folder: Path) -> Path:
    """A BERT of two layers with random weights, on the story model's tokens."""
    if (folder / "model.safetensors").exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models/stories3m")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=256, **special).save_pretrained(folder)
    torch.manual_seed(SEED)
    sizes: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    }
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id, **sizes
    )
    BertModel(config).save_pretrained(folder)
    return folder


def _read(name: str) -> Rows:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else math.nan


def _table(name: str, result: dict[str, Any]) -> Table:
    title = f"{name}: {result['steps']} steps in {result['train_seconds']:.0f} s"
    held = result["heldout"]
    if "pairs" in held:
        table = Table("held out", "", title=title, title_justify="left")
        for key, value in held.items():
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
        return table
    table = Table("attribute", "count", "Pearson", "Spearman", "R2", title=title, title_justify="left")
    for attribute, f in held.items():
        table.add_row(attribute, str(f["count"]), *(f"{f[key]:+.3f}" for key in ("pearson", "spearman", "r2")))
    return table
