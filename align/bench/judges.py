"""Whether intervals of win rates hold the truth, by simulation, and whether judges are right, where people judged.

The second part reads public data sets beside the checkout, `../shared/data`, and is left out where they are not.
"""

import gzip
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from align.bench.measure import machine
from align.data.schema import Row
from align.evaluate.winrate import length_controlled, length_feature
from align.judging.cases import Case
from align.judging.figures import label_figures
from align.judging.intervals import interval, of_standard_error
from align.judging.judges import Judge

SHARED = Path("../shared/data")
TRIALS = 1000
DRAWS = 1000
FITTED = 300
"""Trials of the length-controlled win rate, which is fitted eleven times in each."""
MODELS = SHARED / "models"
JUDGES = {
    "story scorer": "data/story-scorer",
    "stories3m, pairwise": f"{{name: judge, model: {MODELS}/stories3m, mode: pairwise}}",
}
PROMPTS = 150
"""Of a data set, at most."""
PAIRS = 2
"""Of a list, at most."""

Told = tuple[str, list[tuple[str, float]]]
"""A prompt, and its answers with what people gave them."""


def run() -> dict[str, Any]:
    """Both parts; run it in the project's root."""
    held = [*simulated(), *fitted()]
    _print("how often a 95 % interval holds the truth", held)
    studied = list(study()) if SHARED.is_dir() else []
    _print("judges on pairs that people judged", [_flat(own) for own in studied])
    return {
        "machine": machine(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
        "trials": TRIALS,
        "coverage": held,
        "judges": studied,
    }


def simulated() -> Iterator[dict[str, Any]]:
    """Coverage of the bootstrap's interval of a win rate, and of one that takes every comparison for a prompt.

    A prompt's chance of a win is drawn from a beta distribution with the true mean; a label is a win or a loss, or soft
    around the chance.
    """
    settings = [(g, k, p, soft) for g in (20, 50, 200, 800) for k in (1, 4) for p, soft in ((0.5, False), (0.7, True))]
    settings += [(50, 4, 0.9, False), (200, 4, 0.9, False), (20, 1, 0.9, False)]
    for prompts, samples, truth, soft in settings:
        generator = np.random.default_rng(0)
        own = apart = 0
        target = _soft_mean(truth) if soft else truth
        for trial in range(TRIALS):
            chance = generator.beta(2 * truth, 2 * (1 - truth), (prompts, 1))
            if soft:
                labels = np.clip(chance + generator.uniform(-0.1, 0.1, (prompts, samples)), 0, 1)
            else:
                labels = (generator.random((prompts, samples)) < chance).astype(float)
            found = interval(labels.mean(1).tolist(), seed=trial, bounds=(0, 1), draws=DRAWS)
            own += _holds(found, target)
            apart += _holds(of_standard_error(labels.mean(), labels.std(ddof=1) / labels.size**0.5, 10**6), target)
        yield {
            "figure": "win_rate",
            **{"prompts": prompts, "samples": samples, "truth": round(target, 4), "labels": "soft" if soft else "hard"},
            "coverage": own / TRIALS,
            "coverage_unclustered": apart / TRIALS,
        }


def fitted() -> Iterator[dict[str, Any]]:
    """Coverage at equal lengths, of labels that follow the model that is fitted, with a chance of each prompt's own."""
    for prompts, samples, strength in ((200, 1, 0.4), (200, 4, 0.4)):
        generator = np.random.default_rng(0)
        own = 0
        for _ in range(FITTED):
            lengths = generator.integers(50, 500, (2, prompts, samples)).astype(float)
            feature = length_feature(lengths[0].ravel(), lengths[1].ravel())
            odds = strength - feature.reshape(prompts, samples)
            labels = (generator.random((prompts, samples)) < 1 / (1 + np.exp(-odds))).astype(float)
            fit = length_controlled(labels.ravel(), feature, clusters=np.repeat(np.arange(prompts), samples))
            assert fit.standard_error is not None
            own += _holds(
                of_standard_error(fit.win_rate / 100, fit.standard_error / 100, prompts), 1 / (1 + np.exp(-strength))
            )
        figures = {"prompts": prompts, "samples": samples, "truth": round(float(1 / (1 + np.exp(-strength))), 4)}
        yield {"figure": "win_rate_lc", **figures, "labels": "hard", "coverage": own / FITTED}


def study() -> Iterator[dict[str, Any]]:
    """Every judge on every data set: agreement with people, calibration, and what its verdicts owe to the order."""
    every = {name: list(_cases(name, told)) for name, told in data_sets()}
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in JUDGES.items():
            judge = Judge(spec, Path(folder), None, allow_code=False)
            for data, cases in every.items():
                opinions = judge.opinions(cases)
                seen = [
                    [own.position for pair in case.labels if (own := said.of(pair)) and own.position is not None]
                    for case, said in zip(cases, opinions, strict=True)
                ]
                biases = [fmean(own) for own in seen if own]
                yield {
                    "judge": name,
                    "data": data,
                    "prompts": len(cases),
                    **(label_figures(cases, opinions, seed=0) or {}),
                    "position_bias": asdict(interval(biases, seed=0, bounds=(-0.5, 0.5))) if biases else None,
                }


def data_sets() -> Iterator[tuple[str, list[Told]]]:
    """The pairs and lists that people judged."""
    ranked = [
        (
            "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"]),
            [(i["text"], -i["rank"]) for i in row["items"]],
        )
        for row in _rows("oasst_ranked/lists.jsonl.gz")
    ]
    yield "oasst_ranked", ranked
    talks = [
        (row["dialogue"], [(item["text"], item["scores"]["overall"]) for item in row["items"]])
        for row in _rows("human_attributes/topical_chat_lists.jsonl.gz")
    ]
    yield "topical_chat", talks
    yield "ukp_convincing", [_pair(row) for row in _rows("ukp_convincing/pairs.jsonl.gz")]
    bench = list(_rows("llmbar_rm_bench/pairs.jsonl.gz"))
    for name, begins in (
        ("llmbar natural", "llmbar-natural"),
        ("llmbar adversarial", "llmbar-adver"),
        ("mt-bench", "x-mt"),
    ):
        yield name, [_pair(row) for row in bench if row["subset"].startswith(begins)]
    split = [
        (*(side.rpartition("\n\nAssistant:") for side in (row["chosen"], row["rejected"])),)
        for row in _rows("hh_harmless/pairs.jsonl.gz")
    ]
    yield "hh_harmless", [(a[0] + a[1], [(a[2], 1.0), (b[2], 0.0)]) for a, b in split if a[0] == b[0]]


def _cases(name: str, told: Sequence[Told]) -> Iterator[Case]:
    drawn = random.Random(0).sample(told, min(PROMPTS, len(told)))
    for number, (prompt, answers) in enumerate(drawn, start=1):
        texts = list(dict.fromkeys(text for text, _ in answers))
        better = [
            (texts.index(a), texts.index(b)) for a, own in answers for b, other in answers if own > other and a != b
        ]
        pairs = random.Random(number).sample(better, min(PAIRS, len(better)))
        if pairs:
            row = Row(f"{name} {number}", prompt, tuple(texts), None, None, {}, name, number)
            yield Case(row, {}, {}, pairs)


def _pair(row: dict[str, Any]) -> Told:
    return row["prompt"], [(row["chosen"], 1.0), (row["rejected"], 0.0)]


def _rows(place: str) -> Iterator[dict[str, Any]]:
    with gzip.open(SHARED / place, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _soft_mean(truth: float) -> float:
    """Of the clipped soft labels, by a sample that is large beside any of a trial."""
    generator = np.random.default_rng(1)
    chance = generator.beta(2 * truth, 2 * (1 - truth), 10**6)
    return float(np.clip(chance + generator.uniform(-0.1, 0.1, 10**6), 0, 1).mean())


def _holds(found: Any, truth: float) -> bool:
    return bool(found.low <= truth <= found.high)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    accuracy, bias = row["accuracy"], row["position_bias"]
    return {
        "judge": row["judge"],
        "data": row["data"],
        "pairs": row["pairs"],
        "accuracy": f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]",
        "longer wins": row["longer_wins"],
        "calibration error": row["calibration_error"],
        "position bias": "" if bias is None else f"{bias['mean']:+.3f}",
    }


def _print(title: str, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title, title_justify="left")
    for row in rows:
        values = (row.get(name, "") for name in names)
        table.add_row(*(f"{own:.3f}" if isinstance(own, float) else str(own) for own in values))
    Console(width=150).print(table)
