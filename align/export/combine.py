"""Several runs as one, or one taken further along its way: sums of what training changed, with no training."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import UserError
from align.export.trained import ADAPTER_FILE, Trained
from align.files import read_json, write_json
from align.model.load import model_folder, model_name
from align.progress import stage
from align.runs.digests import FILE as DIGESTS

CONFIG = "adapter_config.json"
NOT_LINEAR = ("use_dora", "rank_pattern", "alpha_pattern")
"""What a LoRA must not have: its update would be no product, or have another scale at each layer."""
RANKS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""Which dimension of a factor is the rank."""


@stage("combining")
def combine(runs: Sequence[Trained], folder: Path, *, extrapolate: float = 0.0) -> Trained:
    """The mean of what the runs changed, times 1 + `extrapolate`, as an adapter or a whole model.

    theta_0 + (1 + alpha) mean_i (theta_i - theta_0)

    LoRAs are put beside each other, so that the ranks add up and the sum is exact. Of whole models no more than the
    tensors of one file are held at a time.

    Args:
        runs: of one base; the first lends tokenizer, config and held-out lists.
        folder: where the result is put.
        extrapolate: alpha; 0 for the mean alone.

    Raises:
        UserError: they are not of one base or kind, or their sum is not one of the same kind.

    Source: averages: arXiv:2203.05482; extrapolation: ExPO, arXiv:2404.16792.
    """
    first = runs[0]
    for other in runs[1:]:
        if (other.base, other.revision, other.outputs) != (first.base, first.revision, first.outputs):
            what = "a whole model" if other.base is None else f"made for {other.base}"
            raise UserError(f"--average: {other.folder} is {what}, {first.folder} is not; average runs of one base")
    folder.mkdir()
    for file in first.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (DIGESTS, "README.md"):
            shutil.copy(file, folder)
    if first.base is None:
        _whole(runs, folder, extrapolate)
    else:
        _joined(runs, folder, extrapolate)
    return replace(first, folder=folder)


def _joined(runs: Sequence[Trained], folder: Path, extrapolate: float) -> None:
    """One LoRA whose factors are those of all."""
    if extrapolate and (start := runs[0].run["recipe"].get("policy", {}).get("start_adapter")):
        raise UserError(f"--extrapolate: {runs[0].folder} began as {start}; export that merged, and train on it")
    configs = [_linear(run.folder) for run in runs]
    tensors = [load_file(run.folder / ADAPTER_FILE) for run in runs]
    for run, own in zip(runs, tensors, strict=True):
        if own.keys() != tensors[0].keys():
            raise UserError(
                f"--average: {run.folder} and {runs[0].folder} adapt other modules; average runs that agree"
            )
    share = (1 + extrapolate) / len(runs)
    scales = [share * own["lora_alpha"] / own["r"] ** (0.5 if own.get("use_rslora") else 1) for own in configs]
    joined: dict[str, Tensor] = {}
    for name, value in tensors[0].items():
        factor = next((part for part in name.split(".") if part in RANKS), None)
        parts = [own[name] for own in tensors]
        if factor is None:
            joined[name] = _mean(parts, name, extrapolate)
            continue
        if factor.endswith("B"):
            parts = [(part.double() * scale).to(value.dtype) for part, scale in zip(parts, scales, strict=True)]
        joined[name] = torch.cat(parts, dim=RANKS[factor]).contiguous()
    with safe_open(runs[0].folder / ADAPTER_FILE, "pt") as stored:
        save_file(joined, folder / ADAPTER_FILE, metadata=stored.metadata() or {"format": "pt"})
    rank = sum(own["r"] for own in configs)
    write_json(folder / CONFIG, {**configs[0], "r": rank, "lora_alpha": rank, "use_rslora": False})


def _linear(folder: Path) -> dict[str, Any]:
    """The config of a LoRA whose update is a sum of products of one scale.

    Raises:
        UserError: it is none.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds no LoRA, whose updates alone add up; export it --to transformers before")
    if odd := [key for key in NOT_LINEAR if config.get(key)]:
        raise UserError(f"{folder}: a LoRA with {odd[0]} has no sum with others; export it --to transformers before")
    return dict(config)


def _mean(parts: Sequence[Tensor], name: str, extrapolate: float) -> Tensor:
    """Of what is trained as it is, beside the factors, such as a reward model's head."""
    if extrapolate:
        raise UserError(
            f"--extrapolate: nothing is known of {name} before training; export it --to transformers before"
        )
    return torch.stack([part.double() for part in parts]).mean(0).to(parts[0].dtype)


def _whole(runs: Sequence[Trained], folder: Path, extrapolate: float) -> None:
    """Whole models, file by file as the first has them."""
    with ExitStack() as opened:
        weights = [_weights(run.folder, opened) for run in runs]
        before = _weights(_start(runs[0]), opened) if extrapolate else None
        for file in sorted(runs[0].folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                names, metadata = list(stored.keys()), stored.metadata() or {"format": "pt"}
            save_file(
                {name: _sum(name, weights, before, extrapolate) for name in names},
                folder / file.name,
                metadata=metadata,
            )


def _sum(name: str, weights: Sequence[dict[str, Any]], before: dict[str, Any] | None, extrapolate: float) -> Tensor:
    own = [_tensor(every, name) for every in weights]
    mean = torch.stack([one.double() for one in own]).mean(0)
    if before is not None:
        mean += extrapolate * (mean - _tensor(before, name).double())
    return mean.to(own[0].dtype).contiguous()


def _tensor(weights: dict[str, Any], name: str) -> Tensor:
    if name not in weights:
        raise UserError(f"{weights['']}: has no {name}, so that it is another architecture; combine runs of one base")
    value: Tensor = weights[name].get_tensor(name)
    return value


def _weights(folder: Path, opened: ExitStack) -> dict[str, Any]:
    """The file that holds each tensor, by the tensor's name; the folder itself under no name."""
    found: dict[str, Any] = {"": folder}
    for file in sorted(folder.glob("*.safetensors")):
        stored = opened.enter_context(safe_open(file, "pt"))
        found |= dict.fromkeys(stored.keys(), stored)
    return found


def _start(trained: Trained) -> Path:
    """Where a whole model's training began.

    Raises:
        UserError: there is no run that says so.
    """
    policy = trained.run["recipe"].get("policy", {})
    if not policy:
        raise UserError(f"--extrapolate: {trained.folder} is of no run, so that its start is not known; give the run")
    return model_folder(model_name(policy["model"]), policy.get("revision"), trust_remote_code=False)
