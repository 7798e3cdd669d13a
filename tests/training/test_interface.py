"""align.Trainer: the numbers of `align train` with objects in the recipe's place, going on, hooks, and misuse."""

import json
import shutil
from pathlib import Path

import hook_each
import numpy as np
import peft
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from equal_runs import TIMES, trained
from safetensors.torch import load_file
from small_kinds import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

import align
from align.errors import UserError
from align.export.export import export
from align.model.peft_adapter import OF_THEIR_OWN
from align.model.peft_kinds import KINDS
from align.objectives.lists import over_ordered_pairs
from align.recipe import dump_recipe
from align.recipe.consent import code_of
from align.runs.checkpoints import numbered
from align.runs.run_directory import RunDirectory
from align.training.train import train

TRAIN = {"steps": 4, "save_steps": 1, "eval_steps": 2, "keep_checkpoints": 9}
FILE = """
import torch.nn.functional as F
from align.objectives.lists import over_ordered_pairs

def mine(scores, grades, list_mask, *, margin=0.0):
    return over_ordered_pairs(lambda d: -F.logsigmoid(d - margin), scores, grades, list_mask)
"""


def mine(scores, grades, list_mask, *, margin=0.0):
    return over_ordered_pairs(lambda d: -torch.nn.functional.logsigmoid(d - margin), scores, grades, list_mask)


def mean_ratio(policy_logprobs, reference_logprobs, completion_mask, list_index, *, beta):
    ratios = (policy_logprobs - reference_logprobs).masked_fill(~completion_mask, 0)
    return beta * ratios.sum(dim=1) / completion_mask.sum(dim=1)


def figures(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_the_same(one: Path, other: Path) -> None:
    """To the last digit."""
    assert figures(one) == figures(other) and len(figures(one)) >= 4
    assert all(torch.equal(value, trained(other)[name]) for name, value in trained(one).items())


@pytest.fixture
def rows(rows_file) -> list[dict]:
    return [json.loads(line) for line in rows_file.read_text().splitlines()]


@pytest.fixture
def model(tiny_policy):
    return AutoModelForCausalLM.from_pretrained(tiny_policy)


@pytest.fixture
def keys(make_recipe):
    """A recipe as keywords, without the sections that objects take the place of."""

    def make(output: str, *left_out: str, **sections) -> dict:
        tree = yaml.safe_load(dump_recipe(make_recipe(output, **{"train": TRAIN} | sections)))
        for name in left_out:
            section, _, key = name.partition(".")
            tree[section].pop(key) if key else tree.pop(section)
        return tree

    return make


def test_objects_give_the_numbers_of_a_recipe_to_the_last_digit(make_recipe, keys, model, tiny_policy, rows, tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    objective = {"name": "python", "function": f"{tmp_path}/own.py:mine", "options": {"margin": 0.5}}
    told = train(make_recipe("told", train=TRAIN, objective=objective))
    sections = keys("given", "policy", "data.sources", "objective")
    trainer = align.Trainer(
        **sections,
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(tiny_policy),
        train_dataset=Dataset.from_list(rows),
        objective={"function": mine, "margin": 0.5},
        adapter=peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    given = trainer.train()
    assert_the_same(told.path, given.path)
    assert given.summary["eval_after"] == told.summary["eval_after"]
    assert trainer.recipe.policy.model == str(tiny_policy), "no copy of weights that a folder has"


@pytest.mark.parametrize("kind", ["list", "generator", "dataset"])
def test_rows_of_every_kind_are_those_of_a_file(make_recipe, keys, rows, kind):
    told = train(make_recipe("told", train=TRAIN))
    held = {"list": rows, "generator": (row for row in rows), "dataset": Dataset.from_list(rows)}[kind]
    given = align.Trainer(**keys("given", "data.sources"), train_dataset=held).train()
    assert_the_same(told.path, given.path)


def test_a_model_of_no_folder_is_kept_with_the_run_and_read_by_the_commands(keys, model, tiny_policy, tmp_path):
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.chat_template = "{{ messages[0].content }}"
    sections = keys("given", "policy.model")
    result = align.Trainer(**sections, model=model, tokenizer=tokenizer).train()
    base = result.path / "base"
    assert load_file(base / "model.safetensors")["lm_head.weight"].equal(model.lm_head.weight.cpu())
    assert AutoTokenizer.from_pretrained(base).chat_template == tokenizer.chat_template
    again = train(align.load_recipe(result.path / "recipe.yaml", [f"output={tmp_path / 'again'}"]))
    assert_the_same(result.path, again.path)
    export(result.path, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_of_its_own_links_to_the_weights_of_its_folder(keys, model, tiny_policy):
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.chat_template = "{{ messages[0].content }}"
    trainer = align.Trainer(**keys("given", "policy.model"), model=model, tokenizer=tokenizer)
    trainer.train()
    weights = Path(trainer.recipe.policy.model) / "model.safetensors"
    assert weights.is_symlink() and weights.resolve() == (tiny_policy / "model.safetensors").resolve()


@pytest.mark.parametrize("name", ["default", "other"])
def test_the_adapter_of_a_peft_model_goes_on(make_recipe, keys, model, tiny_policy, tmp_path, name):
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name=name)
    wrapped.save_pretrained(tmp_path)
    place = tmp_path if name == "default" else tmp_path / name
    policy = {"model": str(tiny_policy), "start_adapter": str(place), "adapter": {"name": "lora"}}
    told = train(make_recipe("told", train=TRAIN, policy=policy | {"adapter": {"rank": 16, "alpha": 32}}))
    given = align.Trainer(**keys("given", "policy"), model=wrapped).train()
    assert_the_same(told.path, given.path)


def test_a_frozen_layer_stays_and_dropout_is_off(keys, model, tiny_policy):
    config = model.config
    config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.model.embed_tokens.weight.requires_grad_(False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    sections = keys("given", "policy.model", policy={"adapter": {"name": "full"}})
    result = align.Trainer(**sections, model=model).train()
    moved = {name for name, value in model.state_dict().items() if not value.equal(start[name])}
    assert "model.embed_tokens.weight" not in moved and "model.layers.0.mlp.up_proj.weight" in moved
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy)
    plain.model.embed_tokens.weight.requires_grad_(False)
    other = align.Trainer(**keys("other", "policy.model", policy={"adapter": {"name": "full"}}), model=plain).train()
    assert figures(result.path) == figures(other.path)


def stop_after(run: Path, step: int) -> None:
    """What a kill behind a checkpoint leaves of a run."""
    directory = RunDirectory(run)
    for newer in numbered(directory.checkpoints):
        if int(newer.name.split("-")[1]) > step:
            shutil.rmtree(newer)
    directory.summary.unlink()
    shutil.rmtree(directory.adapter)


class Noisy:
    """Hooks that draw random numbers, and write into what they are told."""

    def __init__(self) -> None:
        self.lists, self.steps = [], []

    def on_lists(self, seen: align.ListsSeen) -> None:
        torch.rand(7)
        self.lists.append((seen.step, seen.ids, seen.losses.tolist(), seen.weights.tolist()))
        for tensor in (seen.scores, seen.losses, seen.weights, seen.token_logprobs):
            tensor.fill_(torch.nan)

    def on_step(self, done: align.StepDone) -> None:
        torch.rand(3)
        self.steps.append((done.step, done.steps, done.figures["loss"]))


def test_a_killed_run_with_hooks_goes_on_to_the_same_figures(make_recipe, keys, model, tiny_policy, rows):
    policy = {"adapter": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.3}}
    told = train(make_recipe("told", train=TRAIN, policy=policy))
    noisy, later = Noisy(), Noisy()

    def start(hooks: Noisy) -> align.RunResult:
        own = AutoModelForCausalLM.from_pretrained(tiny_policy)
        sections = keys("given", "policy.model", "data.sources", policy=policy)
        hooked = {"on_lists": hooks.on_lists, "on_step": hooks.on_step}
        return align.Trainer(**sections, model=own, train_dataset=rows, **hooked).train()

    result = start(noisy)
    assert_the_same(told.path, result.path)
    stop_after(result.path, 2)
    assert_the_same(told.path, start(later).path)
    assert [step for step, *_ in noisy.steps] == [1, 2, 3, 4] and noisy.steps[2:] == later.steps
    assert [one for one in noisy.lists if one[0] > 2] == later.lists
    for step, total, loss in noisy.steps:
        own = [one for one in noisy.lists if one[0] == step]
        assert total == 4 and sum(sum(weights) for *_, weights in own) == pytest.approx(1.0)
        mean = sum(a * b for *_, losses, weights in own for a, b in zip(losses, weights, strict=True))
        assert mean == pytest.approx(loss, rel=1e-6)


def test_what_a_list_hook_is_told_is_the_formula(keys, rows):
    seen: list[align.ListsSeen] = []
    parts = {"train": TRAIN | {"tokens_per_batch": 30}, "score": {"name": "log_ratio", "beta": 0.3}}
    align.Trainer(**keys("given", "objective", **parts), objective="logistic", on_lists=seen.append).train()
    assert {own.step for own in seen} == {1, 2, 3, 4} and len(seen) > 4
    grades = {row["id"]: row["grades"] for row in rows}
    for own in seen:
        ratio = (own.token_logprobs - own.reference_logprobs) * own.batch.completion_mask
        torch.testing.assert_close(own.scores, own.batch.to_lists(0.3 * ratio.sum(dim=1)), rtol=1e-5, atol=1e-6)
        for i, name in enumerate(own.ids):
            count = int(own.batch.list_mask[i].sum())
            assert own.batch.grades[i, :count].tolist() == pytest.approx(grades[name])
            s, g = own.scores[i].tolist(), grades[name]
            expected = sum(np.log1p(np.exp(s[b] - s[a])) for a in range(count) for b in range(count) if g[a] > g[b])
            assert own.losses[i].item() == pytest.approx(expected, rel=1e-5)
            assert own.places[i].endswith(f"row {int(name) + 1}")


def test_a_reward_models_hook_has_its_outputs(keys):
    seen: list[align.ListsSeen] = []
    sections = keys("given", "objective", task="reward", sampling={"prompts": 0}, objective={"name": "bradley_terry"})
    align.Trainer(**sections, objective={"name": "bradley_terry"}, on_lists=seen.append).train()
    assert seen[0].token_logprobs is None
    torch.testing.assert_close(seen[0].scores, seen[0].batch.to_lists(seen[0].rewards[:, 0]))


def test_a_score_function_an_optimizer_and_a_schedule_are_those_of_the_names(make_recipe, keys):
    named = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.5}
    score = {"name": "log_ratio_mean", "beta": 0.4}
    told = train(make_recipe("told", train=TRAIN | named | {"warmup_ratio": 0.0}, score=score))
    given = align.Trainer(
        **keys("given", "score", train=TRAIN | {"learning_rate": 1.0, "warmup_ratio": 0.0}),
        score={"function": mean_ratio, "beta": 0.4},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    ).train()
    assert_the_same(told.path, given.path)


def test_an_optimizer_of_a_full_models_parameters(make_recipe, keys, model):
    policy = {"adapter": {"name": "full"}}
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    train_keys = {"optimizer": "sgd", "learning_rate": 0.5}
    told = train(make_recipe("told", train=TRAIN | train_keys, policy=policy))
    given = align.Trainer(**keys("given", "policy.model", policy=policy), model=model, optimizer=own).train()
    assert figures(told.path) == figures(given.path)


def test_a_scorer_may_be_a_function(keys):
    result = align.Trainer(**keys("given"), scorer=lambda prompt, completion: len(completion)).train()
    for sample in result.samples:
        assert sample["reward_after"] == len(sample["after"])


class Counts(TrainerCallback, ExportableState):
    """Counts steps, and ends training after some of them; what it counted is kept in checkpoints."""

    def __init__(self, last: int = 99) -> None:
        self.last, self.count = last, 0

    def on_step_end(self, args, state, control, **_) -> None:
        self.count += 1
        control.should_training_stop |= self.count >= self.last

    def state(self) -> dict:
        return {"args": {"last": self.last}, "attributes": {"count": self.count}}


def test_a_callback_that_keeps_a_state_goes_on_with_it_and_may_end_a_run(keys):
    whole, later = Counts(last=3), Counts(last=3)
    result = align.Trainer(**keys("given"), callbacks=[whole]).train()
    assert result.summary["steps"] == 3 and [line["step"] for line in result.steps] == [1, 2, 3]
    expected = figures(result.path)
    assert RunDirectory(result.path).final_state().name == "checkpoint-3"
    stop_after(result.path, 2)
    assert align.Trainer(**keys("given"), callbacks=[later]).train().summary["steps"] == 3
    assert later.count == 3 and figures(result.path) == expected
    stop_after(result.path, 3)
    assert align.Trainer(**keys("given"), callbacks=[Counts(last=99)]).train().summary["steps"] == 3, "it had ended"


def test_a_recipe_names_callbacks_by_file_and_by_module(make_recipe, tmp_path, monkeypatch):
    code = (
        "from transformers import TrainerCallback\n"
        "class Ends(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        control.should_training_stop |= state.global_step >= 2\n"
    )
    (tmp_path / "ends.py").write_text(code)
    (tmp_path / "ends_too.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, place in enumerate((f"{tmp_path}/ends.py:Ends", "ends_too:Ends")):
        recipe = make_recipe(f"run{number}", train=TRAIN | {"callbacks": [place]})
        assert train(recipe).summary["steps"] == 2
    (tmp_path / "ends.py").write_text(code + "\n")
    with pytest.raises(UserError, match=r"begun with another .*ends.py; put the old file"):
        train(make_recipe("run0", train=TRAIN | {"callbacks": [f"{tmp_path}/ends.py:Ends"]}))


def test_callbacks_of_a_file_are_code_that_it_names_and_objects_are_none(make_recipe, keys):
    recipe = make_recipe(train={"callbacks": ["mine.py:Ends", "json:loads"]})
    assert code_of(recipe) == {"train.callbacks.0": "mine.py:Ends", "train.callbacks.1": "json:loads"}
    given = align.Trainer(**keys("given", "objective"), objective=mine).recipe
    assert code_of(given) == {} and given.objective[0].function.endswith(":mine")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no_such_module:Ends", "there is no such class"),
        ("transformers:NoSuch", "there is no such class"),
        ("transformers:TrainerControl", "not a transformers.TrainerCallback"),
        ("transformers:Trainer", "gives Trainer|cannot be made without arguments"),
        ("json:loads", "cannot be made without arguments"),
    ],
)
def test_what_is_no_callback_is_refused_before_rows_are_read(make_recipe, place, message):
    with pytest.raises(UserError, match=message):
        train(make_recipe(train=TRAIN | {"callbacks": place}, data={"sources": ["missing.jsonl"]}))


def test_transformers_own_early_stopping_callback_works(keys):
    sections = keys("given", train=TRAIN | {"eval_steps": 1, "learning_rate": 1e-9, "keep_best": "ndcg"})
    result = align.Trainer(**sections, callbacks=[EarlyStoppingCallback(2)]).train()
    assert result.summary["steps"] == 3, "the first is the best, and two bring nothing"


def expected_stop(values: list[float], patience: int, threshold: float, larger: bool) -> int:
    """The evaluation, from 1, after which training ends: none of the last `patience` bettered the best before."""
    best, since = None, 0
    for number, value in enumerate(values, start=1):
        gain = best is None or (value - best if larger else best - value) > threshold
        best, since = (value, 0) if gain else (best, since + 1)
        if since == patience:
            return number
    return len(values)


@pytest.mark.parametrize(
    "section", [{"patience": 1}, {"patience": 2, "threshold": 0.02}, {"patience": 1, "figure": "ndcg"}]
)
def test_early_stopping_ends_where_the_figure_no_longer_gains(make_recipe, section):
    steep = {"steps": 8, "save_steps": 1, "eval_steps": 1, "keep_checkpoints": 9, "learning_rate": 0.3}
    free = train(make_recipe("free", train=steep))
    figure = section.get("figure", "loss")
    values = free.evaluations.column(f"eval_{figure}")
    stop = expected_stop(values, section["patience"], section.get("threshold", 0.0), figure == "ndcg")
    assert stop < 8, "the test needs a run that becomes worse"
    recipe = make_recipe("early", train=steep | {"early_stopping": section})
    early = train(recipe)
    assert early.summary["steps"] == stop and early.evaluations.column(f"eval_{figure}") == values[:stop]
    expected, weights = figures(early.path), trained(early.path)
    for step in (stop, stop - 1):
        stop_after(early.path, step)
        assert train(recipe).summary["steps"] == stop
        assert figures(early.path) == expected
        assert all(torch.equal(value, trained(early.path)[name]) for name, value in weights.items())


def test_early_stopping_gives_the_best_where_that_is_kept(make_recipe):
    steep = {"steps": 8, "eval_steps": 1, "learning_rate": 0.3, "keep_best": "loss", "early_stopping": 2}
    result = train(make_recipe(train=steep))
    losses = result.evaluations.column("eval_loss")
    assert result.summary["steps"] < 8
    assert result.summary["eval_after"]["loss"] == pytest.approx(min(losses), rel=1e-6) != losses[-1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"early_stopping": 2}, "train.early_stopping needs train.eval_steps"),
        ({"early_stopping": 0, "eval_steps": 1}, "train.early_stopping.patience"),
        ({"early_stopping": True, "eval_steps": 1}, "train.early_stopping"),
        ({"early_stopping": {"patience": 1, "figure": "los"}, "eval_steps": 1}, "figure"),
        ({"callbacks": "nothing"}, "not of the form file.py:Class or module:Class"),
    ],
)
def test_keys_that_cannot_work_are_refused_with_the_recipe(make_recipe, section, message):
    with pytest.raises(UserError, match=message):
        make_recipe(train=section)


@pytest.mark.parametrize("key", ["keep_best", "early_stopping"])
def test_what_looks_at_held_out_figures_needs_held_out_lists(make_recipe, key):
    section = {"eval_steps": 1, key: "loss" if key == "keep_best" else 1}
    with pytest.raises(UserError, match=f"train.{key}: no list is held out"):
        train(make_recipe(train=section, data={"eval_fraction": 0.0}))


@pytest.mark.parametrize(
    "kind", ["LOHA", *(pytest.param(k, marks=pytest.mark.long) for k in KINDS if k not in OF_THEIR_OWN and k != "LOHA")]
)
def test_any_adapter_of_pefts_trains_is_resumed_and_exported(make_recipe, tiny_policy, kind):
    if KINDS[kind].why_not:
        with pytest.raises(UserError, match="policy.adapter"):
            make_recipe(policy={"adapter": {"name": "peft", "type": kind}})
        return
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    adapter = {"name": "peft", "type": kind, "options": SMALL.get(kind, {"r": 4})}
    recipe = make_recipe(policy={"adapter": adapter}, train=TRAIN | {"learning_rate": 0.1})
    result = train(recipe)
    losses = result.steps.column("loss")
    assert losses[0] != losses[-1], "something trains"
    stop_after(result.path, 2)
    before = [line for line in figures(result.path) if line["step"] <= 2]
    again = train(recipe)
    assert again.steps.column("loss") == losses and before
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        start = base(ids).logits.clone()
        wrapped = peft.PeftModel.from_pretrained(base, result.path / "adapter").eval()
        assert (wrapped(ids).logits - start).abs().max() > 1e-4


def test_a_run_of_objects_does_not_go_on_with_others(keys, rows, model, tiny_policy):
    sections = keys("given", "data.sources", "policy.model", "objective")
    own = {"objective": mine, "train_dataset": rows, "optimizer": lambda own: torch.optim.SGD(own, lr=0.1)}
    result = align.Trainer(**sections, **own, model=model).train()
    stop_after(result.path, 2)
    other = AutoModelForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)

    def again(**changed):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy)
        align.Trainer(**sections, **own | {"model": model} | changed).train()

    with pytest.raises(UserError, match="differs in policy.model|not the one that this run began with"):
        again(model=other)
    with pytest.raises(UserError, match="begun with another optimizer"):
        again(optimizer=lambda own: torch.optim.SGD(own, lr=0.2))
    with pytest.raises(UserError, match="begun with another optimizer"):
        again(optimizer=None)
    with pytest.raises(UserError, match="the rows are not those"):
        again(train_dataset=rows[1:])
    with pytest.raises(UserError, match="differs in objective|begun with another"):
        again(objective=lambda scores, grades, list_mask: mine(scores, grades, list_mask))
    again()


def test_a_command_says_what_it_cannot_load(keys, rows, capsys):
    from align.own_code import _given, load_function

    result = align.Trainer(**keys("given", "objective"), objective=mine).train()
    place = align.load_recipe(result.path / "recipe.yaml").objective[0].function
    _given.clear()  # as in another process
    with pytest.raises(UserError, match="was given to align.Trainer as an object"):
        load_function(place)


def test_results_are_tables(keys):
    result = align.Trainer(**keys("given")).train()
    frame = result.to_pandas()
    assert frame["step"].tolist() == [1, 2, 3, 4] and frame["loss"].tolist() == result.steps.column("loss")
    assert result.evaluations.column("step") == [2, 4]
    by_figure = result.heldout.to_pandas().set_index("figure")
    assert by_figure.loc["ndcg", "after"] == result.summary["eval_after"]["ndcg"]
    assert "<table>" in result._repr_html_() and "&lt;" not in result.steps._repr_html_()
    with pytest.raises(UserError, match="no such column; there are step"):
        result.steps.column("los")


def misuse(tmp_path, rows, model):
    """Arguments of a Trainer that cannot work -> what is said of them."""
    out = {"output": str(tmp_path / "run"), "objective": "lambda", "policy": {"model": "nowhere"}}
    return [
        ({}, "output: missing"),
        (out | {"recipe": 3}, "recipe: int"),
        (out | {"trian": {}}, "trian"),
        (out | {"train_dataset": 3}, "train_dataset: int holds no rows"),
        (out | {"train_dataset": DatasetDict({"train": Dataset.from_list(rows)})}, "one split of it"),
        (out | {"model": 3}, "model: int is no transformers.PreTrainedModel"),
        (
            out | {"model": peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).base_model.model},
            "layers are in it",
        ),
        (out | {"tokenizer": 3}, "tokenizer: int"),
        (out | {"adapter": 3}, "adapter: int"),
        (out | {"objective": 3}, "objective"),
        (out | {"optimizer": lambda: None}, "optimizer: .* no function of one argument"),
        (out | {"schedule": lambda one: None}, "schedule: .* no function of two arguments"),
        (out | {"on_step": 3}, "on_step: 3 is no function of one argument"),
        (out | {"callbacks": Counts()}, "callbacks: Counts; give a list"),
        (out | {"callbacks": [Counts]}, "make an object of the class"),
        (out | {"scorer": 3, "data": {"sources": ["rows.jsonl"]}}, "scorer: int scores nothing"),
    ]


def test_every_misuse_is_one_sentence(tmp_path, rows, model):
    for arguments, message in misuse(tmp_path, rows, model):
        with pytest.raises((UserError, ValueError), match=message) as refused:
            align.Trainer(**arguments)
        assert "\n" not in str(refused.value), arguments


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "row 2: int, not a dict"),
        ({1: "a"}, "row 2: the column's name 1 is no text"),
        ({"prompt": object()}, "row 2: object cannot be written as JSON"),
        ({"prompt": "w3", "chosen": "w4"}, "row 2"),
    ],
)
def test_rows_that_are_none_are_named(keys, rows, row, message):
    with pytest.raises(UserError, match=message):
        align.Trainer(**keys("given", "data.sources"), train_dataset=[rows[0], row]).train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": lambda own: own}, "optimizer: gives list"),
        ({"optimizer": lambda own: torch.optim.SGD([torch.zeros(1)], lr=1.0)}, "none that train here"),
        ({"optimizer": lambda own: 1 / 0}, "optimizer: fails with ZeroDivisionError"),
        ({"schedule": lambda optimizer, steps: 3}, "schedule: gives int"),
        ({"on_step": lambda done: 1 / 0}, "on_step: fails in step 1 with ZeroDivisionError"),
        ({"on_lists": lambda seen: 1 / 0}, "on_lists: fails in step 1 with ZeroDivisionError"),
        ({"objective": lambda scores, grades, list_mask: scores}, "one loss per list"),
    ],
)
def test_functions_that_fail_are_named(keys, given, message):
    with pytest.raises(UserError, match=message):
        align.Trainer(**keys("given", *given.keys() & {"objective"}), **given).train()


@pytest.mark.slow
def test_several_processes_tell_hooks_their_own_lists_and_end_together(make_recipe, start_each, tmp_path):
    """A callback asks for the end in the second process alone; that is the end of both, and of one process."""
    told: dict[int, list] = {}
    for processes in (1, 2):
        recipe = make_recipe(f"of{processes}", train=TRAIN | {"lists_per_step": 5})
        (tmp_path / f"of{processes}.yaml").write_text(dump_recipe(recipe))
        if processes == 1:
            hook_each.train(tmp_path / "of1.yaml", tmp_path)
        else:
            start_each("hook_each", str(tmp_path / "of2.yaml"), str(tmp_path)).finish()
        files = [tmp_path / f"of{processes}-{rank}.jsonl" for rank in range(processes)]
        told[processes] = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    steps = [[line for line in lines if "lists" not in line] for lines in (*told[1], *told[2])]
    assert [line["step"] for line in steps[0]] == [line["step"] for line in steps[1]] == [1, 2, 3] and not steps[2]
    assert [line["loss"] for line in steps[1]] == pytest.approx([line["loss"] for line in steps[0]], rel=1e-5)
    one, first, second = [[line for line in lines if "lists" in line] for lines in (*told[1], *told[2])]
    for step in (1, 2, 3):
        of_one, *shares = [
            {name: loss for line in lines if line["step"] == step for name, loss in line["lists"].items()}
            for lines in (one, first, second)
        ]
        assert all(shares) and len(of_one) == len(shares[0]) + len(shares[1]) == 5
        assert shares[0] | shares[1] == pytest.approx(of_one, rel=1e-5)
