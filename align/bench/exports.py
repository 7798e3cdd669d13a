"""Is every export what was trained: each adapter in each format, by how much log-probabilities differ.

Every adapter is trained for a few steps of the shipped quick start and exported to each format; the figures are those
that `align export` writes, after reading the export again with its engine. Each is written as it is found: begun again
with the same file, what that holds is kept, but for faults, which are tried once more.
"""

import io
import json
import logging
import shlex
import tempfile
from argparse import ArgumentParser
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from align.bench.adapters import RANK, sections
from align.bench.measure import machine
from align.errors import UserError
from align.export.export import FIGURES, export
from align.export.formats import FORMATS, check_format
from align.files import write_json
from align.recipe import load_recipe
from align.shipped import with_shipped_paths
from align.training.train import train

LISTS = 2
"""Held-out lists that an export is compared on."""
RECIPE = "recipes/lipo_lambda.yaml"
OVERRIDES = (
    *("train.steps=4", "train.lists_per_step=2", "data.limit=16", "sampling.prompts=0", "sampling.token_lists=0"),
    "data.eval_sources=[{path: data/story-lists/heldout.jsonl.gz, where: id < 'story/402'}]",
)
OWN = {
    "eva": ("data.limit=256",),  # on fewer lists its directions do not settle
    "loftq": ("policy.quantization=4bit",),
}
"""What adapters are trained with besides."""
STORED = {
    "peft": ("float32", "bfloat16"),
    "transformers": ("float32", "bfloat16"),
    "gguf": ("float32", "q8_0", "q4_k_m"),
    "lora-gguf": ("float32",),
}
"""What weights are stored in, of those formats that store them in several."""
LIBRARIES = ("transformers", "peft", "gguf", "llama-cpp-python", "bitsandbytes", "llmcompressor", "onnxruntime", "vllm")
KEPT = (
    *("engine", "lists", "completions", "tokens", "max_logprob_difference", "mean_logprob_difference", "tolerance"),
    *("pair_accuracy_by", "pair_accuracy_before", "pair_accuracy_after", "prompts_compared", "token_ids_equal"),
)
"""What is kept of an export's own record."""


@dataclass(frozen=True)
class Case:
    """One export: an adapter, a format and what weights are stored in."""

    adapter: str
    format: str
    dtype: str

    @property
    def said(self) -> dict[str, str]:
        return {"adapter": self.adapter, "format": self.format, "dtype": self.dtype}


def add_options(parser: ArgumentParser) -> None:
    """Which of all are made, by default all of them; and whether vLLM reads them again."""
    for name, choices in (("adapters", list(kinds())), ("formats", list(FORMATS))):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices, metavar=name[:-1].upper())
    parser.add_argument("--engine", choices=("vllm",))


def kinds() -> dict[str, dict[str, Any]]:
    """Every adapter that trains here, as a recipe has it; LoftQ is on 4-bit weights."""
    return {**sections(), "loftq": {"name": "loftq", "rank": RANK}}


def run(kept: Path, adapters: list[str], formats: list[str], engine: str | None = None) -> dict[str, Any]:
    """Make what the file does not hold yet; a table while it runs.

    Raises:
        UserError: a library that one of the formats needs is missing.
    """
    for name in formats:
        check_format(FORMATS[name], None)
    logging.getLogger("align").setLevel(logging.ERROR)
    rows = json.loads(kept.read_text(encoding="utf-8"))["exports"] if kept.exists() else []
    rows = [row for row in rows if "fault" not in row]
    done = {Case(row["adapter"], row["format"], row["dtype"]) for row in rows}
    for adapter in adapters:
        cases = [Case(adapter, name, dtype) for name in formats for dtype in _stored_in(name)]
        if not (left := [case for case in cases if case not in done]):
            continue
        with tempfile.TemporaryDirectory() as place:
            trained = _trained(Path(place), kinds()[adapter])
            for case in left:
                rows.append(case.said | _exported(trained, Path(place), case, engine))
                print(_line(rows[-1]), flush=True)
                write_json(kept, _result(rows), indent=1)
    return _result(rows)


def _stored_in(name: str) -> tuple[str, ...]:
    return STORED.get(name, FORMATS[name].stored_in)


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine": machine(torch.device("cpu")),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "run": f"align train {shlex.join((RECIPE, *OVERRIDES))}; rank {RANK} where there is one; "
        + "; ".join(f"{name}: {' '.join(own)}" for name, own in OWN.items()),
        "exports": rows,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _trained(folder: Path, section: dict[str, Any]) -> Path | str:
    """The run's folder, or why the adapter is not trained."""
    own = OWN.get(section["name"], ())
    given = (f"output={folder / 'run'}", f"policy.adapter={json.dumps(section)}", *OVERRIDES, *own)
    try:
        with redirect_stdout(io.StringIO()):
            return train(load_recipe(with_shipped_paths(RECIPE), list(given))).path
    except UserError as error:
        return str(error)


def _exported(run_folder: Path | str, place: Path, case: Case, engine: str | None) -> dict[str, Any]:
    """The figures of one export, with the sentence that refuses it, or the fault."""
    if isinstance(run_folder, str):
        return {"refused": run_folder}
    output = place / f"{case.format}-{case.dtype}"
    try:
        with redirect_stdout(io.StringIO()):
            export(run_folder, output, to=case.format, dtype=case.dtype, lists=LISTS, engine=engine)
    except UserError as error:
        return {"refused": str(error).replace(f"{place}/", "")}
    except Exception as error:  # the other exports go on, and this one is tried again
        return {"fault": f"{type(error).__name__}: {error}"}
    found = json.loads((output / FIGURES).read_text(encoding="utf-8"))
    return {key: found[key] for key in KEPT}


def _line(row: dict[str, Any]) -> str:
    start = f"{row['adapter']:16} {row['format']:12} {row['dtype']:9} "
    if why := row.get("refused") or row.get("fault"):
        return f"{start}{'refused' if 'refused' in row else 'FAULT'}: {why}"
    return (
        f"{start}{row['max_logprob_difference']:.1e} {row['mean_logprob_difference']:.1e} "
        f"{row['pair_accuracy_before']:.3f} {row['pair_accuracy_after']:.3f} {row['engine']}"
    )
