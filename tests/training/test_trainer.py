"""Whole runs of a few steps: what must not change the result, and what a run leaves behind."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from equal_runs import Killed, kill_at
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import UserError
from align.training.train import train

SGD = {"optimizer": "sgd", "learning_rate": 0.1}
"""Adam divides by the gradient's size and makes a rounding error of a tiny gradient as large as a step."""


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter" / "adapter_model.safetensors")


def metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_same_adapter(a: Path, b: Path, **tolerance) -> None:
    for name, tensor in adapter(a).items():
        assert_close(tensor, adapter(b)[name], **tolerance)


def test_the_run_directory_holds_what_the_contract_names(make_recipe):
    result = train(make_recipe())
    names = {path.name for path in result.path.iterdir()}
    files = ("recipe.yaml", "environment.json", "metrics.jsonl", "events.log", "checkpoints", "adapter", "report.html")
    assert names.issuperset(files)
    assert json.loads((result.path / "summary.json").read_text()) == result.summary
    contract = {"loss", "pair_accuracy", "ndcg", "kendall_tau", "top1_agreement", "margin", "best_logprob_change"}
    contract |= {"best_fell_share", "likelihood_ndcg", "likelihood_pair_accuracy"}
    assert contract <= result.summary["eval_before"].keys() & result.summary["eval_after"].keys()
    assert [line["step"] for line in metrics(result.path)] == list(range(1, result.summary["steps"] + 1))
    assert result.summary["data"]["read"] == 30
    used = "30 rows read, 30 lists used (24 to train on, 6 held out)"
    assert f"data: {used}\n" in (result.path / "events.log").read_text()
    assert len(result.summary["samples"]) == 2
    kept = sorted(path.name for path in (result.path / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-8"], "a checkpoint every 2 of 8 steps, the last two kept"


def test_before_training_all_implicit_rewards_are_zero(make_recipe):
    before = train(make_recipe(objective={"name": "logistic"}, data={"select": "best_worst"})).summary["eval_before"]
    assert before["pair_accuracy"] == 0.5 and before["kendall_tau"] == 0 and before["margin"] == 0
    assert before["best_logprob_change"] == 0 and before["best_fell_share"] == 0


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_the_first_loss_of_pairs_is_ln_2(make_recipe, packing, cache):
    """Whatever shares a row with a pair: packed rows that ran into each other began at several times that."""
    pairs = {"objective": {"name": "logistic"}, "data": {"select": "best_worst"}, "reference": {"cache": cache}}
    result = train(make_recipe(**pairs, train={"steps": 1, "lists_per_step": 24, "packing": packing}))
    assert metrics(result.path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_file_smaller_than_a_step_is_one_step_of_all_its_lists(make_recipe):
    """The loss is the mean over the 24 lists there are, not over the 100 that a step may have."""
    exact = train(make_recipe("exact", train=SGD | {"lists_per_step": 24, "epochs": 1}))
    smaller = train(make_recipe("smaller", train=SGD | {"lists_per_step": 100, "epochs": 1}))
    assert smaller.summary["steps"] == exact.summary["steps"] == 1
    assert_same_adapter(exact.path, smaller.path, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("extra", "what"),
    [({}, "step 2: the (loss|gradient's norm) is (nan|inf)"), ({"steps": 1}, "step 1: the loss on the held-out lists")],
)
def test_a_run_that_diverges_stops_with_its_cause(make_recipe, extra, what):
    broken = SGD | {"learning_rate": 1e38, "max_grad_norm": 0.0, "schedule": "constant", "warmup_ratio": 0.0}
    with pytest.raises(UserError, match=f"^{what}.*; lower train.learning_rate"):
        train(make_recipe(train=broken | extra))


@pytest.mark.parametrize("task", [{}, {"task": "reward", "objective": {"name": "bradley_terry"}}])
def test_a_token_that_the_model_lacks_is_refused_with_its_row(make_recipe, tiny_policy, tmp_path, task):
    """A tokenizer that got a token without the model's embeddings being resized; rows without that token are fine."""
    model = shutil.copytree(tiny_policy, tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(model)
    rows = [{"prompt": "w4", "chosen": " w5", "rejected": f" w6 {end}"} for end in ("", "w7", "<think>")]
    for name, count in (("good", 2), ("bad", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    policy, steps = {"policy": {"model": str(model)}}, {"train": {"steps": 1}}
    train(make_recipe(data={"sources": [f"{tmp_path}/good.jsonl"], "eval_fraction": 0}, **policy, **steps, **task))
    with pytest.raises(UserError, match=r"bad.jsonl, row 3: token '<think>' \(40\) is not among the model's 40"):
        bad = {"sources": [f"{tmp_path}/bad.jsonl"], "eval_fraction": 0}
        train(make_recipe("other", data=bad, **policy, **steps, **task))


def test_it_learns(make_recipe):
    result = train(make_recipe(train={"epochs": 10}))
    assert result.summary["eval_after"]["ndcg"] > result.summary["eval_before"]["ndcg"] + 0.05


@pytest.mark.parametrize("loss", [{"objective": "lambda"}, {"objective": "list_mle", "z_penalty": 0.1}])
def test_a_step_is_the_same_however_it_is_cut(make_recipe, loss):
    """Ragged lists, a last step that is smaller: an average per micro-batch would show at once."""
    whole = train(make_recipe("whole", **loss, train=SGD | {"tokens_per_batch": 10**6}))
    cut = train(make_recipe("cut", **loss, train=SGD | {"tokens_per_batch": 1}))
    assert_same_adapter(whole.path, cut.path, rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics(whole.path), metrics(cut.path), strict=True):
        for key in ("loss", "ndcg", "rewards/margins", "rewards/accuracies", "logps/chosen", "kl", "entropy", "log_z"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), key


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 200])
def test_evaluation_is_the_same_for_every_batch_size(make_recipe, tokens_per_batch):
    small = {"train": {"steps": 3, "lists_per_step": 6, "learning_rate": 1e-2, "save_steps": 2}}
    one = train(make_recipe("one", **small)).summary["eval_after"]
    small["train"]["tokens_per_batch"] = tokens_per_batch
    other = train(make_recipe("other", **small)).summary["eval_after"]
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert other[key] == pytest.approx(value, abs=2e-5), key


def test_mixed_precision_starts_at_the_reference_and_learns(make_recipe):
    result = train(make_recipe(train={"precision": "bfloat16", "epochs": 5}))
    before, after = (result.summary[name] for name in ("eval_before", "eval_after"))
    assert before["best_logprob_change"] == pytest.approx(0, abs=0.05) != after["best_logprob_change"]
    assert after["loss"] < before["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in adapter(result.path).values())


def test_a_live_reference_is_the_cached_one(make_recipe):
    cached = train(make_recipe("cached", train=SGD))
    live = train(make_recipe("live", train=SGD, reference={"cache": False}))
    assert_same_adapter(cached.path, live.path, rtol=1e-4, atol=1e-6)


def test_the_exported_adapter_is_the_trained_policy(make_recipe, tiny_policy):
    result = train(make_recipe(train={"steps": 4}))
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    plain = base(ids).logits
    loaded = PeftModel.from_pretrained(base, result.path / "adapter")(ids).logits
    assert (plain - loaded).abs().max() > 1e-3
    state = load_file(sorted((result.path / "checkpoints").glob("checkpoint-4/*.safetensors"))[0])
    for name, tensor in adapter(result.path).items():
        (match,) = [value for key, value in state.items() if name.replace(".weight", "") in key.replace(".default", "")]
        assert torch.equal(tensor, match)


@pytest.mark.parametrize("settle", [0.0, 0.2, 0.5, 0.7])
def test_adalora_trains_or_is_refused_whatever_the_number_of_steps(make_recipe, settle):
    """Refused is a run that settles in its first step; the sentence names how many steps do, and these train."""
    adapter = {"name": "adalora", "rank": 2, "initial_rank": 4, "warmup": 0.0, "settle": settle}
    for steps in range(1, 6):
        recipe = make_recipe(f"{steps}", policy={"adapter": adapter}, train={"steps": steps}, sampling={"prompts": 0})
        if steps - int(settle * steps) > 1:
            assert train(recipe).summary["steps"] == steps
            continue
        with pytest.raises(UserError, match="adalora settles on its ranks by the gradients of earlier steps") as error:
            train(recipe)
        needed = int(re.search(r"train (\d+) steps", str(error.value)).group(1))
        assert needed - int(settle * needed) == 2


@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "adalora", "full"])
def test_an_interrupted_run_ends_with_the_identical_adapter(make_recipe, monkeypatch, name):
    dropout = {"rank": 4, "dropout": 0.2} if name in ("lora", "pissa", "dora") else {}
    sections = {"policy": {"adapter": {"name": name} | dropout}, "train": {"eval_steps": 3, "learning_rate": 1e-3}}
    whole = train(make_recipe("whole", **sections))
    for step in (1, 5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, step)
            train(make_recipe("killed", **sections))
    resumed = train(make_recipe("killed", **sections))
    for file in (whole.path / "adapter").glob("*.safetensors"):
        assert file.read_bytes() == (resumed.path / "adapter" / file.name).read_bytes()
    drop = ("seconds", "lists_per_second", "completion_tokens_per_second", "crc32")  # the last is of the others too
    lines = [[{k: v for k, v in line.items() if k not in drop} for line in metrics(r.path)] for r in (whole, resumed)]
    assert lines[0] == lines[1]
    assert whole.summary["eval_before"] == resumed.summary["eval_before"]


def test_an_interrupted_run_draws_what_the_whole_one_draws(make_recipe, monkeypatch):
    """The key of a draw is the row's id and the step, which a resumed run counts on."""
    sections = {"objective": {"name": "pl_policy_gradient", "samples": 4}, "train": {"steps": 4, "save_steps": 1}}
    whole = train(make_recipe("whole", **sections))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 2)
        train(make_recipe("killed", **sections))
    assert_same_adapter(whole.path, train(make_recipe("killed", **sections)).path, rtol=0, atol=0)
    cut = train(make_recipe("cut", **{**sections, "train": sections["train"] | {"tokens_per_batch": 1}}))
    assert metrics(cut.path)[0]["grad_norm"] == pytest.approx(metrics(whole.path)[0]["grad_norm"], rel=1e-4)


def test_a_checkpoint_cut_short_and_a_torn_line_are_passed_over(make_recipe, monkeypatch):
    whole = train(make_recipe("whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        train(make_recipe("torn"))
    torn = make_recipe("torn")
    newest = Path(torn.output) / "checkpoints" / "checkpoint-4"
    shutil.copytree(newest, newest.with_name("checkpoint-5"))
    (newest.with_name("checkpoint-5") / "manifest.json").unlink()
    (newest.with_name("checkpoint-5") / "optimizer.pt").write_bytes(b"half")
    with (Path(torn.output) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = train(torn)
    assert_same_adapter(whole.path, resumed.path, rtol=0, atol=0)
    assert [line["step"] for line in metrics(resumed.path)] == [line["step"] for line in metrics(whole.path)]


def test_a_finished_run_is_not_trained_again(make_recipe, monkeypatch, capsys):
    first = train(make_recipe())
    monkeypatch.setattr("align.training.run._train", lambda *_: pytest.fail("trained again"))
    assert train(make_recipe()).summary == first.summary
    assert "run directory" in capsys.readouterr().out


def test_another_recipe_on_the_same_folder_is_refused(make_recipe):
    train(make_recipe(train={"steps": 1}))
    with pytest.raises(UserError, match=r"differs in objective.label_smoothing, .*, train.seed\)"):
        train(make_recipe(train={"steps": 2, "seed": 5}, objective={"name": "logistic"}))


def test_a_folder_of_other_files_is_refused(make_recipe):
    recipe = make_recipe()
    Path(recipe.output).mkdir()
    (Path(recipe.output) / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are no run"):
        train(recipe)


def test_the_best_checkpoint_by_a_held_out_figure_is_exported(make_recipe):
    rising = {"steps": 4, "eval_steps": 1, "keep_best": "loss", "learning_rate": 0.3, "schedule": "constant"}
    result = train(make_recipe(train=rising))
    losses = [line["eval_loss"] for line in metrics(result.path) if "eval_loss" in line]
    assert min(losses) < losses[-1], "the test needs a run whose last step is not its best"
    assert result.summary["eval_after"]["loss"] == pytest.approx(min(losses), abs=1e-5)


def test_sft_raises_the_likelihood_of_the_best_completion(make_recipe):
    result = train(make_recipe(task="sft", objective=(), train={"epochs": 6}))
    before, after = result.summary["eval_before"], result.summary["eval_after"]
    assert after["loss"] < before["loss"] - 0.1
    assert after["token_logprob_best"] > before["token_logprob_best"]


def test_kto_trains_on_labelled_single_completions(make_recipe, tmp_path):
    rows = tmp_path / "labelled.jsonl"
    lines = [
        {"prompt": f"w{10 + i} w5", "completion": " w3 w3 w4" if i % 2 else " w6 w7", "label": bool(i % 2)}
        for i in range(20)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"sources": [str(rows)], "eval_fraction": 0.0}
    runs = []
    for name, budget in (("whole", 10**6), ("cut", 1)):
        train_section = SGD | {"tokens_per_batch": budget, "steps": 6}
        runs.append(train(make_recipe(name, data=data, objective={"name": "kto"}, train=train_section)))
    assert_same_adapter(runs[0].path, runs[1].path, rtol=1e-4, atol=1e-6)
    assert metrics(runs[0].path)[-1]["loss"] < metrics(runs[0].path)[0]["loss"]


def test_ktos_baseline_reads_each_prompt_with_the_next_rows_completion(make_recipe, tmp_path, monkeypatch):
    from align.training.baseline import Baseline

    rows = tmp_path / "labelled.jsonl"
    lines = [{"prompt": f"w{10 + i}", "completion": f" w{20 + i}", "label": bool(i % 2)} for i in range(6)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read: list[tuple[int, int]] = []
    original = Baseline._log_ratio

    def log_ratio(self, examples):
        read.extend((e["prompt_ids"][-1], e["completion_ids"][0][0]) for e in examples)
        return original(self, examples)

    monkeypatch.setattr(Baseline, "_log_ratio", log_ratio)
    data = {"sources": [str(rows)], "eval_fraction": 0.0}
    train(make_recipe(data=data, objective={"name": "kto"}, train={"steps": 1, "lists_per_step": 6}))
    prompts, completions = ({value % 10 for value in side} for side in zip(*read, strict=True))
    assert prompts == completions == set(range(6)), "every prompt and every completion once"
    assert all(prompt % 10 != completion % 10 for prompt, completion in read), "none with its own"
