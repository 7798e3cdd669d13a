"""Several runs as one, or one taken further along its way: sums of what training changed, with no training."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import UserError
from align.export.trained import ADAPTER_FILE, Trained
from align.files import read_json, write_json
from align.model.classifier import is_classifier, kept_outputs, output_names
from align.model.load import model_folder, model_name, read_config
from align.progress import stage
from align.runs.digests import FILE as DIGESTS

CONFIG = "adapter_config.json"
NOT_LINEAR = ("use_dora", "rank_pattern", "alpha_pattern")
"""What a LoRA must not have: its update would be no product, or have another scale at each layer."""
LAST = tuple(f"{layer}.{own}" for layer in ("score", "classifier", "classifier.out_proj") for own in ("weight", "bias"))
"""What of a reward model has a row for each output."""
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
    configs = [_linear(run.folder, "train a plain lora, or all weights" if extrapolate else WHOLE) for run in runs]
    tensors = [load_file(run.folder / ADAPTER_FILE) for run in runs]
    for run, own in zip(runs, tensors, strict=True):
        if own.keys() != tensors[0].keys():
            raise UserError(
                f"--average: {run.folder} and {runs[0].folder} adapt other modules; average runs of the same `targets`"
            )
    share = (1 + extrapolate) / len(runs)
    scales = [share * own["lora_alpha"] / own["r"] ** (0.5 if own.get("use_rslora") else 1) for own in configs]
    joined: dict[str, Tensor] = {}
    for name, value in tensors[0].items():
        factor = next((part for part in name.split(".") if part in RANKS), None)
        parts = [own[name] for own in tensors]
        if factor is None:
            with ExitStack() as opened:
                before = _Start.of(runs[0], opened) if extrapolate else None
                joined[name] = _sum(name.removeprefix("base_model.model."), parts, before, extrapolate)
            continue
        if factor.endswith("B"):
            parts = [(part.double() * scale).to(value.dtype) for part, scale in zip(parts, scales, strict=True)]
        joined[name] = torch.cat(parts, dim=RANKS[factor]).contiguous()
    with safe_open(runs[0].folder / ADAPTER_FILE, "pt") as stored:
        save_file(joined, folder / ADAPTER_FILE, metadata=stored.metadata() or {"format": "pt"})
    rank = sum(own["r"] for own in configs)
    write_json(folder / CONFIG, {**configs[0], "r": rank, "lora_alpha": rank, "use_rslora": False})


ONE_KIND = "average runs of one base and one architecture"
WHOLE = "export it --to transformers before"


def _linear(folder: Path, remedy: str) -> dict[str, Any]:
    """The config of a LoRA whose update is a sum of products of one scale.

    Raises:
        UserError: it is none.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds no LoRA, whose updates alone add up; {remedy}")
    if odd := [key for key in NOT_LINEAR if config.get(key)]:
        raise UserError(f"{folder}: a LoRA with {odd[0]} does not add up; {remedy}")
    return dict(config)


def _whole(runs: Sequence[Trained], folder: Path, extrapolate: float) -> None:
    """Whole models, file by file as the first has them."""
    with ExitStack() as opened:
        weights = [_weights(run.folder, opened) for run in runs]
        for run, own in zip(runs, weights, strict=True):
            if own.keys() != weights[0].keys():
                odd = min(own.keys() ^ weights[0].keys())
                raise UserError(f"--average: of {run.folder} and {runs[0].folder} one alone has {odd}; {ONE_KIND}")
        before = _Start.of(runs[0], opened) if extrapolate else None
        for file in sorted(runs[0].folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                names, metadata = list(stored.keys()), stored.metadata() or {"format": "pt"}
            save_file(
                {name: _sum(name, [_tensor(own, name) for own in weights], before, extrapolate) for name in names},
                folder / file.name,
                metadata=metadata,
            )


def _sum(name: str, parts: Sequence[Tensor], before: "_Start | None", extrapolate: float) -> Tensor:
    """Of a tensor that is trained as it is; beside the factors of a LoRA that is a reward model's head."""
    if len({part.shape for part in parts}) > 1:
        raise UserError(f"--average: {name} has other sizes in one of the runs; {ONE_KIND}")
    mean = torch.stack([part.double() for part in parts]).mean(0)
    if before is not None:
        mean += extrapolate * (mean - before.tensor(name).double())
    return mean.to(parts[0].dtype).contiguous()


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


@dataclass(frozen=True)
class _Start:
    """The model that a run's training began with."""

    weights: dict[str, Any]
    kept: list[int]
    """Which of its outputs the run's reward model has; none for a language model."""

    @classmethod
    def of(cls, trained: Trained, opened: ExitStack) -> "_Start":
        """
        Raises:
            UserError: no run says what it was, or it had no head.
        """
        policy = trained.run["recipe"].get("policy", {})
        if not policy:
            raise UserError(
                f"--extrapolate: {trained.folder} is of no run, so that its start is not known; give the run"
            )
        name, trusted = model_name(policy["model"]), trained.trust_remote_code
        folder = model_folder(name, policy.get("revision"), trust_remote_code=trusted)
        if not trained.outputs:
            return cls(_weights(folder, opened), [])
        config = read_config(folder, trust_remote_code=trusted)
        if not is_classifier(config):
            raise UserError(
                f"--extrapolate: {name} has no head, so that the one of {trained.folder} began with chance weights, "
                "which nothing is gained by going away from; extrapolate a run that began from a reward model"
            )
        return cls(_weights(folder, opened), kept_outputs(folder, output_names(config), trained.outputs))

    def tensor(self, name: str) -> Tensor:
        value = _tensor(self.weights, name)
        return value[self.kept] if name in LAST and self.kept else value
