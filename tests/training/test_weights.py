"""A row's `weight`: 2 is the row twice in the step, 0 is its absence; in every loss, gradient and figure."""

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import TrainerCallback

from align.data.audit import in_one_line
from align.errors import UserError
from align.evaluate.samples import Measured, paired_changes
from align.model.adapters import Lora
from align.model.config import PolicySection
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.model.reward import load_reward_model
from align.objectives import OBJECTIVES, PROPERTIES
from align.recipe import parse_recipe
from align.runs.build import loss_of, prepare
from align.runs.run_directory import RunDirectory
from align.training.arguments import training_arguments
from align.training.baseline import Baseline
from align.training.train import train
from align.training.trainer import AlignTrainer

SPEED = ("seconds", "lists_per_second", "completion_tokens_per_second", "crc32")
NAN = float("nan")
REWARD = {
    "bradley_terry": {"name": "bradley_terry", "strength": "scaled", "center": 0.1},
    "squared": {"name": "attributes"},
    "soft_bins": {"name": "attributes", "form": "soft_bins", "fidelity": 0.5},
    "list_mle": {"name": "list_mle"},
    "lambda": {"name": "lambda"},
}
MORE = {"balance": "more"}
SECTIONS = {
    **{name: {"objective": {"name": name}} for name in OBJECTIVES},
    "sft task": {"task": "sft"},
    "two objectives": {"objective": [{"name": "lambda", "weight": 0.7}, {"name": "sft", "weight": 0.3}]},
    "regularizer": {"objective": {"name": "lambda"}, "regularizer": {"name": "token_reg"}},
    "tgdpo": {"objective": {"name": "logistic"}, "token_weights": {"name": "tgdpo"}},
    "dpop": {"objective": {"name": "logistic"}, "dpop": 5.0},
    "wpo": {"objective": {"name": "logistic"}, "wpo": "clamped"},
    **{f"reward {name}": {"task": "reward", "objective": own} for name, own in REWARD.items()},
    "reward more": {"task": "reward", "objective": {"name": "bradley_terry"}, "reward": MORE},
}


class Gradients(TrainerCallback):
    """Keeps the step's."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def models(tiny_policy):
    """A policy that has left its reference, and a reward model, packed and padded; with their weights."""

    def moved(model):
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0.0, 0.2)
        return model, {name: p.detach().clone() for name, p in model.model.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    loaded = {}
    for packing in (True, False):
        how = (PolicySection(model=str(tiny_policy), adapter=Lora(rank=4, alpha=8)), LoadOptions(packing=packing))
        loaded["policy", packing] = moved(load_policy(*how))
        loaded["reward", packing] = moved(load_reward_model(*how, outputs=["reward"]))
    return loaded


def one_step(models, tmp_path, name, lists, *, packing, budget):
    """What the first step of these lists shows, and its gradients."""
    section = SECTIONS[name]
    sources = {"sources": ["a", "b"] if section.get("reward") else ["a"]}
    output = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    tree = {"output": str(output), "policy": {"model": "m"}, "data": sources}
    tree |= {"train": {"max_grad_norm": 0.0, "tokens_per_batch": budget}}
    recipe = parse_recipe(tree | section, origin="test")
    policy, start = models["reward" if recipe.task == "reward" else "policy", packing]
    policy.set_gradients = None
    for own, parameter in policy.model.named_parameters():
        if own in start:
            parameter.data.copy_(start[own])
    run = RunDirectory(recipe.output)
    run.open(recipe)
    arguments = training_arguments(recipe.train, checkpoints=run.checkpoints, run_name="test")
    arguments.max_steps, arguments.save_strategy = 1, "no"
    trainer = AlignTrainer(
        policy=policy,
        loss=loss_of(recipe),
        lists=Dataset.from_list(lists),
        plan=[list(range(len(lists)))],
        heldout=[],
        run=run,
        section=recipe.train,
        args=arguments,
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train_from(None, logging_steps=1)
    (line,) = map(json.loads, run.metrics.read_text().splitlines())
    return {key: value for key, value in line.items() if key not in SPEED}, gradients.found


def tokenised(name: str) -> list[dict]:
    """Five lists with all that any loss reads, as long as the objective takes them."""
    generator = torch.Generator().manual_seed(11)

    def draw(count: int, low: int = 3, high: int = 40) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    widest = PROPERTIES[name].max_list_size or 4 if name in PROPERTIES else 4
    lists = []
    for row in range(5):
        completions = [draw(n) for n in draw(2 + row % (widest - 1), 1, 7)]
        values = [[x / 40 - 0.5 for x in draw(len(ids))] for ids in completions]
        lists.append(
            {
                "id": str(row),
                "prompt_ids": draw(2 + row),
                "completion_ids": completions,
                "grades": [[0.75, 0.25, 1.0, 0.5][(k + row) % 4] for k in range(len(completions))],
                "token_rewards": values,
                "attributes": [[float(x)] for x in draw(len(completions), 1, 6)],
                "strength": 0.5 + row,
                "set": row % 2,
            }
        )
    return lists


@pytest.mark.parametrize("budget", [10**6, 60, 1], ids=["whole", "cut", "in parts"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", SECTIONS)
def test_a_row_of_weight_2_is_the_row_twice_in_the_step(models, tmp_path, monkeypatch, name, packing, budget):
    if (packing, budget) not in ((True, 60), (False, 60)) and name not in ("lambda", "kto", "regularizer", "sft"):
        pytest.skip("the cut of a step is the same for every loss")
    monkeypatch.setattr("align.data.steps.draw_key", lambda step, identity, repeat: int(identity))
    lists = tokenised(name)
    first, second, *others = lists
    weighted = [one | {"loss_weight": w} for one, w in zip(lists, (2.0, 3.0, 1.0, 1.0, 1.0), strict=True)]
    twice = [first, first, second, second, second, *others]
    options = {"packing": packing, "budget": budget}
    line, gradients = one_step(models, tmp_path, name, weighted, **options)
    other_line, other_gradients = one_step(models, tmp_path, name, twice, **options)
    assert line == pytest.approx(other_line, rel=1e-4, abs=1e-5)
    _, plain = one_step(models, tmp_path, name, lists, **options)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    change = max((gradients[key] - gradient).abs().max() for key, gradient in plain.items())
    assert change > 1e-3 * scale, "a weight changes the step"
    for key, gradient in gradients.items():
        assert_close(gradient, other_gradients[key], rtol=1e-4, atol=2e-5 * scale.item())


def test_ktos_baseline_counts_a_row_as_often_as_its_weight(models, tmp_path, monkeypatch):
    """sum w_i r_i / sum w_i, r_i the log-ratio of a prompt with the next other row's completion; here it is above 0."""
    found, real = [], Baseline.of_step
    monkeypatch.setattr(Baseline, "of_step", lambda self: found.append(real(self)) or found[-1])
    policy, start = models["policy", True]
    for name, parameter in policy.model.named_parameters():
        if name in start:
            parameter.data.copy_(start[name])
    scorer = policy.scorer()

    def ratios(prompt_ids: list[int], completions: list[list[int]]) -> torch.Tensor:
        batch = policy.collate([{"prompt_ids": prompt_ids, "completion_ids": completions, "grades": [0.0] * 37}])
        with torch.no_grad():
            own = scorer(batch).logprobs
            with policy.reference():
                return (own - scorer(batch).logprobs).sum(dim=1)

    every = [[token] * 3 for token in range(3, 40)]
    likely = ratios([5, 6], every).topk(5).indices.tolist()
    lists = [
        {"id": str(row), "prompt_ids": [5, 6, 7 + row], "completion_ids": [every[token]], "grades": [row % 2]}
        for row, token in enumerate(likely)
    ]
    counts = [3, 1, 2, 1, 1]
    weighted = [one | {"loss_weight": float(n)} for one, n in zip(lists, counts, strict=True)]
    repeated = [one for one, n in zip(lists, counts, strict=True) for _ in range(n)]
    pairs = zip(lists, [*lists[1:], lists[0]], counts, strict=True)
    terms = [n * ratios(a["prompt_ids"], b["completion_ids"] * 37)[0].item() for a, b, n in pairs]
    for own in (weighted, repeated, lists):
        one_step(models, tmp_path, "kto", own, packing=True, budget=10**6)
    assert found[0].item() == pytest.approx(sum(terms) / sum(counts), rel=1e-4) and found[0] > 0.1
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-4)
    assert abs(found[2] / found[0] - 1) > 1e-2


def test_only_the_ratio_of_weights_counts(models, tmp_path):
    """Down to weights that float32 does not hold."""
    lists = tokenised("lambda")
    found = []
    for unit in (1.0, 1e-3, 1e-300, 1e300):
        weighted = [one | {"loss_weight": unit * (1 + i)} for i, one in enumerate(lists)]
        found.append(one_step(models, tmp_path, "lambda", weighted, packing=True, budget=60))
    for line, gradients in found[1:]:
        assert line == pytest.approx(found[0][0], rel=1e-5, abs=1e-7)
        for key, gradient in gradients.items():
            assert_close(gradient, found[0][1][key], rtol=1e-5, atol=1e-7)


def rows(count: int, **columns) -> list[dict]:
    return [
        {
            "id": str(i),
            "prompt": f"w{10 + i} w4",
            "chosen": " w3" * (1 + i % 4),
            "rejected": f" w{5 + i % 3} w6",
            **{name: values[i] for name, values in columns.items()},
        }
        for i in range(count)
    ]


def write(path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_row_of_weight_0_is_absent_and_counted(make_recipe, tmp_path):
    """From training and from what is held out; a null is no weight."""
    weights = [0, 1.5, 2.5, 0.0, None, 4, 0, 3, 0.5, 2]
    lines = rows(10, weight=weights)
    sources = {"sources": [write(tmp_path / "all.jsonl", lines)], "eval_fraction": 0.3}
    kept = [line for line in lines if line["weight"] != 0]
    alone = {"sources": [write(tmp_path / "kept.jsonl", kept)], "eval_fraction": 0.3}
    found, expected = (prepare(make_recipe(data=data)) for data in (sources, alone))
    for part in ("train", "heldout"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        for name in ("id", "completion_ids", "prompt_ids"):
            assert ours[name][:] == theirs[name][:]
        stated = {line["id"]: 1.0 if line["weight"] is None else line["weight"] for line in kept}
        if "loss_weight" in ours.column_names:
            assert ours["loss_weight"][:] == theirs["loss_weight"][:] == [stated[i] for i in ours["id"]]
    assert "loss_weight" in found.train.column_names
    assert found.audit.refused == {"weight 0": 3} and found.audit.read == 10
    assert found.audit.weighted == 6, "a null is no weight"
    assert "6 rows with a weight of their own" in in_one_line(found.audit)


@pytest.mark.parametrize("objective", ["kto", "lambda"])
def test_a_run_does_not_know_of_rows_of_weight_0(make_recipe, tmp_path, objective):
    lines = rows(12, weight=[i % 3 for i in range(12)])
    found = []
    for name, own in (("all", lines), ("kept", [line for line in lines if line["weight"]])):
        data = {"sources": [write(tmp_path / f"{name}.jsonl", own)]}
        found.append(train(make_recipe(name, data=data, objective={"name": objective})))
    one, two = (load_file(result.path / "adapter" / "adapter_model.safetensors") for result in found)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert found[0].summary["eval_after"] == found[1].summary["eval_after"]


def test_without_weights_there_is_no_column(make_recipe, tmp_path):
    """Also where every row says 1."""
    for name, own in (("none", rows(6)), ("ones", rows(6, weight=[1] * 6))):
        prepared = prepare(make_recipe(data={"sources": [write(tmp_path / f"{name}.jsonl", own)]}))
        assert not {"loss_weight", "margin"} & {*prepared.train.column_names, *prepared.heldout.column_names}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "field weight: -1 is below 0; give 0 or more"),
        ("2", "field weight: text, not a number; give a finite number"),
        (True, "field weight: a boolean, not a number"),
        ([1, 2], "field weight: a list, not a number"),
        (10**400, "field weight: a number beyond float64"),
    ],
)
def test_what_is_no_weight_is_refused_with_its_row(make_recipe, tmp_path, value, message):
    lines = rows(6, weight=[1, value, 1, 1, 1, 1])
    with pytest.raises(UserError, match=f"rows.jsonl, row 2, {message}.*data.ignore=\\[weight\\]"):
        prepare(make_recipe(data={"sources": [write(tmp_path / "rows.jsonl", lines)]}))


def test_a_data_set_of_zeros_is_refused(make_recipe, tmp_path):
    zeros, some = write(tmp_path / "zeros.jsonl", rows(4, weight=[0] * 4)), write(tmp_path / "some.jsonl", rows(6))
    for data in ({"sources": [zeros]}, {"sources": [some, zeros]}, {"sources": [some], "eval_sources": [zeros]}):
        with pytest.raises(UserError, match="zeros.jsonl: every row has a `weight` of 0"):
            prepare(make_recipe(data=data))


def test_held_out_figures_count_a_list_as_often_as_its_weight(make_recipe, tmp_path):
    """Weight 3 is the row three times, before training and after."""
    training = {"sources": [write(tmp_path / "train.jsonl", rows(6))]}
    heldout = [line | {"prompt": f"w4 {line['prompt']}"} for line in rows(5)]
    weighted = [line | {"weight": 3} if line["id"] == "1" else line for line in heldout]
    thrice = [line for line in heldout for _ in range(3 if line["id"] == "1" else 1)]
    found = []
    for name, own in (("weighted", weighted), ("thrice", thrice), ("once", heldout)):
        data = training | {"eval_sources": [write(tmp_path / f"{name}.jsonl", own)]}
        found.append(train(make_recipe(name, data=data, objective={"name": "logistic"})).summary)
    for when in ("eval_before", "eval_after"):
        ours, theirs = ({k: v for k, v in summary[when].items() if k != "sample_reward"} for summary in found[:2])
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert found[0]["eval_after"]["loss"] != pytest.approx(found[2]["eval_after"]["loss"], abs=1e-6)
    change = found[0]["eval_change"]["likelihood_ndcg"]["difference"]
    assert change == pytest.approx(
        found[0]["eval_after"]["likelihood_ndcg"] - found[0]["eval_before"]["likelihood_ndcg"], abs=1e-6
    )


def test_the_error_of_a_weighted_change():
    """m = sum w d / sum w; sqrt(n / (n - 1) sum (w (d - m))^2) / sum w; with equal weights that of a plain mean."""
    before, after = (Measured({}, [], [], by_list={"ndcg": own}) for own in ([0.0] * 4, [0.1, 0.5, NAN, 0.3]))
    found = paired_changes(before, after, [1.0, 2.0, 9.0, 1.0])["ndcg"]
    gaps, weights = [0.1, 0.5, 0.3], [1.0, 2.0, 1.0]
    mean = sum(w * d for w, d in zip(weights, gaps, strict=True)) / 4
    spread = sum((w * (d - mean)) ** 2 for w, d in zip(weights, gaps, strict=True))
    assert found == {
        "difference": pytest.approx(mean),
        "standard_error": pytest.approx(math.sqrt(3 / 2 * spread) / 4),
        "lists": 3,
    }
    assert paired_changes(before, after, [2.0] * 4)["ndcg"] == pytest.approx(paired_changes(before, after)["ndcg"])
