"""Intruder dimensions, stable rank and norms of what training did to a weight."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from align.export.weights import evaluate_weights, weight_figures
from align.training.train import train


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.double))[
        0
    ]


def test_a_planted_direction_is_the_intruder():
    """A weight of four directions; a fifth, orthogonal to their left sides, outweighs them."""
    u, v = orthogonal(12, 0), orthogonal(12, 1)
    start = u[:, :4] @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double()) @ v[:, :4].T
    start = start[:, :4] @ torch.eye(4).double()  # [12, 4], so that four left vectors are all there are
    new = torch.linalg.svd(start)[0][:, 7]  # orthogonal to each of them
    update = 50 * torch.outer(new, torch.tensor([0.5, 0.5, 0.5, 0.5]).double())
    planted = weight_figures(start, start + update, directions=3, similarity=0.6)
    assert planted["intruders"] == 1
    assert planted["update_norm"] == pytest.approx(50) and planted["spectral_norm"] == pytest.approx(50)
    assert planted["stable_rank"] == pytest.approx(1)
    assert planted["relative_norm"] == pytest.approx(50 / start.norm().item())
    grown = weight_figures(start, 3 * start, directions=4, similarity=0.6)
    assert grown["intruders"] == 0
    values = torch.linalg.svdvals(2 * start)
    assert grown["stable_rank"] == pytest.approx(((values**2).sum() / values[0] ** 2).item())
    assert weight_figures(start, start, directions=4, similarity=0.6)["stable_rank"] == 0


@pytest.mark.parametrize("adapter", [{"name": "dora", "rank": 2}, {"name": "full"}], ids=lambda own: own["name"])
def test_a_runs_table_is_of_the_weights_before_and_after(make_recipe, tmp_path, adapter, capsys):
    recipe = make_recipe(policy={"adapter": adapter}, train={"steps": 2}, sampling={"prompts": 0})
    run = train(recipe).path
    found = evaluate_weights(str(run), json_path=str(tmp_path / "weights.json"))
    base = AutoModelForCausalLM.from_pretrained(recipe.policy.model)
    before = {name: value.clone() for name, value in base.named_parameters()}
    if adapter["name"] == "full":
        after = AutoModelForCausalLM.from_pretrained(run / "adapter")
    else:
        after = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()
    name = "model.layers.0.self_attn.q_proj"
    moved = dict(after.named_parameters())[f"{name}.weight"] - before[f"{name}.weight"]
    own = {one["layer"]: one for one in found}[name]
    assert own["update_norm"] == pytest.approx(moved.detach().norm().item(), rel=1e-3)
    assert ("model.embed_tokens" in {one["layer"] for one in found}) == (adapter["name"] == "full")
    assert json.loads((tmp_path / "weights.json").read_text())["matrices"] == len(found)
    assert f"{len(found)} weights moved" in capsys.readouterr().out
