"""Preparing rows, from a file to token ids cut at the boundary: ours beside what TRL's DPOTrainer does first.

Run it in the project's root. One process and one thread: TOKENIZERS_PARALLELISM is off on both sides. Cold is a fresh
cache each time (with datasets' caching off), cached is a second run on the same file with caching on. TRL checks no
row, counts nothing, and opens its cache without reading the file; ours knows the file by size and times, compares its
cache's digests, and has the audit from there. Tokens are those of the rows that are kept. The tokenizers library alone
reads the same texts, every one once, so that it is seen what the rest costs.
"""

import gzip
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import datasets
import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from align.bench.measure import Task, alternate, machine, peak_bytes
from align.data import Prepared, prepare_data
from align.data.config import DataSection, SourceSection
from align.data.encoding import CHUNK
from align.shipped import template_file

ROUNDS = 5
POLICY = "data/story-policy"
"""Its tokenizer makes the tokens of every case."""
LISTS = Path("data/story-lists")
CHAT = Path("../shared/data/chat_pairs_demo/pairs.jsonl.gz")
"""Real conversations (LLaMA-Factory's dpo_en_demo, 300 pairs), read in place."""
MAX_LENGTH = 1024
"""TRL's default."""
ALONE = "tokenizers alone"
FEW = 8
"""Rows of the warm-up before memory is measured."""
PACKAGES = ("trl", "transformers", "tokenizers", "datasets", "pyarrow")
CPU = torch.device("cpu")
Rows = list[dict[str, Any]]


def run() -> dict[str, Any]:
    """Pairs of the shipped lists and of conversations on both sides, whole lists on ours alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    lists = _read(LISTS / "train.jsonl.gz") + _read(LISTS / "heldout.jsonl.gz")
    cases: dict[str, tuple[Rows, bool]] = {"story pairs": (story_pairs(lists), True)}
    if CHAT.exists():
        chats = _read(CHAT)
        cases["chat_pairs_demo"] = ([_chat_pair(row) for row in chats], True)
        cases["their answers of several turns"] = (
            [_trajectory(row) for row in chats if len(row["messages"]) > 2],
            True,
        )
    else:
        print(f"chat_pairs_demo: left out, {CHAT} is not there")
    cases["story lists of 8"] = (lists, False)
    with TemporaryDirectory() as folder:
        results = {name: measure(rows, Path(folder) / name, beside=beside) for name, (rows, beside) in cases.items()}
    Console(width=140).print(_table(results))
    versions = {name: version(name) for name in PACKAGES}
    about = {"date": time.strftime("%Y-%m-%d"), "rounds": ROUNDS, "load": os.getloadavg()[0]}
    settings = {"tokenizer": POLICY, "max_length": MAX_LENGTH}
    return {"machine": machine(CPU) | versions, **about, **settings, "cases": results}


def measure(rows: Rows, folder: Path, *, beside: bool, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time and memory of preparing some rows, and whether both sides made the same of them.

    Args:
        rows: pairs of TRL's form with an `id`, or lists.
        folder: files and caches go there.
        beside: whether TRL prepares them too.
        rounds: of the alternation.

    Raises:
        ValueError: a row that both sides keep has other token ids on one of them.
    """
    folder.mkdir(parents=True)
    for name, part in (("rows", rows), ("few", rows[:FEW])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    tasks = _tasks(folder, "rows", beside)
    ours: Prepared = tasks["align"]()
    counts = {"rows": len(rows), "tokens": _tokens(ours.train)}
    checked = agreement(ours.train, tasks["trl"]()) if beside else {}
    library = _tokenizer().backend_tokenizer
    alone: dict[str, Callable[[], Any]] = {ALONE: partial(_tokenised, library, _texts(ours.train))}
    implementations: dict[str, dict[str, float]] = alternate(tasks | alone, rounds, CPU)
    for name, figures in implementations.items():
        for clock in ("median_ms", "cpu_median_ms"):
            kind = clock.removesuffix("median_ms")
            for unit in ("rows", "tokens"):
                figures[f"{kind}{unit}_per_second"] = counts[unit] / figures[clock] * 1e3
        if name in tasks:
            figures["peak_bytes"] = _apart(_peak, folder, name, beside)
    return {**counts, "refused": ours.audit.refused, **checked, "implementations": implementations}


def story_pairs(lists: Rows) -> Rows:
    """Each of a list's better four completions against each of its worse four; the same text twice is no pair."""
    pairs = []
    for row in lists:
        ranked = [text for _, text in sorted(zip(row["rewards"], row["completions"], strict=True), reverse=True)]
        both = [(chosen, rejected) for chosen in ranked[:4] for rejected in ranked[4:] if chosen != rejected]
        pairs += [
            {"id": f"{row['id']}/{n}", "prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
            for n, (chosen, rejected) in enumerate(both)
        ]
    return pairs


def agreement(ours: Dataset, theirs: Dataset) -> dict[str, int]:
    """How many rows both sides keep, each with the same token ids and the same boundary, and how many one alone does.

    TRL's collator cuts at `max_length`, so it is done here.

    Raises:
        ValueError: token ids differ.
    """
    mine = {e["id"]: [e["prompt_ids"], *e["completion_ids"]] for e in ours}
    others = {str(e["id"]): _cut(e) for e in theirs}
    both = mine.keys() & others.keys()
    different = sorted(name for name in both if mine[name] != others[name])
    if different:
        raise ValueError(f"token ids of {len(different)} rows differ from TRL's, the first is {different[0]}")
    return {
        "rows_equal": len(both),
        "completion_tokens_equal": sum(len(ids) for name in both for ids in mine[name][1:]),
        "rows_kept_by_align_alone": len(mine.keys() - both),
        "rows_kept_by_trl_alone": len(others.keys() - both),
    }


def _cut(example: dict[str, Any]) -> list[list[int]]:
    prompt = example["prompt_ids"]
    return [prompt, *(example[side][: MAX_LENGTH - len(prompt)] for side in ("chosen_ids", "rejected_ids"))]


def _tokens(lists: Dataset) -> int:
    """Of prompts, once each, and completions, as a trainer gets them."""
    return sum(len(e["prompt_ids"]) + sum(map(len, e["completion_ids"])) for e in lists)


def _texts(lists: Dataset) -> list[str]:
    """What was tokenised for the rows that are kept, every prompt and every prompt with a completion once."""
    ids = ([*e["prompt_ids"], *own] for e in lists for own in ([], *e["completion_ids"]))
    words = _tokenizer()
    return list(dict.fromkeys(str(words.decode(own)) for own in ids))


def _tokenised(words: Any, texts: list[str]) -> None:
    """The tokenizers library's own work on them: the floor of whoever gives it whole texts."""
    for start in range(0, len(texts), CHUNK):
        words.encode_batch_fast(texts[start : start + CHUNK], add_special_tokens=False)


def _tasks(folder: Path, name: str, beside: bool) -> dict[str, Callable[[], Any]]:
    file, words = folder / f"{name}.jsonl", _tokenizer()
    sides: dict[str, Callable[[], Any]] = {"align": partial(_ours, file, words)}
    if beside:
        sides["trl"] = partial(_theirs, file, words)
    tasks: dict[str, Callable[[], Any]] = {}
    for side, prepare in sides.items():
        tasks[side] = partial(_with_cache, None, prepare)
        tasks[f"{side}, cached"] = partial(_with_cache, folder / f"{side}-{name}", prepare)
    return tasks


def _tokenizer() -> PreTrainedTokenizerBase:
    words: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(POLICY)
    words.chat_template = template_file("plain").read_text(encoding="utf-8")
    return words


def _ours(file: Path, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    sources = (SourceSection(path=str(file)),)
    return prepare_data(DataSection(sources=sources, eval_fraction=0.0, max_length=MAX_LENGTH), tokenizer)


def _theirs(file: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The part of DPOTrainer's start that is about rows; it needs no model."""
    rows = load_dataset("json", data_files=str(file), split="train")
    trainer: Any = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    config = DPOConfig(output_dir="unused", max_length=MAX_LENGTH, use_cpu=True, bf16=False, report_to="none")
    prepared: Dataset = trainer._prepare_dataset(rows, tokenizer, config, "train")
    return prepared


def _with_cache(folder: Path | None, prepare: Callable[[], Any]) -> Any:
    """Run it with datasets' cache in a folder; with None without caching, in a folder that is gone afterwards."""
    datasets.disable_progress_bars()
    if folder is None:
        datasets.disable_caching()
    with TemporaryDirectory() as fresh, patch.object(datasets.config, "HF_DATASETS_CACHE", folder or Path(fresh)):
        result = prepare()
    datasets.enable_caching()
    return result


def _apart(function: Callable[..., int], *arguments: object) -> int:
    """A function's result from a process of its own, so that nothing was allocated there before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _peak(folder: Path, name: str, beside: bool) -> int:
    """How much a process grows, after a warm-up on a few rows."""
    torch.set_num_threads(1)
    _tasks(folder, "few", beside)[name]()
    task: Task = _tasks(folder, "rows", beside)[name]
    return peak_bytes(task, CPU)


def _read(file: Path) -> Rows:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _chat_pair(row: dict[str, Any]) -> dict[str, Any]:
    """As TRL wants it: answers are lists of one message."""
    sides = {side: [row[side]] for side in ("chosen", "rejected")}
    return {"id": row["id"], "prompt": row["messages"], **sides}


def _trajectory(row: dict[str, Any]) -> dict[str, Any]:
    """Likewise from its first question on, so that each answer is several messages."""
    first = next(k for k, message in enumerate(row["messages"]) if message["role"] == "user") + 1
    sides = {side: [*row["messages"][first:], row[side]] for side in ("chosen", "rejected")}
    return {"id": row["id"], "prompt": row["messages"][:first], **sides}


def _table(results: dict[str, dict[str, Any]]) -> Table:
    heads = ("processor ms, median", "wall ms, median", "rows/s", "tokens/s", "peak MiB")
    table = Table("", *heads, title="from a file to token ids; rates by processor time", title_justify="left")
    for case, result in results.items():
        table.add_section()
        for name, f in result["implementations"].items():
            rates = (f"{f[f'cpu_{unit}_per_second']:,.0f}" for unit in ("rows", "tokens"))
            times = (f"{f[clock]:.0f}" for clock in ("cpu_median_ms", "median_ms"))
            peak = f"{f['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in f else ""
            table.add_row(f"{case}: {name}", *times, *rates, peak)
    return table
