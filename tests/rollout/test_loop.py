"""The loop: its iterations are ordinary runs on rows, each from where the last one ended."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import align
from align.errors import UserError
from align.recipe import dump_recipe, load_recipe
from align.report.summary import print_summary
from align.rollout import sample
from align.rollout.journal import read_lines
from align.rollout.sample import load_trained, policy_version
from align.runs.run_directory import RunDirectory
from align.training.online import iteration_recipe
from align.training.train import train
from align.training.trainer import AlignTrainer

ADAPTER = Path("adapter", "adapter_model.safetensors")


def contents(run: Path) -> list:
    """What a run has made: its adapter and its rows, to the last digit."""
    rows = [line for i in (1, 2) for line in read_lines(run / f"iterations/00{i}/rows.jsonl")]
    return [(run / ADAPTER).read_bytes(), *rows]


def test_what_a_run_leaves(whole):
    summary = json.loads((whole / "summary.json").read_text())
    inner = [json.loads((whole / f"iterations/00{i}/train/summary.json").read_text()) for i in (1, 2)]
    assert summary["steps"] == sum(one["steps"] for one in inner) > 0
    assert summary["eval_before"] == inner[0]["eval_before"] and summary["eval_after"] == inner[1]["eval_after"]
    lines = [list(read_lines(whole / f"iterations/00{i}/rows.jsonl")) for i in (1, 2)]
    versions = [{line["policy_version"] for line in own} for own in lines]
    assert versions == [{0}, {inner[0]["steps"]}] == [{one["policy_version"]} for one in summary["iterations"]]
    assert {line["id"] for own in lines for line in own} == {f"p{i}" for i in range(12)}  # six of them, then the others
    assert [one["agreement"]["max"] < 1e-4 for one in summary["iterations"]] == [True, True]
    assert set(summary["iterations"][0]["seconds"]) == {"sync", "sample", "score", "train", "evaluate"}
    steps = [line["step"] for line in read_lines(whole / "metrics.jsonl")]
    assert steps == list(range(1, summary["steps"] + 1))
    assert (whole / ADAPTER).read_bytes() == (whole / "iterations/002/train" / ADAPTER).read_bytes()


def test_the_policy_that_samples_is_the_one_that_was_trained(whole, online_recipe):
    recipe = online_recipe()
    first, second = (load_recipe(whole / f"iterations/00{i}/train/recipe.yaml") for i in (1, 2))
    policy = load_trained(recipe, Path(first.output))
    adapter = load_file(Path(first.output) / "adapter" / "adapter_model.safetensors")
    for name, value in policy.model.named_parameters():
        if value.requires_grad:
            assert torch.equal(value, adapter[name.replace(".default", "")])
    assert second.policy.start_run == first.output and second.policy.start_adapter is None


def test_the_trainer_cannot_tell_online_from_offline(whole, online_recipe):
    rows = whole / "iterations/001/rows.jsonl"
    offline = online_recipe("offline", online=None, data={"sources": [str(rows)]})
    assert (train(offline).path / ADAPTER).read_bytes() == (whole / "iterations/001/train" / ADAPTER).read_bytes()


class Killed(BaseException):
    """Stands for SIGKILL: nothing below a test catches it."""


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        ("rollout.sample", "check_agreement", 2),  # the second iteration's
        pytest.param("rollout.sample", "sampled_line", 3, marks=pytest.mark.long),
        ("training.online", "score", 2),
        pytest.param("training.online", "_finish", 1, marks=pytest.mark.long),
    ],
)
def test_a_kill_in_any_stage(module, name, call, whole, online_recipe, scorer, monkeypatch):
    calls = []

    def dies(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        real = getattr(importlib.import_module(f"align.{module}"), name)
        patch.setattr(f"align.{module}.{name}", dies)
        with pytest.raises(Killed):
            train(online_recipe())
    assert contents(train(online_recipe()).path) == contents(whole)


def test_a_kill_between_two_steps_of_training(whole, online_recipe, scorer, monkeypatch):
    real, calls = AlignTrainer.training_step, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AlignTrainer, "training_step", dies)
        with pytest.raises(Killed):
            train(online_recipe())
    assert contents(train(online_recipe()).path) == contents(whole)


def reference_of(run: Path, iteration: int) -> tuple[str | None, str | None]:
    policy = load_recipe(run / f"iterations/00{iteration}/train/recipe.yaml").policy
    return policy.start_adapter, policy.start_run


def test_the_reference_moves_as_asked(online_recipe, scorer):
    options = {"iterations": 3, "reference": "moving", "reference_every": 2, "prompts": 4}
    run = train(online_recipe(online=options)).path
    trained = [str(run / f"iterations/00{i}/train") for i in range(1, 4)]
    assert [reference_of(run, i) for i in (1, 2, 3)] == [
        (None, None),
        (None, trained[0]),
        (f"{trained[1]}/adapter", trained[1]),
    ]
    # The implicit reward is zero exactly where policy and reference are the same.
    margins = [json.loads((Path(path) / "before.json").read_text())["metrics"]["margin"] for path in trained]
    assert [abs(margin) < 1e-6 for margin in margins] == [True, False, True]


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_an_iteration_measures_no_policy_twice(reference, online_recipe, scorer, tmp_path, monkeypatch):
    """What it is given in place of its own first measurement is what that would have been."""
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completions": [f"w{i + 5}", "w9 w4", "w7"], "grades": [i, 2, 1]} for i in (3, 6)
    ]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured, real = [], AlignTrainer.evaluate_heldout
    monkeypatch.setattr(
        AlignTrainer, "evaluate_heldout", lambda self, *a, **k: measured.append(1) or real(self, *a, **k)
    )
    data, online = {"eval_sources": [str(heldout)], "eval_fraction": 0.0}, {"reference": reference}
    recipe = online_recipe(data=data, online=online)
    run = RunDirectory(train(recipe).path)
    assert len(measured) == {"initial": 3, "previous": 4}[reference]
    second = RunDirectory(run.path / "iterations/002/train")
    again = iteration_recipe(recipe, run, 2).model_copy(update={"output": str(tmp_path / "again")})
    train(again)
    assert second.before.read_text() == (tmp_path / "again" / "before.json").read_text()
    assert second.after.read_text() == (tmp_path / "again" / "after.json").read_text()


def test_an_online_run_ends_with_one_table(whole, capsys, monkeypatch):
    summary = json.loads((whole / "summary.json").read_text())
    print_summary("run", summary, show=0, console=Console(width=200))
    printed = capsys.readouterr().out
    assert printed.count("┏") == 1
    inner = [json.loads((whole / f"iterations/00{i}/train/summary.json").read_text()) for i in (1, 2)]
    moments = [inner[0]["eval_before"], inner[0]["eval_after"], inner[1]["eval_after"]]
    losses = next(line for line in printed.splitlines() if line.startswith("│ loss "))
    assert [float(cell) for cell in losses.strip("│").split("│")[1:]] == pytest.approx(
        [moment["loss"] for moment in moments], abs=1e-4
    )
    assert "after 2" in printed and "seconds to sample" in printed and "mean reward of the rollouts" in printed


def test_the_previous_policy_as_reference_of_full_training(online_recipe, scorer):
    options = {"online": {"reference": "previous"}, "policy": {"adapter": {"name": "full"}}}
    run = train(online_recipe(**options)).path
    second = load_recipe(run / "iterations/002/train/recipe.yaml").policy
    assert second.model == str(run / "iterations/001/train/adapter")
    before = json.loads((run / "iterations/002/train/before.json").read_text())["metrics"]
    assert abs(before["margin"]) < 1e-6
    summary = json.loads((run / "summary.json").read_text())
    assert all(one["agreement"]["max"] < 1e-4 for one in summary["iterations"])


@pytest.mark.parametrize(
    ("adapter", "reference"), [("pissa", "previous"), ("adalora", "moving"), ("olora", "moving"), ("full", "moving")]
)
def test_a_reference_that_an_adapter_cannot_have(adapter, reference, online_recipe, scorer):
    recipe = online_recipe(policy={"adapter": {"name": adapter}}, online={"reference": reference})
    with pytest.raises(UserError, match=f"{reference} does not go with the adapter {adapter}"):
        train(recipe)


@pytest.mark.parametrize("adapter", ["pissa", "dora"])
def test_other_adapters_go_on_from_iteration_to_iteration(adapter, online_recipe, scorer):
    run = train(online_recipe(policy={"adapter": {"name": adapter, "rank": 4}})).path
    summary = json.loads((run / "summary.json").read_text())
    assert all(one["agreement"]["max"] < 1e-4 for one in summary["iterations"])


def test_replay_trains_on_earlier_lists_too(online_recipe, tmp_path):
    recipe = online_recipe(online={"replay": 1}, data={"limit": 9})
    run = RunDirectory(recipe.output)
    sources = [[Path(s.path).parent.name for s in iteration_recipe(recipe, run, i).data.sources] for i in (1, 2, 3)]
    assert sources == [["001"], ["001", "002"], ["002", "003"]]
    assert iteration_recipe(recipe, run, 2).data.limit is None and iteration_recipe(recipe, run, 2).online is None


def test_pairs_of_the_best_and_the_worst(online_recipe, scorer):
    recipe = online_recipe(data={"select": "best_worst"}, online={"iterations": 1}, objective={"name": "logistic"})
    summary = json.loads((train(recipe).path / "summary.json").read_text())
    assert summary["data"]["list_sizes"].keys() >= {"2"}


def test_lists_with_nothing_to_order_are_counted(online_recipe, scorer):
    real = scorer.score

    def tied_first(prompts, texts):
        return [0.0 if prompt == "w3" else r for prompt, r in zip(prompts, real(prompts, texts), strict=True)]

    scorer.score = tied_first
    summary = train(online_recipe(online={"iterations": 1, "prompts": None})).summary
    refused = summary["iterations"][0]["refused"]
    assert refused["all grades tied"] >= 1
    assert summary["data"]["train_lists"] + summary["data"]["heldout_lists"] + sum(refused.values()) == 12


def test_a_rollout_from_a_finished_run(whole, online_recipe, scorer):
    summary = json.loads((whole / "summary.json").read_text())
    recipe = online_recipe("more", online=None, policy={"start_run": str(whole)})
    rows = list(read_lines(sample.rollout(recipe)))
    assert {row["policy_version"] for row in rows} == {summary["steps"]} == {policy_version(str(whole))}
    stages = json.loads((Path(recipe.output) / "rollout" / "stages.json").read_text())
    assert stages["sample"]["agreement"]["max"] < 1e-4
    base = list(read_lines(sample.rollout(online_recipe("base", online=None))))
    assert [row["completion_ids"] for row in rows] != [row["completion_ids"] for row in base]


def test_an_unfinished_run_is_no_start(online_recipe, scorer, tmp_path):
    with pytest.raises(UserError, match="is no finished run"):
        sample.rollout(online_recipe(online=None, policy={"start_run": str(tmp_path)}))


def test_what_an_online_recipe_must_say(online_recipe):
    with pytest.raises(UserError, match="needs `rollout.reward`"):
        online_recipe(rollout={"reward": None})
    with pytest.raises(UserError, match="completions` of 2 or more"):
        online_recipe(rollout={"completions": 1})


def test_messages_go_to_the_runs_own_log(whole):
    text = (whole / "events.log").read_text()
    assert text.count("iteration 1 of 2") == text.count("iteration 2 of 2") == 1


@pytest.mark.parametrize("finished", [True, False])
def test_other_prompts_on_a_begun_run_are_refused(finished, online_recipe, prompts_file, scorer, tmp_path, capsys):
    prompts = shutil.copy(prompts_file, tmp_path / "prompts.jsonl")
    recipe = online_recipe(data={"sources": [str(prompts)]}, online={"iterations": 1})
    run = train(recipe).path
    capsys.readouterr()
    train(recipe)
    assert "finished before; nothing was done" in capsys.readouterr().out
    if not finished:
        (run / "summary.json").unlink()
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join(['{"prompt": "w60 w61"}', *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"prompts.jsonl: 1 of 12 lists are gone, 1 are new"):
        train(recipe)


def test_a_finished_run_grows_by_iterations(whole, online_recipe, scorer):
    """What it then gives is what a run of as many iterations gives."""
    recipe = online_recipe(online={"iterations": 1})
    run = train(recipe).path
    train(online_recipe(online={"iterations": 2}))
    assert contents(run) == contents(whole)
    assert len(json.loads((run / "summary.json").read_text())["iterations"]) == 2
    with pytest.raises(UserError, match=r"differs in online.iterations\); online.iterations may only grow"):
        train(recipe)
    with pytest.raises(UserError, match=r"differs in train.epochs\); set `output`"):
        train(online_recipe(online={"iterations": 2}, train={"epochs": 2}))


class Told(TrainerCallback):
    """Counts what an online run tells, and ends every training after two steps if asked."""

    def __init__(self, *, ends: bool = False) -> None:
        self.trainings, self.lists, self.steps, self.ends = 0, [], [], ends

    def on_train_begin(self, args, state, control, **_) -> None:
        self.trainings += 1

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_training_stop |= self.ends and state.global_step == 2

    def objects(self) -> dict:
        return {"callbacks": [self], "on_lists": self.lists.append, "on_step": self.steps.append}


def test_an_online_run_tells_hooks_and_callbacks_and_takes_rows(whole, online_recipe, prompts_file, scorer):
    told, recipe = Told(), yaml.safe_load(dump_recipe(online_recipe("told")))
    recipe["data"].pop("sources")
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    run = align.Trainer(recipe, train_dataset=rows, **told.objects()).train().path
    assert contents(run)[0] == contents(whole)[0], "what they are told changes nothing"
    inner = [json.loads((run / f"iterations/00{i}/train/summary.json").read_text()) for i in (1, 2)]
    expected = [(i, step) for i, one in enumerate(inner, start=1) for step in range(1, one["steps"] + 1)]
    assert [(done.iteration, done.step) for done in told.steps] == expected and told.trainings == 2
    for i, step in expected:
        own = [seen for seen in told.lists if (seen.iteration, seen.step) == (i, step)]
        assert sum(seen.weights.sum().item() for seen in own) == pytest.approx(1.0)


def test_a_callback_ends_the_training_of_each_iteration(online_recipe, scorer):
    told = Told(ends=True)
    result = align.Trainer(online_recipe("ended"), **told.objects()).train()
    assert [(done.iteration, done.step) for done in told.steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert result.summary["steps"] == 4


def falling(optimizer, steps: int):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)


def test_an_online_run_takes_an_optimizer_a_schedule_and_a_scorer(online_recipe, scorer):
    """Each iteration steps as one whose recipe names them, and is held to the functions that the run began with."""
    named = {"optimizer": "sgd", "schedule": "linear", "learning_rate": 0.5, "warmup_ratio": 0.0}
    told, own = train(online_recipe("told", train=named)), online_recipe("own")
    made = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5), "schedule": falling}
    given = align.Trainer(own, **made, scorer=lambda prompt, completion: len(completion)).train()
    assert contents(given.path) == contents(told.path)
    assert given.steps.column("learning_rate") == told.steps.column("learning_rate")
    for i in (1, 2):
        samples = json.loads((given.path / f"iterations/00{i}/train/summary.json").read_text())["samples"]
        assert samples and all(row["reward_after"] == len(row["after"]) for row in samples)
    shutil.rmtree(given.path / "iterations/002")
    (given.path / "summary.json").unlink()
    made["optimizer"] = torch.optim.AdamW
    with pytest.raises(UserError, match="was begun with another optimizer; give the old one back"):
        align.Trainer(own, **made).train()


def test_an_online_run_takes_no_model_object(online_recipe, untied):
    model = AutoModelForCausalLM.from_pretrained(untied)
    with pytest.raises(UserError, match="model, tokenizer: an online run reads its policy anew"):
        align.Trainer(online_recipe(), model=model).train()
