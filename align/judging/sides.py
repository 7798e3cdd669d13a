"""The policies that are compared, and what each writes for every prompt."""

import importlib.util
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from align.data.config import SourceSection
from align.data.schema import Row
from align.errors import UserError
from align.evaluate.in_options import in_options
from align.files import read_json
from align.manifest import json_digest
from align.model.load import model_folder, positions
from align.recipe import Recipe, with_consent
from align.recipe.recipe import parse_recipe
from align.rollout.config import EngineConfig, RolloutSection, Transformers, Vllm
from align.rollout.journal import Line, read_lines
from align.rollout.prompts import read_prompts
from align.rollout.sample import Sampler
from align.runs.run_directory import RunDirectory
from rewards.files import file_digest

LONGEST = 1024
"""Tokens of prompt and completion of a model that is no run."""


@dataclass(frozen=True)
class Side:
    """One policy, or the rows' own completions."""

    name: str
    recipe: Recipe
    trained: Path | None
    """What it was trained to; None for a model as it is, and for what a run began with."""


@dataclass
class Written:
    """What a side has written, by the row's id."""

    name: str
    completions: dict[str, list[Any]]
    """Texts, or conversations of one message."""
    lines: dict[str, Line] = field(default_factory=dict)
    """With their tokens, as a rollout has them; none of the rows' own."""
    rows: dict[str, Row] = field(default_factory=dict)
    """The prompts."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Prompts that it was not asked, by reason."""

    @property
    def ended(self) -> float | None:
        """Share of completions that ended by themselves."""
        ends = [one for line in self.lines.values() for one in line["ended"]]
        return sum(ends) / len(ends) if ends else None


def is_run(place: str) -> bool:
    """Whether a run is there."""
    return (Path(place) / "recipe.yaml").is_file()


def read_side(name: str, *, source: SourceSection, limit: int | None, ignore: tuple[str, ...], **held: Any) -> Side:
    """A run, an adapter's folder, or a model, that is to answer the prompts of a source.

    Args:
        held: `trust_remote_code`, and `sampling`, `engine`, `seed` and `output` of the recipe.

    Raises:
        UserError: nothing that writes is there.
    """
    trusted = held.pop("trust_remote_code")
    if is_run(name):
        run = RunDirectory(Path(name))
        recipe = with_consent(run.read_recipe(), run.recipe, trust_remote_code=trusted, allow_code=None)
        if recipe.task == "reward":
            raise UserError(f"{name}: the run of a reward model, which writes nothing; name it in --judge")
        if not run.summary.exists():
            raise UserError(f"{name}: this run is not finished; let `align train` end it")
        return Side(name, _asking(recipe, source, limit, ignore, **held), Path(name))
    adapter = Path(name) / "adapter_config.json"
    own = {"model": name}
    if adapter.is_file():
        own = {"model": read_json(adapter)["base_model_name_or_path"], "start_adapter": name}
    table, _ = positions(own["model"], trust_remote_code=trusted)
    tree = {"task": "sft", "output": str(held["output"]), "policy": {**own, "trust_remote_code": trusted}}
    length = min(LONGEST, table or LONGEST)
    with in_options():
        recipe = parse_recipe(
            {**tree, "data": {"sources": [{"path": source.path}], "max_length": length}}, origin=f"{name}"
        )
    return Side(name, _asking(recipe, source, limit, ignore, **held), None)


def before(side: Side) -> Side:
    """What a run began with."""
    return Side("before", side.recipe, None)


def default_engine(name: str) -> EngineConfig:
    """The engine of that name; `auto` is vLLM where it is installed and there is a GPU, else transformers."""
    has_vllm = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
    return Vllm() if name == "vllm" or (name == "auto" and has_vllm) else Transformers()


def write(side: Side) -> Written:
    """Sample a side's completions; what is on disk already stays.

    Raises:
        UserError: its prompts, policy or engine cannot work.
    """
    with in_options():
        prompts = read_prompts(side.recipe)
    key = {
        "weights": _weights(side),
        "prompts": [[row.id, ids] for row, ids in zip(prompts.rows, prompts.ids, strict=True)],
        "ends": prompts.ends,
        "sampling": side.recipe.rollout.model_dump(mode="json"),
        "seed": side.recipe.train.seed,
        "dtype": side.recipe.policy.dtype,
    }
    folder = Path(side.recipe.output) / "samples" / json_digest(key)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(side.recipe, folder)
    try:
        sampler.sample(folder, prompts, seed=side.recipe.train.seed, trained=side.trained, version=0)
    finally:
        sampler.close()
        shutil.rmtree(folder / "weights", ignore_errors=True)
    lines = {line["id"]: line for line in read_lines(folder / "sampled.jsonl")}
    rows = {row.id: row for row in prompts.rows}
    texts = {name: line["completions"] for name, line in lines.items()}
    return Written(side.name, texts, lines, rows, prompts.left_out)


def _asking(
    recipe: Recipe,
    source: SourceSection,
    limit: int | None,
    ignore: tuple[str, ...],
    *,
    sampling: dict[str, Any],
    engine: EngineConfig,
    seed: int,
    output: Path,
) -> Recipe:
    """The recipe of a policy as that of a rollout of these prompts."""
    agreement = 0 if isinstance(engine, Transformers) else 4
    rollout = RolloutSection(**sampling, engine=engine, agreement_prompts=agreement)
    data = recipe.data.model_copy(update={"sources": (source,), "limit": limit, "ignore": ignore})
    train = recipe.train.model_copy(update={"seed": seed})
    return recipe.model_copy(update={"rollout": rollout, "data": data, "train": train, "output": str(output)})


def _weights(side: Side) -> list[str]:
    """What a side's weights are known by: digests of its files, or the commit of a hub model."""
    policy = side.recipe.policy
    base = model_folder(policy.model, policy.revision, trust_remote_code=policy.trust_remote_code)
    starts = [policy.start_run, policy.start_adapter, side.trained]
    folders = [Path(own).expanduser() for own in starts if own]
    found = []
    for folder in [base, *(own / "adapter" if is_run(str(own)) else own for own in folders)]:
        if folder.parent.name == "snapshots":
            found.append(f"{folder.parent.parent.name} {folder.name}")
        else:
            found += [file_digest(file) for file in sorted(folder.glob("*.safetensors"))]
    return found
