"""`align evaluate weights`: what training did to each layer's weight, by its singular vectors and norms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from align.errors import UserError
from align.export.merging import load_float32, merged_model
from align.export.trained import Trained, find_trained, read_tokenizer_of, source_of
from align.files import write_json
from align.model.load import model_folder
from align.progress import counted, progress
from align.tables import Table

COLUMNS = {
    "intruders": ("intruders", "{}"),
    "update_norm": ("norm", "{:.3g}"),
    "relative_norm": ("relative", "{:.1e}"),
    "spectral_norm": ("spectral", "{:.3g}"),
    "stable_rank": ("stable rank", "{:.1f}"),
}
"""What the table shows of a weight: its head, and how."""


@torch.no_grad()
def evaluate_weights(
    model: str,
    *,
    directions: int = 10,
    similarity: float = 0.6,
    json_path: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """A table of the matrices that training moved: how far, and how many new directions they got.

    Args:
        model: a run directory, or an adapter's folder.
        directions: of a trained weight, the leading singular vectors that are looked at.
        similarity: one is an intruder where its cosine with every singular vector of the start is below this.
        json_path: where every figure is written as well.
        trust_remote_code: run the code that the model comes with.

    Returns:
        One entry a matrix, with `layer` and the figures of `weight_figures`.

    Raises:
        UserError: nothing trained is there, or its start is gone.

    Source: ours
    """
    trained = find_trained(Path(model), trust_remote_code=trust_remote_code)
    begun = load_float32(_start(trained), replace(trained, base=None))
    start = {name: value for name, value in begun.named_parameters() if value.dim() == 2}
    merged = merged_model(trained, read_tokenizer_of(trained))[0]
    after = {name: value for name, value in merged.named_parameters() if name in start}
    moved = [name for name, value in after.items() if not torch.equal(value, start[name])]
    found: list[dict[str, Any]] = []
    with progress("comparing weights", len(moved), unit="matrices") as advance:
        for name in moved:
            figures = weight_figures(start[name], after[name], directions=directions, similarity=similarity)
            found.append({"layer": name.removesuffix(".weight"), **figures})
            advance(1)
    (console or Console()).print(_table(found, similarity))
    if json_path:
        total = sum(own["intruders"] for own in found)
        write_json(Path(json_path), {"model": model, "matrices": len(found), "intruders": total, "by_layer": found})
    return found


def _start(trained: Trained) -> Path:
    """The folder of the model that training began with."""
    if trained.base is not None:
        return source_of(trained)
    named = trained.run["recipe"].get("policy", {}).get("model")
    if named is None:
        raise UserError(f"{trained.folder}: a whole model, and no recipe says what it was before; give a run directory")
    return model_folder(named, trained.run["recipe"]["policy"].get("revision"))


def weight_figures(
    start: Float[Tensor, "O I"], after: Float[Tensor, "O I"], *, directions: int, similarity: float
) -> dict[str, float]:
    """How a trained weight differs from its start.

    Args:
        directions, similarity: as in `evaluate_weights`.

    Returns:
        `intruders`, the leading left singular vectors of `after` whose cosine with each of `start`'s is below the
        bound in absolute value; of the update `update_norm` (Frobenius), `relative_norm` (to the start's),
        `spectral_norm` and `stable_rank`, (Frobenius / spectral)^2, 0 of no update.

    Source: arXiv:2410.21228, algorithm 1.
    """
    old, new = torch.linalg.svd(start.double())[0], torch.linalg.svd(after.double())[0]
    old, new = old[:, : min(start.shape)], new[:, : min(directions, *after.shape)]
    update = (after - start).double()
    norm, spectral = update.norm().item(), torch.linalg.matrix_norm(update, 2).item()
    return {
        "intruders": int(((old.T @ new).abs().amax(0) < similarity).sum()),
        "update_norm": norm,
        "relative_norm": norm / start.double().norm().item(),
        "spectral_norm": spectral,
        "stable_rank": (norm / spectral) ** 2 if spectral else 0.0,
    }


def _table(found: list[dict[str, Any]], similarity: float) -> Table:
    total = sum(own["intruders"] for own in found)
    title = f"{counted(len(found), 'weight')} moved, {counted(total, 'intruder')} (cosine below {similarity:g})"
    table = Table("", *(head for head, _ in COLUMNS.values()), title=title, title_justify="left")
    for own in found:
        table.add_row(own["layer"], *(pattern.format(own[name]) for name, (_, pattern) in COLUMNS.items()))
    return table
