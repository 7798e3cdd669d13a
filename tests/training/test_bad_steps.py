"""A step whose loss or gradient is no finite number: written out, its first layer named, refused or passed over."""

import json
import math
from pathlib import Path

import pytest
import torch
from equal_runs import TRAIN, assert_equal_runs
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.training.train import train
from align.training.trainer import AlignTrainer
from rewards.broken import broken_weights

FULL = {"policy": {"adapter": {"name": "full"}}, "reference": {"cache": False}}


def lines_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


class _Overflow(torch.autograd.Function):
    """Finite forwards; backwards what is wanted."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def breaks(monkeypatch, layer: str, *, at: int, backward: bool = False, only_in: torch.dtype | None = None) -> None:
    """From the step `at` on a layer gives, or hands back, what is not finite: in every pass, or in one precision."""
    step = AlignTrainer.training_step

    def hooked(self, *args, **kwargs):
        if self.state.global_step + 1 == at:
            (module,) = (m for n, m in self.policy.model.named_modules() if n.endswith(layer))

            def spoil(_, __, output):
                if only_in is not None and output.dtype != only_in:
                    return output
                return _Overflow.apply(output, math.inf) if backward else output * math.inf

            module.register_forward_hook(spoil)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AlignTrainer, "training_step", hooked)


OUTPUT = "the first output that is not finite is that of `model.layers.0.mlp`"
GRADIENT = "the first gradient that is not finite is that of the output of `model.layers.0.post_attention_layernorm`"


@pytest.mark.parametrize(
    ("backward", "said"),
    [
        (False, f"the loss is (nan|inf); {OUTPUT}"),
        (True, f"the loss is .*, the gradient's norm (nan|inf); {GRADIENT}"),
    ],
)
def test_a_bad_step_names_its_first_layer_and_writes_out_its_rows(make_recipe, rows_file, monkeypatch, backward, said):
    recipe = make_recipe(**FULL, train={"save_steps": 1})
    breaks(monkeypatch, "layers.0.mlp", at=3, backward=backward)
    run = Path(recipe.output)
    with pytest.raises(
        UserError, match=rf"^step 3: {said}, in float32; the step's lists are in {run}/bad_step.jsonl; lower train."
    ):
        train(recipe)
    written, given = lines_of(run, "bad_step.jsonl"), {row["id"]: row for row in map(json.loads, rows_file.open())}
    assert len(written) == 6 and all(line["step"] == 3 for line in written)
    for line in written:
        row = given[line["id"]]
        assert line["prompt"] == row["prompt"] and line["completions"] == row["completions"]
        assert line["source"] == str(rows_file)
        assert (line["loss"] is None) != backward
    monkeypatch.undo()
    assert train(recipe).summary["steps"] == 8, "the same command goes on from the checkpoint before"


def test_what_breaks_in_half_precision_alone_is_said(make_recipe, monkeypatch):
    recipe = make_recipe(**FULL, train={"precision": "bfloat16"})
    breaks(monkeypatch, "layers.0.mlp", at=2, only_in=torch.bfloat16)
    with pytest.raises(UserError, match="in bfloat16 the first output .*0.mlp`, in float32 all are: give"):
        train(recipe)


SKIP = {"on_bad_step": "skip", "save_steps": 2, "schedule": "constant", "warmup_ratio": 0.0}


@pytest.mark.parametrize("parts", [{}, {"tokens_per_batch": 26, "gradient_checkpointing": False}])
def test_a_step_that_is_passed_over_touches_neither_weights_nor_optimizer(make_recipe, monkeypatch, parts):
    """The run ends as one whose plan has not that step; it is counted, and its rows are written out."""
    optimizer = {"weight_decay": 0.1, "learning_rate": 1e-2}
    original, bad_rows = AlignTrainer.loss_of, []

    def spoiled(self, *args):
        loss = original(self, *args)
        return loss * math.nan if self.spoils and self.state.global_step + 1 == 3 else loss

    def start(self, *args, **kwargs):
        self.spoils = "skipping" in str(self.run.path)
        if not self.spoils:
            bad_rows.extend(self.plan.pop(2))
        return beginning(self, *args, **kwargs)

    beginning = AlignTrainer.train_from
    monkeypatch.setattr(AlignTrainer, "loss_of", spoiled)
    monkeypatch.setattr(AlignTrainer, "train_from", start)
    skipping = train(make_recipe("skipping", train=SKIP | optimizer | parts))
    monkeypatch.setattr("align.training.parts.fit_to_plan", _one_less)
    without = train(make_recipe("without", train=SKIP | optimizer | parts))
    assert skipping.summary["bad_steps"] == 1 and without.summary["bad_steps"] == 0
    one, other = (load_file(r.path / "adapter/adapter_model.safetensors") for r in (skipping, without))
    for name, weights in one.items():
        torch.testing.assert_close(weights, other[name], rtol=0, atol=0)
    kept, fewer = lines_of(skipping.path, "metrics.jsonl"), lines_of(without.path, "metrics.jsonl")
    assert [line["step"] for line in kept if "bad_step" in line] == [3]
    assert [line["loss"] for line in kept if "loss" in line] == [line["loss"] for line in fewer if "loss" in line]
    assert len(lines_of(skipping.path, "bad_step.jsonl")) == len(bad_rows) == 6


def _one_less(arguments, train, *, steps):
    from align.training.arguments import fit_to_plan

    fit_to_plan(arguments, train, steps=steps - 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_model_whose_weights_are_no_numbers_is_called_that(make_recipe, tiny_policy, rows_file, tmp_path, value):
    """Trained, or asked as a scorer."""
    model = tmp_path / "broken"
    model.mkdir()
    for file in tiny_policy.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    what = r"`model.layers.1.mlp.up_proj.weight`( holds no finite numbers \(1 of 384| is 3e\+38).*: the file is damaged"
    with pytest.raises(UserError, match=what):
        train(make_recipe(policy={"model": str(model)}))


def test_a_damaged_file_of_weights_is_called_that(make_recipe, tiny_policy, tmp_path):
    model = tmp_path / "damaged"
    model.mkdir()
    for file in tiny_policy.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    content = bytearray((model / "model.safetensors").read_bytes())
    content[20] ^= 0xFF
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"^{model} .*a file of its weights is damaged .*; fetch the model again"):
        train(make_recipe(policy={"model": str(model)}))


def test_weights_of_every_kind_are_looked_at():
    module = torch.nn.Linear(3, 3)
    module.register_buffer("counts", torch.tensor([1, 2]))
    assert broken_weights(module) == ""
    module.bias.data[1] = -math.inf
    assert "`bias` holds no finite numbers (1 of 3" in broken_weights(module)


@pytest.mark.parametrize("adapter", ["adalora"])
def test_what_cannot_be_passed_over_is_refused(make_recipe, adapter):
    with pytest.raises(UserError, match="train.on_bad_step: adalora ranks"):
        train(make_recipe(policy={"adapter": {"name": adapter, "rank": 2}}, train={"on_bad_step": "skip"}))


@pytest.mark.slow
def test_processes_agree_on_a_step_that_only_one_of_them_sees(make_setting, start_each, tmp_path):
    """A margin beyond float32 makes one list's loss infinite and leaves its gradient finite, so that no reduction of
    gradients tells the others."""
    rows = [{"prompt": f"w{10 + i}", "chosen": " w3" * (1 + i % 4), "rejected": " w5 w6"} for i in range(24)]
    rows[5]["margin"] = 1e39
    (tmp_path / "margin.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "objective": {"name": "logistic"},
        "data": {"sources": [str(tmp_path / "margin.jsonl")], "eval_fraction": 0},
    }
    sections = given | {"train": TRAIN | {"on_bad_step": "skip"}}
    one, two = make_setting("one", sections)[0], make_setting("two", sections)
    assert train(one).summary["bad_steps"] == 1
    start_each("train_each", two[1]).finish()
    assert_equal_runs(Path(one.output), Path(two[0].output))
    assert len(lines_of(Path(two[0].output), "bad_step.jsonl")) == 7
