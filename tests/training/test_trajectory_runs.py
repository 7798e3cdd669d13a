"""Whole runs on lists of which only some tokens are learnt: what must not change the result, and what is written."""

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.evaluate.rows import evaluate_rows
from align.model import reference
from align.model.config import PolicySection
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.report.page import render
from align.report.reading import read_run
from align.runs.build import prepare
from align.training import parts
from align.training.annotate import annotate_lists
from align.training.baseline import Baseline
from align.training.train import train

CONTRAST = {"name": "contrast", "better": "w30 {prompt}", "worse": "w31 w32 {prompt}"}
TIMES = {"seconds", "lists_per_second", "completion_tokens_per_second", "crc32"}


def some(k: int, size: int) -> list[int]:
    """Two of three tokens; of the shortest completions the last alone."""
    return [p for p in range(size) if (p + k) % 3] or [size - 1]


def every(k: int, size: int) -> list[int]:
    return list(range(size))


def with_places(lists, chosen: Callable[[int, int], list[int]], weight: float | None = None):
    """The lists with the column that says what is learnt, and perhaps one of what every second of it weighs."""
    places = [[chosen(k, len(ids)) for k, ids in enumerate(own)] for own in lists["completion_ids"][:]]
    lists = lists.add_column("learn_at", places)
    if weight is None:
        return lists
    own = [[[weight if t % 2 else 1.0 for t in range(len(at))] for at in row] for row in places]
    return lists.add_column("token_weights", own)


@pytest.fixture
def run(make_recipe, monkeypatch):
    """Trains a recipe on lists that a rule says what is learnt of."""

    def start(output: str, chosen: Callable | None, *, weight: float | None = None, **sections):
        def prepared(recipe):
            found = prepare(recipe)
            if chosen is None:
                return found
            own = {name: with_places(getattr(found, name), chosen, weight) for name in ("train", "heldout")}
            return replace(found, **own)

        monkeypatch.setattr(parts, "prepare", prepared)
        sections["train"] = {"steps": 3, "lists_per_step": 6} | sections.get("train", {})
        sections["sampling"] = {"prompts": 0} | sections.get("sampling", {})
        return train(make_recipe(output, **sections)).path

    return start


def lines(path) -> list[dict]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def adapter(path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter/adapter_model.safetensors")


RECIPES = {
    "lambda": {},
    "padded, live": {"train": {"packing": False}, "reference": {"cache": False}},
    "ld-dpo, wpo": {"score": {"name": "length_desensitised"}, "objective": {"name": "logistic"}, "wpo": "clamped"},
    "t-reg": {"regularizer": {"name": "token_reg"}, "token_rewards": CONTRAST},
    "kto": {"objective": {"name": "kto"}},
    "simpo": {"score": {"name": "likelihood_mean"}, "objective": {"name": "logistic", "margin": 0.5}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_where_everything_is_learnt_a_run_is_the_one_without_the_column_bit_for_bit(run, name):
    with_it, without = run("with", every, **RECIPES[name]), run("without", None, **RECIPES[name])
    assert lines(with_it) == lines(without)
    own, other = adapter(with_it), adapter(without)
    assert all(torch.equal(own[key], other[key]) for key in other)


@pytest.mark.parametrize(("name", "weight"), [("lambda", None), ("t-reg", 0.5), ("kto", 0.5)])
def test_neither_cache_nor_packing_nor_the_cut_of_a_step_changes_a_run(run, name, weight):
    """`tokens_per_batch: 1` also cuts every list into its completions."""
    sgd = {"optimizer": "sgd", "learning_rate": 0.1}
    ways = {
        "cached": {},
        "live": {"reference": {"cache": False}},
        "padded": {"train": {"packing": False}},
        "cut": {"train": {"tokens_per_batch": 1}},
    }
    found = {}
    for way, sections in ways.items():
        sections = sections | {"train": sgd | sections.get("train", {})}
        if name == "t-reg" and way == "live":
            continue  # token rewards are computed beforehand in every way
        found[way] = run(way, some, weight=weight, **RECIPES[name] | sections)
    for way, path in found.items():
        for key, tensor in adapter(found["cached"]).items():
            assert_close(adapter(path)[key], tensor, rtol=1e-3, atol=2e-6, msg=lambda m, w=way, k=key: f"{w}, {k}: {m}")
        for a, b in zip(lines(path), lines(found["cached"]), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), way


@torch.no_grad()
def alone(model, prompt: list[int], ids: list[int], at: list[int]):
    """Log-probabilities of the tokens at these places, and the hidden states that predict them; float64, no packing."""
    out = model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
    places = [len(prompt) + p - 1 for p in at]
    return out.logits[0].log_softmax(-1)[places, [ids[p] for p in at]], out.hidden_states[-1][0, places]


@pytest.mark.parametrize("worse", ["w31 w32 {prompt}", "w31 {response} {prompt}"])
def test_columns_of_frozen_models_are_of_the_learnt_tokens(make_recipe, tiny_policy, worse):
    recipe = make_recipe(regularizer={"name": "token_reg"}, token_rewards=CONTRAST | {"worse": worse})
    found = prepare(recipe)
    found = replace(found, train=with_places(found.train, some), heldout=with_places(found.heldout, some))
    policy = load_policy(PolicySection(model=str(tiny_policy), adapter=recipe.policy.adapter), LoadOptions())
    lists = annotate_lists(recipe, policy, found, reference=True, ches=True).train
    model = AutoModelForCausalLM.from_pretrained(tiny_policy).double()
    for row in lists:
        prompt, sums, counts = row["prompt_ids"], [], []
        for k, (ids, at) in enumerate(zip(row["completion_ids"], row["learn_at"], strict=True)):
            logprobs, hidden = alone(model, prompt, ids, at)
            assert row["reference_logprobs"][k] == pytest.approx(logprobs.tolist(), abs=1e-5)
            answer = ids[:-1] if ids[-1] == 2 else ids
            other = [31, 32] if "response" not in worse else [31, *answer]
            ratio = alone(model, [30, *prompt], ids, at)[0] - alone(model, [*other, *prompt], ids, at)[0]
            assert row["token_rewards"][k] == pytest.approx((ratio.sigmoid() - 0.5).tolist(), abs=1e-5)
            sums.append(hidden.sum(dim=0))
            counts.append(len(at))
        best = row["grades"].index(max(row["grades"]))
        others = [k for k, grade in enumerate(row["grades"]) if grade < row["grades"][best]]
        square = sums[best] @ sums[best]
        plain = [(sums[best] @ sums[k] - square).item() for k in others]
        means = [sums[best] @ sums[k] / counts[best] / counts[k] - square / counts[best] ** 2 for k in others]
        assert row["ches"] == pytest.approx(plain, rel=1e-4, abs=1e-3)
        assert row["ches_normalised"] == pytest.approx([m.item() for m in means], abs=1e-4)


def test_a_cache_from_before_serves_the_lists_of_which_all_is_learnt(run, monkeypatch):
    computed = []
    original = reference._Lists.missing
    monkeypatch.setattr(
        reference._Lists, "missing", lambda self, *args: computed.append(found := original(self, *args)) or found
    )

    def lists_computed() -> int:
        count = sum(len(block) for blocks in computed for block in blocks)
        computed.clear()
        return count

    run("before", None)
    assert lists_computed() == 30
    run("all", every)
    assert lists_computed() == 0
    run("some", some)
    assert lists_computed() == 30
    run("again", some)
    assert lists_computed() == 0


@pytest.mark.parametrize("weight", [None, 0.5])
def test_ktos_baseline_is_of_the_learnt_tokens_of_the_next_rows_completion(run, tiny_policy, monkeypatch, weight):
    known = []
    original = Baseline.of_step

    def baseline(self):
        value = original(self)
        trainer = self.trainer
        rows = [trainer.lists[row] for row in trainer.plan[trainer.state.global_step]]
        state = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
        known.append((value.item(), rows, state))
        return value

    monkeypatch.setattr(Baseline, "of_step", baseline)
    policy = {"adapter": {"name": "full"}}
    run("kto", some, weight=weight, objective={"name": "kto"}, policy=policy, train={"learning_rate": 1e-2})
    models = [AutoModelForCausalLM.from_pretrained(tiny_policy).double() for _ in range(2)]
    assert len(known) == 3 and known[-1][0] > 0.01
    for value, rows, state in known:
        models[0].load_state_dict(state)
        total = 0.0
        for place, row in enumerate(rows):
            other = rows[(place + 1) % len(rows)]
            read = (row["prompt_ids"], other["completion_ids"][0], other["learn_at"][0])
            ratio = alone(models[0], *read)[0] - alone(models[1], *read)[0]
            weights = torch.tensor(other["token_weights"][0] if weight else [1.0] * len(ratio))
            total += (weights * ratio).sum().item()
        assert value == pytest.approx(max(0.0, total / len(rows)), rel=1e-4, abs=1e-5)


def test_a_reward_model_reads_the_end_of_the_trajectory_whatever_is_learnt(run):
    """`not_last` leaves the last token out, whose hidden state the reward is read at."""
    sections = {"task": "reward", "objective": {"name": "bradley_terry"}}
    without = run("without", None, **sections)
    for name, chosen in {"some": some, "not_last": lambda k, size: list(range(max(size - 1, 1)))}.items():
        path = run(name, chosen, **sections)
        assert lines(path) == lines(without)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_the_token_view_has_null_for_what_is_read_only(run, tiny_policy, weight):
    options = {"sampling": {"token_lists": 2}, "score": {"name": "log_ratio", "beta": 0.5}}
    path = run("shown", some, weight=weight, **options)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy).double()
    shown = [json.loads(line) for line in (path / "token_view.jsonl").read_text().splitlines()]
    assert len(shown) == 2
    for line in shown:
        prompt = [int(word[1:]) for word in line["prompt"].split() if word[0] == "w"]
        for k, own in enumerate(line["completions"]):
            words = [token.strip() for token in own["tokens"]]
            ids = [2 if word == "</s>" else int(word[1:]) for word in words]
            at = some(k, len(ids))
            expected = alone(model, prompt, ids, at)[0].tolist()
            assert [own["logprob_before"][p] for p in at] == pytest.approx(expected, abs=1e-4)
            weights = [weight if weight and t % 2 else 1.0 for t in range(len(at))]
            changes = [w * 0.5 * (own["logprob_after"][p] - e) for w, p, e in zip(weights, at, expected, strict=True)]
            assert [own["implicit_after"][p] for p in at] == pytest.approx(changes, abs=1e-4)
            for name in ("logprob_before", "logprob_after", "implicit_before", "implicit_after"):
                assert [p for p, value in enumerate(own[name]) if value is not None] == at
    assert "read and not learnt" in render([read_run(path)])


def test_the_heldout_loss_is_of_what_training_keeps_of_a_list(run):
    """SimPO on the best and the worst completion, from the token view's values of before the first step."""
    simpo = RECIPES["simpo"] | {"data": {"select": "best_worst"}, "sampling": {"token_lists": 6}}
    path = run("heldout", some, **simpo)
    losses = []
    for line in map(json.loads, (path / "token_view.jsonl").read_text().splitlines()):
        means = [
            torch.tensor([v for v in own["logprob_before"] if v is not None]).mean() for own in line["completions"]
        ]
        best, worst = (line["grades"].index(end(line["grades"])) for end in (max, min))
        losses.append(-torch.nn.functional.logsigmoid(2.0 * (means[best] - means[worst]) - 0.5).item())
    summary = json.loads((path / "summary.json").read_text())
    assert len(losses) == 6
    assert summary["eval_before"]["loss"] == pytest.approx(sum(losses) / 6, abs=1e-4)


TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w36', 'assistant': 'w37', 'tool': 'w38'}[m.role] }} {{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w37 {% endif %}"
)


def conversations(path, count: int, seed: int) -> list[dict]:
    """Rows of two to five trajectories: answer, tool or user, answer, perhaps once more; some messages weigh half."""
    draw = random.Random(seed)

    def said(role: str) -> dict:
        words = [f"w{draw.randint(3, 30)}" for _ in range(draw.randint(1, 5))]
        weight = {"weight": draw.choice([0, 0.5, 0.5])} if role == "assistant" and draw.random() < 0.4 else {}
        return {"role": role, "content": " ".join(words)} | weight

    def trajectory() -> list[dict]:
        roles = ["assistant", draw.choice(["tool", "user"])] * draw.randint(0, 2)
        return [*map(said, roles), {k: v for k, v in said("assistant").items() if k != "weight"}]

    rows = []
    for n in range(count):
        completions = [trajectory() for _ in range(2 if n % 2 else 5)]
        grades = [float(k) for k in draw.sample(range(9), len(completions))]
        rows.append({"id": str(n), "prompt": [said("user")], "completions": completions, "grades": grades})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def mean_of(model, prompt: list[dict], completion: list[dict]) -> torch.Tensor:
    """The mean log-probability of what the assistant generates, by its messages' weights; turn by turn, in float64."""

    def ids(text: str) -> list[int]:
        return [2 if word == "</s>" else int(word[1:]) for word in text.split()]

    names = {"user": "w36", "assistant": "w37", "tool": "w38"}
    context = [i for m in prompt for i in ids(f"{names[m['role']]} {m['content']} </s>")]
    total, weights = 0.0, 0.0
    for message in completion:
        context += ids(names[message["role"]])
        written = ids(f"{message['content']} </s>")
        if message["role"] == "assistant":
            logprobs, _ = alone(model, context, written, list(range(len(written))))
            total = total + message.get("weight", 1.0) * logprobs.sum()
            weights += message.get("weight", 1.0) * len(written)
        context += written
    return total / weights


@pytest.mark.parametrize("packing", [True, False])
def test_conversations_train_on_what_the_assistant_wrote_and_are_measured_so(
    make_recipe, tiny_policy, tmp_path, packing, capsys
):
    (tmp_path / "turns.jinja").write_text(TEMPLATE)
    rows = {name: conversations(tmp_path / f"{name}.jsonl", 8, seed) for seed, name in enumerate(("train", "heldout"))}
    recipe = make_recipe(
        "turns",
        policy={"model": str(tiny_policy), "chat_template": str(tmp_path / "turns.jinja")},
        data={"sources": [str(tmp_path / "train.jsonl")], "eval_sources": [str(tmp_path / "heldout.jsonl")]}
        | {"eval_fraction": 0.0},
        score={"name": "likelihood_mean", "beta": 2.0},
        objective={"name": "logistic"},
        train={"lists_per_step": 8, "steps": 2, "packing": packing},
        sampling={"prompts": 0},
    )
    run = train(recipe)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy).double()
    expected = {}
    for name, own in rows.items():
        losses = []
        for row in own:
            scores = [2.0 * mean_of(model, row["prompt"], completion) for completion in row["completions"]]
            pairs = [(i, j) for i, a in enumerate(row["grades"]) for j, b in enumerate(row["grades"]) if a > b]
            losses.append(sum(-torch.nn.functional.logsigmoid(scores[i] - scores[j]).item() for i, j in pairs))
        expected[name] = sum(losses) / len(losses)
    assert lines(run.path)[0]["loss"] == pytest.approx(expected["train"], rel=2e-5)
    assert run.summary["eval_before"]["loss"] == pytest.approx(expected["heldout"], rel=2e-5)
    found = evaluate_rows(str(tmp_path / "heldout.jsonl"), model=str(run.path))
    for name, value in run.summary["eval_after"].items():
        if name in found:
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert "loss" in found
