"""Scoring rows of mixed length, and lists that share their prompt, against loops over transformers' classifier."""

import random
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from align.bench.measure import alternate, machine
from rewards import load_scorer

ROUNDS = 3
LONGEST, ROWS, BATCH = 512, 64, 8
LISTS, K, PROMPT, COMPLETION = 8, 8, 200, 50
MODEL: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 688} | {
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "num_labels": 1,
    "pad_token_id": 0,
}
Rows = tuple[list[str], list[str]]


def run() -> dict[str, Any]:
    """Time everything in alternation; every way gives the same rewards to 1e-5."""
    with tempfile.TemporaryDirectory() as folder:
        path = _save(Path(folder))
        scorer = load_scorer({"model": path, "tokens_per_batch": BATCH * LONGEST, "device": "cpu"})
        loop = _Loop(path)
        mixed, lists = _mixed_rows(), _lists()
        tasks: dict[str, Callable[[], Any]] = {
            "mixed: align": lambda: scorer.score(*mixed),
            "mixed: loop": lambda: loop.score(*mixed, padding="longest"),
            "mixed: loop, padded to the maximum": lambda: loop.score(*mixed, padding="max_length"),
            "lists: align": lambda: scorer.score(*lists),
            "lists: align, prompts not shared": lambda: _unshared(scorer, lists),
            "lists: loop": lambda: loop.score(*lists, padding="longest"),
        }
        rewards = {name: torch.tensor(task()) for name, task in tasks.items()}
        for name, values in rewards.items():
            same = rewards[name.split(":")[0] + ": align"]
            torch.testing.assert_close(values, same, atol=1e-5, rtol=1e-5)
        times = alternate(tasks, ROUNDS, torch.device("cpu"))
    tokens = loop.tokens(*mixed)
    ratios = {name: _ratios(times, tokens, name) for name in ("median_ms", "cpu_median_ms")}
    _print(times, ratios)
    versions = {"transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}
    shape = {"rows": ROWS, "batch": BATCH, "longest": LONGEST, "lists": LISTS, "K": K}
    shape |= {"prompt": PROMPT, "completion": COMPLETION, "rounds": ROUNDS}
    return (
        {**machine(torch.device("cpu")), **versions, "model": MODEL, **shape}
        | {"tokens": tokens, "times": times}
        | {"ratios": ratios}
    )


class _Loop:
    """What one writes without us: batches in the order of the rows, padded, through transformers."""

    def __init__(self, path: str) -> None:
        self.model = LlamaForSequenceClassification.from_pretrained(path).eval()
        self.words = PreTrainedTokenizerFast.from_pretrained(path)

    @torch.inference_mode()
    def score(self, prompts: list[str], completions: list[str], *, padding: str) -> list[float]:
        texts = [a + b for a, b in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        for part in (texts[i : i + BATCH] for i in range(0, len(texts), BATCH)):
            batch = self.words(part, padding=padding, max_length=LONGEST, return_tensors="pt")
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            rewards += logits[:, 0].tolist()
        return rewards

    def tokens(self, prompts: list[str], completions: list[str]) -> dict[str, int]:
        """Real tokens, and those that the loop's padding makes of them."""
        sizes = [len(self.words(a + b)["input_ids"]) for a, b in zip(prompts, completions, strict=True)]
        batches = [sizes[i : i + BATCH] for i in range(0, len(sizes), BATCH)]
        padded = sum(max(batch) * len(batch) for batch in batches)
        return {"real": sum(sizes), "padded": padded, "padded to the maximum": LONGEST * len(sizes)}


def _unshared(scorer: Any, rows: Rows) -> list[float]:
    """Every completion as if its prompt were another one."""
    keys = count()
    with patch("rewards.sequence_classifier.text_key", lambda text: next(keys)):
        return list(scorer.score(*rows))


def _ratios(times: dict[str, dict[str, float]], tokens: dict[str, int], figure: str) -> dict[str, float]:
    """How many times faster, by a figure of the times."""

    def faster(kind: str, other: str) -> float:
        return times[f"{kind}: {other}"][figure] / times[f"{kind}: align"][figure]

    padding = tokens["padded"] / tokens["real"]
    return {
        "padded to real tokens": padding,
        "mixed rows, than the loop": faster("mixed", "loop"),
        "mixed rows, than the loop, share of the padding": faster("mixed", "loop") / padding,
        "mixed rows, than padding to the maximum": faster("mixed", "loop, padded to the maximum"),
        "lists, than prompts not shared": faster("lists", "align, prompts not shared"),
        "lists, than the loop": faster("lists", "loop"),
    }


def _save(folder: Path) -> str:
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**MODEL)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0} | {f"w{i}": i for i in range(1, 1000)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)
    return str(folder)


def _mixed_rows() -> Rows:
    """Texts of log-normal length, 16 to LONGEST tokens, as chat data have it."""
    draw = random.Random(0)
    sizes = [min(max(int(draw.lognormvariate(4.6, 0.8)), 16), LONGEST) for _ in range(ROWS)]
    return [_text(draw, size // 2) for size in sizes], [_text(draw, size - size // 2) for size in sizes]


def _lists() -> Rows:
    draw = random.Random(1)
    prompts = [_text(draw, PROMPT) for _ in range(LISTS)]
    return [p for p in prompts for _ in range(K)], [_text(draw, COMPLETION) for _ in range(LISTS * K)]


def _text(draw: random.Random, words: int) -> str:
    return "".join(f"w{draw.randint(1, 999)} " for _ in range(words))


def _print(times: dict[str, dict[str, float]], ratios: dict[str, dict[str, float]]) -> None:
    table = Table("", "wall ms, median", "processor ms, median", title="scoring")
    for name, figures in times.items():
        table.add_row(name, f"{figures['median_ms']:.0f}", f"{figures['cpu_median_ms']:.0f}")
    table.add_section()
    for name in ratios["median_ms"]:
        table.add_row(name, *(f"{ratios[figure][name]:.2f}" for figure in ("median_ms", "cpu_median_ms")))
    Console(width=120).print(table)
