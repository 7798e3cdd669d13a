"""Reward models: what must not change the result, and that what a run leaves is what was trained."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from align.data.ratings import with_ratings
from align.data.schema import Row
from align.errors import UserError
from align.export.export import export
from align.model.config import PolicySection
from align.model.load import LoadOptions
from align.model.reward import RewardModel, load_reward_model
from align.recipe import load_recipe, parse_recipe
from align.recipe.settings import RewardSection
from align.runs.build import load_options, prepare
from align.training.inspect import inspect_recipe
from align.training.train import train
from rewards import load_scorer
from rewards.head_config import Attributes

ADAPTERS = ("lora", "rslora", "dora", "pissa", "olora", "eva", "adalora", "miss", "ia3", "full")
SMALL = {"rank": 4, "alpha": 8}


@pytest.fixture
def reward_recipe(make_recipe):
    """A recipe of a few steps; sections given are laid over it."""

    def make(output: str = "run", **sections):
        sections = {"objective": {"name": "bradley_terry", "center": 0.01}} | sections
        return make_recipe(output, task="reward", **sections)

    return make


@pytest.fixture
def rated_file(tmp_path) -> Path:
    """Forty single completions with two ratings, some missing: how many w3 and how many words."""
    generator = torch.Generator().manual_seed(7)
    path = tmp_path / "rated.jsonl"
    with path.open("w") as file:
        for row in range(40):
            words = torch.randint(3, 7, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)
            ratings = {"threes": float((words == 3).sum()), "length": None if row % 5 == 0 else float(len(words)) / 4}
            text = " " + " ".join(f"w{i}" for i in words.tolist())
            file.write(json.dumps({"prompt": f"w{10 + row % 20} w8", "response": text, "scores": ratings}) + "\n")
    return path


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((path / "adapter").glob("*.safetensors"))[0])


def held_out(recipe) -> tuple[list[str], list[str]]:
    """Prompts and completions of the held-out lists, a prompt per completion."""
    rows = prepare(recipe).heldout_rows
    return [row.prompt for row in rows for _ in row.completions], [text for row in rows for text in row.completions]


def trainer_rewards(model, recipe) -> torch.Tensor:
    with torch.no_grad():
        return model.scorer().eval()(model.collate(list(prepare(recipe).heldout)))


def test_the_audit_names_ratings_and_strengths_only_where_nothing_reads_them(reward_recipe, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    columns = {"margin": 2.0, "threes": [1.0, 0.0], "fours": [0.0, 1.0]}
    row = {"chosen": " w3", "rejected": " w4", **columns}
    rows.write_text("".join(json.dumps({"prompt": f"w{i}", **row}) + "\n" for i in range(5, 11)))
    objectives = {
        "margin": {"name": "bradley_terry", "strength": "margin"},
        "threes": {"name": "attributes"},
        "": {"name": "bradley_terry"},
    }
    for read, objective in objectives.items():
        own = {
            "objective": objective,
            "reward": {"outputs": ["threes" if read == "threes" else "reward"]},
            "data": {"sources": [str(rows)]},
        }
        (source, *_) = train(reward_recipe(f"run_{read}", train={"steps": 1}, **own)).summary["data"]["sources"]
        assert source["columns_not_read"] == dict.fromkeys(columns.keys() - {read}, 6)


def test_it_learns_and_measures(reward_recipe):
    summary = train(reward_recipe(train={"epochs": 6})).summary
    before, after = summary["eval_before"], summary["eval_after"]
    assert after["ndcg"] > before["ndcg"] + 0.1 and after["loss"] < before["loss"]
    assert {"ndcg", "kendall_tau", "top1_agreement", "margin", "reward_mean"} <= after.keys()
    assert summary["samples"] == [] and "best_logprob_change" not in after


@pytest.mark.parametrize("objective", [{"name": "bradley_terry"}, {"name": "list_mle"}, {"name": "lambda"}])
def test_packed_rows_padded_rows_and_any_cut_give_the_same(reward_recipe, objective):
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "epochs": 1}
    runs = {
        "packed": {"tokens_per_batch": 10**6},
        "cut": {"tokens_per_batch": 1},
        "padded": {"packing": False, "tokens_per_batch": 200},
    }
    paths = [train(reward_recipe(name, objective=objective, train=sgd | own)).path for name, own in runs.items()]
    first = state(paths[0])
    for other in paths[1:]:
        for name, tensor in state(other).items():
            assert_close(tensor, first[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_export_scores_as_the_trained_model(reward_recipe, tmp_path, name):
    sizes = SMALL if name in ("lora", "rslora", "dora", "pissa", "olora", "eva") else {}
    sizes = {"rank": 4} if name == "miss" else sizes
    recipe = reward_recipe(policy={"adapter": {"name": name} | sizes}, train={"epochs": 1})
    result = train(recipe)
    options = load_options(recipe, prepare(recipe), total_steps=4, device=torch.device("cpu"))
    fresh = load_reward_model(recipe.policy, options, outputs=["reward"])
    untrained = trainer_rewards(fresh, recipe)
    fresh.load_state(sorted((result.path / "checkpoints").glob("checkpoint-*"))[-1])
    trained = trainer_rewards(fresh, recipe)
    assert (trained - untrained).abs().max() > 1e-3
    export(result.path, tmp_path / "merged", merge=True)
    scorer = load_scorer(str(tmp_path / "merged"))
    assert_close(torch.tensor(scorer.score(*held_out(recipe))), trained[:, 0], atol=1e-5, rtol=1e-4)
    assert scorer.model.config.id2label == {0: "reward"}


def test_the_run_holds_an_adapter_that_peft_loads_with_its_head(reward_recipe, tmp_path):
    result = train(reward_recipe())
    assert any("score" in name for name in state(result.path))
    export(result.path, tmp_path / "adapter")
    export(result.path, tmp_path / "merged", merge=True)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "adapter")("w3 w4 w3", return_tensors="pt")["input_ids"]
    merged = load_scorer(str(tmp_path / "merged"))
    assert_close(theirs(input_ids=ids).logits[0, 0], merged.model(input_ids=ids).logits[0, 0], atol=1e-5, rtol=1e-4)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "reward model (outputs: reward)" in card and "text-classification" in card and "load_scorer" in card


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("balance", ["mean", "more"])
def test_an_interrupted_run_ends_with_the_identical_model(reward_recipe, rows_file, tmp_path, monkeypatch, balance):
    from align.training.trainer import AlignTrainer

    other = tmp_path / "other.jsonl"
    other.write_text("".join(line.replace("w3", "w39") + "\n" for line in rows_file.read_text().splitlines()))
    sections = {
        "policy": {"adapter": {"name": "lora", "dropout": 0.2} | SMALL},
        "reward": {"balance": balance},
        "data": {"sources": [str(rows_file), str(other)]},
    }
    whole = train(reward_recipe("whole", **sections))
    original = AlignTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AlignTrainer, "training_step", training_step)
        train(reward_recipe("killed", **sections))
    resumed = train(reward_recipe("killed", **sections))
    for name, tensor in state(whole.path).items():
        assert torch.equal(tensor, state(resumed.path)[name]), name


def test_more_weighs_the_sets_by_the_gradients_on_the_head(reward_recipe, rows_file, tmp_path):
    """The set weights of a step, from a separate backward pass per set in float64."""
    from accelerate import Accelerator

    from align.losses.reward_loss import build_reward_loss
    from rewards.heads import min_norm_weights

    recipe = reward_recipe()
    model = load_reward_model(recipe.policy, outputs=["reward"])
    lists = list(prepare(recipe).train)[:8]
    for number, example in enumerate(lists):
        ratings = {"attributes": [[math.nan]] * len(example["grades"]), "strength": math.nan}
        example |= ratings | {"set": number % 3 and 1}
    loss = build_reward_loss(parse_recipe(recipe.model_dump(mode="json") | {
        "data": {"sources": ["a", "b"]}, "reward": {"balance": "more"}}, origin="test").reward,
        recipe.objective, sources=2)  # fmt: skip
    head = model.head_parameters()
    gradients = []
    for number in range(2):
        model.model.zero_grad()
        batch = model.collate([e for e in lists if e["set"] == number])
        loss.unweighted(model.scorer()(batch), batch).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in head]).double())
    unit = torch.nn.functional.normalize(torch.stack(gradients), dim=1)
    before = torch.randn(unit.shape)  # so that the sets' running means differ in length
    model.set_gradients = before.clone()
    loss.begin_step(model, [lists[:3], [], lists[3:]], Accelerator())
    assert_close(model.set_gradients, 0.01 * before + 0.99 * unit.float(), atol=1e-5, rtol=1e-4)
    shares = min_norm_weights(0.01 * before.double() + 0.99 * unit)
    assert abs(shares[0] - 0.5) > 1e-4
    expected = shares * torch.tensor([8 / 3, 8 / 5])  # of 8 lists, 3 are the first set's
    assert_close(loss.set_weights, torch.tensor([*expected.tolist(), 1.0]), atol=1e-4, rtol=1e-3)
    batch = model.collate(lists)
    rewards = model.scorer()(batch)
    plain = loss.unweighted(rewards, batch)
    assert_close(loss(rewards, None, batch), plain * expected.float()[batch.sets], atol=1e-4, rtol=1e-3)
    of_sets = torch.stack([plain[batch.sets == number].mean() for number in range(2)]).double()
    assert_close(loss(rewards, None, batch).mean().double(), (shares * of_sets).sum(), atol=1e-4, rtol=1e-3)

    weights = loss.set_weights.clone()
    model.set_gradients = before.clone()
    loss.begin_step(model, [[example] for example in lists], Accelerator())  # another cut
    assert_close(loss.set_weights, weights, atol=1e-4, rtol=1e-3)
    loss.begin_step(model, [[e for e in lists if e["set"] == 1]], Accelerator())
    assert loss.set_weights.tolist() == [0.0, 1.0, 1.0], "a set alone in a step"


@pytest.mark.parametrize(
    ("column", "deviations"),
    [
        ([0.5, 0.25, 1.5], [[0.5, 0.5], [0.25, 0.25], [1.5, 1.5]]),
        ([{"a": 0.5}, {"a": None, "b": 2}, {"b": 0}], [[0.5, math.nan], [math.nan, 2.0], [math.nan, 0.0]]),
        (None, [[math.nan] * 2] * 3),
    ],
)
def test_deviations_of_the_rows_reach_the_loss(column, deviations):
    from align.losses.reward_loss import build_reward_loss
    from rewards.heads import fidelity

    rated = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 1.0}, {"a": 2, "b": 2.5}]
    meta = {"std": column, "attributes": rated}
    row = Row("1", "p", ("a", "b", "c"), (0.0, 1.0, 2.0), None, meta=meta, source="f", number=1)
    columns = {"prompt_ids": [1], "completion_ids": [[2]] * 3, "grades": [0.0, 1.0, 2.0], "kept": [0, 1, 2]}
    lists = Dataset.from_list([columns])
    options = {"names": ["a", "b"], "strength": "margin", "sets": {"f": 0}, "deviation": "std"}
    example = with_ratings(lists, [row], **options)[0]
    assert_close(torch.tensor(example["deviations"]), torch.tensor(deviations), equal_nan=True)

    objective = Attributes(fidelity=2.0, deviation=0.3, deviation_field="std")
    loss = build_reward_loss(RewardSection(outputs=("a", "b")), [objective], sources=1)
    model = SimpleNamespace(packing=False, pad_id=0, model=SimpleNamespace(device="cpu"))
    batch = RewardModel.collate(model, [example])
    rewards, mask = torch.randn(3, 2), torch.ones(1, 3, dtype=torch.bool)
    columns = (rewards, batch.attributes, torch.tensor(deviations).nan_to_num(0.3))
    pairs = [
        fidelity(r[None], y[None], mask, deviation=s[None]) for r, y, s in zip(*(c.T for c in columns), strict=True)
    ]
    errors = (rewards - batch.attributes).square().mean()
    assert_close(loss(rewards, None, batch), errors + 2.0 * torch.stack(pairs).mean(0))

    bad = replace(row, meta=row.meta | {"std": [1.0, -1.0, 1.0]})
    with pytest.raises(UserError, match="f, row 1, field std: a deviation of -1; give 0 or more"):
        with_ratings(lists, [bad], **options)


@pytest.mark.parametrize("form", ["squared", "soft_bins"])
def test_attributes_are_learnt_where_they_are_rated(make_recipe, rated_file, tmp_path, form):
    if form == "soft_bins":
        rows = [json.loads(line) for line in rated_file.read_text().splitlines()]
        for row in rows:
            row["scores"] = {k: v if v is None else min(5, 1 + v) for k, v in row["scores"].items()}
        rated_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        task="reward",
        data={"sources": [str(rated_file)]},
        reward={"outputs": ["threes", "length"]},
        objective={"name": "attributes", "form": form},
        train={"epochs": 25},
    )
    result = train(recipe)
    before, after = result.summary["eval_before"], result.summary["eval_after"]
    assert after["loss"] < 0.5 * before["loss"]
    assert after["squared_error/threes"] < before["squared_error/threes"]
    export(result.path, tmp_path / "merged", merge=True)
    scorer = load_scorer({"model": str(tmp_path / "merged"), "label": "length"})
    long, short = scorer.score(["w10 w8"] * 2, [" w4 w5 w6 w4 w5 w6 w4", " w4"])
    assert long > short


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_a_regression_is_what_scaled_bradley_terry_starts_from(
    make_recipe, reward_recipe, rated_file, tmp_path, adapter
):
    """HelpSteer2-Preference: the pair model keeps one output of the regression, weight for weight; export goes on."""
    regression = make_recipe(
        "regression",
        task="reward",
        data={"sources": [str(rated_file)]},
        reward={"outputs": ["length", "threes"]},
        objective={"name": "attributes"},
    )
    export(train(regression).path, tmp_path / "regression-model", merge=True)
    folder = str(tmp_path / "regression-model")
    start = load_reward_model(PolicySection(model=folder, adapter=regression.policy.adapter), outputs=["threes"])
    prompts, completions = ["w10 w8"] * 2, [" w3 w4", " w4"]
    fresh = load_scorer({"model": folder, "label": "threes"}).score(prompts, completions)
    recipe = reward_recipe(
        policy={"model": folder, "adapter": {"name": adapter}},
        reward={"outputs": ["threes"]},
        objective={"name": "bradley_terry", "strength": "scaled"},
    )
    lists = [{"prompt_ids": [10, 8], "completion_ids": [[3, 4], [4]], "grades": [1.0, 0.0]}]
    with torch.no_grad():
        assert_close(start.scorer()(start.collate(lists))[:, 0], torch.tensor(fresh), atol=1e-6, rtol=1e-5)
    run = train(recipe)
    assert run.summary["eval_before"]["margin"] != 0
    began, trained, further = (
        whole(folder if name == "began" else export(run.path, tmp_path / name, merge=True, dtype="float32", **own))
        for name, own in (("began", {}), ("trained", {}), ("further", {"extrapolate": 0.5}))
    )
    began["score.weight"] = began["score.weight"][1:]  # `threes`
    assert (trained["score.weight"] - began["score.weight"]).abs().max() > 1e-3
    for name, start in began.items():
        assert_close(further[name], start + 1.5 * (trained[name] - start), atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="has no head, so that the one of .* began with chance weights"):
        export(tmp_path / "regression", tmp_path / "out", extrapolate=0.5)
    with pytest.raises(UserError, match="has no depth"):
        load_reward_model(PolicySection(model=folder, adapter=regression.policy.adapter), outputs=["depth"])


def whole(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


BODY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _encoder(kind: str, folder: Path) -> Path:
    torch.manual_seed(2)
    sizes = BODY | {"intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.2}
    if kind == "bert":
        BertModel(BertConfig(**sizes, pad_token_id=0), add_pooling_layer=False).save_pretrained(folder)
    elif kind == "roberta":
        RobertaModel(RobertaConfig(**sizes, pad_token_id=0), add_pooling_layer=False).save_pretrained(folder)
    else:
        config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
        GPT2LMHeadModel(config).save_pretrained(folder)
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i for i in range(3, 40)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind != "gpt2":
        words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"unk_token": "[PAD]", "pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_encoders_and_other_decoders(reward_recipe, tmp_path, kind, adapter):
    """An encoder runs padded rows with its own start and end tokens, as the scorer reads them."""
    folder = _encoder(kind, tmp_path / kind)
    options = SMALL if adapter == "lora" else {}
    policy = {"policy": {"model": str(folder), "adapter": {"name": adapter} | options}}
    recipe = reward_recipe(train={"epochs": 1})
    recipe = parse_recipe(recipe.model_dump(mode="json") | policy, origin="test")
    result = train(recipe)
    assert result.summary["eval_after"]["loss"] < result.summary["eval_before"]["loss"]
    export(result.path, tmp_path / "merged", merge=True)
    model = load_reward_model(recipe.policy, outputs=["reward"])
    model.load_state(sorted((result.path / "checkpoints").glob("checkpoint-*"))[-1])
    scorer = load_scorer(str(tmp_path / "merged"))
    found = torch.tensor(scorer.score(*held_out(recipe)))
    assert_close(found, trainer_rewards(model, recipe)[:, 0], atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-4


@pytest.mark.parametrize("packing", [True, False])
def test_an_encoder_that_trains_reads_tokens_alone_if_packing_is_on(tmp_path, packing):
    section = PolicySection(model=str(_encoder("roberta", tmp_path)), adapter={"name": "full"})
    model = load_reward_model(section, LoadOptions(packing=packing), outputs=["reward"])
    seen = []
    attention = model.model.roberta.encoder.layer[0].attention.self.query
    attention.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[:-1].numel()))
    lists = [{"prompt_ids": [1, 5], "completion_ids": [[3, 2], [4, 5, 6, 7, 2]], "grades": [1.0, 0.0]}]
    model.scorer()(model.collate(lists)).sum().backward()
    assert seen == [4 + 7 if packing else 2 * 7]


def test_a_conversation_is_read_as_the_scorer_reads_it(reward_recipe, tmp_path):
    """Its last token ends texts and is also what pads rows; it must not be passed over as padding."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ 'w9 ' + m.content + ' </s> ' }}{% endfor %}")
    rows = tmp_path / "chat.jsonl"
    row = {"prompt": [{"role": "user", "content": "w5"}], "completions": ["w3 w4", "w4"], "grades": [1.0, 0.0]}
    with rows.open("w") as file:
        for i in range(8):
            row["prompt"] = [{"role": "user", "content": f"w{5 + i}"}]
            file.write(json.dumps(row) + "\n")
    recipe = reward_recipe(policy={"chat_template": str(template)}, data={"sources": [str(rows)]})
    result = train(recipe)
    model = load_reward_model(recipe.policy, outputs=["reward"])
    model.load_state(sorted((result.path / "checkpoints").glob("checkpoint-*"))[-1])
    export(result.path, tmp_path / "merged", merge=True)
    prompts, completions = held_out(recipe)
    found = load_scorer(str(tmp_path / "merged")).score(prompts, completions)
    assert_close(torch.tensor(found), trainer_rewards(model, recipe)[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "kto"}}, "about a policy's log-probabilities"),
        ({"objective": {"name": "bradley_terry", "output": "depth"}}, "no output depth; it has reward"),
        ({"data": {"append_eos": True}}, "data.append_eos"),
        ({"dpop": 5.0}, "a reward model has none"),
        ({"objective": {"name": "bradly_terry"}}, "did you mean `bradley_terry`"),
        ({"reward": {"balance": "more"}}, "several data.sources"),
        ({"task": "preference", "objective": {"name": "bradley_terry"}}, "set `task: reward`"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(make_recipe, sections, message):
    with pytest.raises(UserError, match=message):
        make_recipe(**({"task": "reward", "objective": {"name": "bradley_terry"}} | sections))


def test_ratings_that_cannot_work_are_refused_before_training(make_recipe, rated_file, tmp_path):
    options = {"task": "reward", "data": {"sources": [str(rated_file)]}, "objective": {"name": "attributes"}}
    with pytest.raises(UserError, match="no row rates depth"):
        train(make_recipe("a", **options, reward={"outputs": ["threes", "depth"]}))
    soft = options | {"objective": {"name": "attributes", "form": "soft_bins"}, "reward": {"outputs": ["threes"]}}
    with pytest.raises(UserError, match="rated.jsonl, row .* needs 1 to 5"):
        train(make_recipe("b", **soft))
    with pytest.raises(UserError, match="merge the adapter first"):
        load_reward_model(PolicySection(model="x", start_adapter="y"), outputs=["reward"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "w5", "chosen": " w3", "rejected": " w4", "margin": -1}) + "\n")
    with pytest.raises(UserError, match="row 1, field margin: a strength of -1"):
        train(make_recipe("d", task="reward", data={"sources": [str(bad)]}, objective={"name": "bradley_terry"}))


def test_strengths_and_attributes_stay_with_their_completions(tiny_policy, tmp_path):
    """A list that is reduced, and a completion that is dropped, keep the ratings of the others."""
    from transformers import PreTrainedTokenizerFast as Fast

    from align.data import Wanted, prepare_data
    from align.data.config import DataSection
    from align.data.ratings import with_ratings

    rows = tmp_path / "rows.jsonl"
    items = [{"text": " w3", "grade": 3, "scores": {"a": 0.0, "b": None}}] + [
        {"text": " w4" * (9 if n == 2 else n), "grade": -n, "scores": {"a": float(n), "b": n / 10}} for n in range(1, 5)
    ]
    rows.write_text(json.dumps({"prompt": "w5", "items": items, "margin": 2, "std": [0.0, 0.1, 0.2, 0.3, 0.4]}) + "\n")
    tokenizer = Fast.from_pretrained(tiny_policy)
    section = DataSection(sources=str(rows), eval_fraction=0.0, max_length=8, overlong="drop_completion")
    for select, expected in (("all", [0, 1, 3, 4]), ("best_worst", [0, 4])):
        data = section.model_copy(update={"select": select})
        prepared = prepare_data(data, tokenizer, wanted=Wanted(as_scored=True))
        options_of_rows = {"names": ["a", "b"], "strength": "margin", "sets": {str(rows): 0}, "deviation": "std"}
        (example,) = with_ratings(prepared.train, prepared.train_rows, **options_of_rows)
        assert example["deviations"] == [[n / 10] * 2 for n in expected]
        assert [a for a, _ in example["attributes"]] == expected and example["strength"] == 2.0
        assert math.isnan(example["attributes"][0][1]) and example["attributes"][-1][1] == 0.4
        assert [len(ids) for ids in example["completion_ids"]] == [max(1, n) for n in expected]


@pytest.mark.parametrize(("kind", "read"), [("decoder", "at the last token"), ("bert", "of the whole text")])
def test_inspect_says_where_a_reward_is_read(reward_recipe, tmp_path, capsys, kind, read):
    policy = (
        {} if kind == "decoder" else {"policy": {"model": str(_encoder(kind, tmp_path)), "adapter": {"name": "full"}}}
    )
    inspect_recipe(reward_recipe(**policy), rows=1)
    out = capsys.readouterr().out
    assert f"tokens, its reward {read}" in out and "trained on" not in out


def test_the_shipped_recipes_load():
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("reward_*.yaml")):
        assert load_recipe(path).task == "reward"


def test_dataset_columns_are_what_collate_reads(reward_recipe):
    model = load_reward_model(reward_recipe().policy, outputs=["a", "b"])
    lists = Dataset.from_list([{"prompt_ids": [1], "completion_ids": [[3], [4, 5]], "grades": [1.0, 0.0],
        "attributes": [[1.0, math.nan], [2.0, 3.0]], "strength": math.nan, "set": -1}])  # fmt: skip
    batch = model.collate(list(lists))
    assert batch.attributes.shape == (2, 2) and batch.attributes[0, 1].isnan() and batch.strengths.isnan().all()
    assert model.scorer()(batch).shape == (2, 2)
