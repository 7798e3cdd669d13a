"""Token rewards, CHES and the filter on whole recipes: values by hand, identical after kills, counted."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from align.cli import main
from align.errors import UserError
from align.model import reference, value_cache
from align.model.config import PolicySection
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.recipe import dump_recipe
from align.runs.build import prepare
from align.training.annotate import annotate, annotate_lists, filter_by_ches, list_ches
from align.training.train import train

CONTRAST = {"name": "contrast", "better": "w30 {prompt}", "worse": "w31 w32 {prompt}"}
TREG = {"regularizer": {"name": "token_reg"}, "token_rewards": CONTRAST}


@pytest.fixture
def annotated(tiny_policy):
    """The lists of a recipe with all its columns."""

    def annotate_recipe(recipe, **options):
        policy = load_policy(
            PolicySection(model=str(tiny_policy), adapter=recipe.policy.adapter),
            LoadOptions(packing=recipe.train.packing),
        )
        return annotate_lists(recipe, policy, prepare(recipe), **{"reference": True, "ches": True} | options)

    return annotate_recipe


@torch.no_grad()
def run_alone(model, prompt: list[int], completion: list[int]):
    """Log-probabilities of a completion's tokens and the hidden states that predict them; one sequence, no packing."""
    out = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
    places = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    logprobs = out.logits[0, places].double().log_softmax(-1)
    return logprobs[range(len(completion)), completion], out.hidden_states[-1][0, places].double()


@pytest.fixture
def model(tiny_policy):
    return AutoModelForCausalLM.from_pretrained(tiny_policy)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("worse", ["w31 w32 {prompt}", "w31 {response} {prompt}"])
def test_token_rewards_are_the_formula_on_separate_sequences(make_recipe, annotated, model, packing, worse):
    contrast = CONTRAST | {"worse": worse}
    recipe = make_recipe(**TREG | {"token_rewards": contrast}, train={"packing": packing, "tokens_per_batch": 90})
    lists = annotated(recipe).train
    largest = 0.0
    for row in lists:
        for ids, rewards in zip(row["completion_ids"], row["token_rewards"], strict=True):
            answer = ids[:-1] if ids[-1] == 2 else ids
            other = [31, 32] if "response" not in worse else [31, *answer]
            better, _ = run_alone(model, [30, *row["prompt_ids"]], ids)
            against, _ = run_alone(model, [*other, *row["prompt_ids"]], ids)
            expected = 1 / (1 + torch.exp(-(better - against))) - 0.5
            assert rewards == pytest.approx(expected.tolist(), abs=1e-5)
            largest = max(largest, *map(abs, rewards))
    assert largest > 0.01, "the contexts say something"


def test_ches_is_the_definition_on_hidden_states_of_separate_sequences(make_recipe, annotated, model):
    """T vectors of the last layer, from the last prompt token up to, not including, the last completion token."""
    lists = annotated(make_recipe()).train
    for row in lists:
        sums = [run_alone(model, row["prompt_ids"], ids)[1].sum(dim=0) for ids in row["completion_ids"]]
        best = row["grades"].index(max(row["grades"]))
        others = [k for k, grade in enumerate(row["grades"]) if grade < row["grades"][best]]
        lengths = [len(ids) for ids in row["completion_ids"]]
        square = (sums[best] @ sums[best]).item()
        plain = [(sums[best] @ sums[k]).item() - square for k in others]
        means = [(sums[best] @ sums[k]).item() / (lengths[best] * lengths[k]) for k in others]
        assert row["ches"] == pytest.approx(plain, rel=1e-4, abs=1e-3)
        assert row["ches_normalised"] == pytest.approx([m - square / lengths[best] ** 2 for m in means], abs=1e-4)


def test_token_rewards_of_a_trained_model_are_its_log_ratio(make_recipe, annotated, tiny_policy, model):
    trained = train(make_recipe("dpo", train={"steps": 3, "learning_rate": 0.1}))
    source = {"name": "log_ratio", "model": str(trained.path)}
    lists = annotated(make_recipe(regularizer={"name": "token_reg"}, token_rewards=source)).train
    raw = annotated(make_recipe(token_weights={"name": "tgdpo"}, token_rewards=source | {"squash": False})).train
    tuned = load_policy(PolicySection(model=str(tiny_policy), start_adapter=str(trained.path / "adapter"))).model
    largest = 0.0
    for row, other in zip(lists, raw, strict=True):
        for k, ids in enumerate(row["completion_ids"]):
            ratio = run_alone(tuned, row["prompt_ids"], ids)[0] - run_alone(model, row["prompt_ids"], ids)[0]
            assert other["token_rewards"][k] == pytest.approx(ratio.tolist(), abs=1e-4)
            assert row["token_rewards"][k] == pytest.approx((ratio.sigmoid() - 0.5).tolist(), abs=1e-5)
            largest = max(largest, ratio.abs().max().item())
    assert largest > 0.1


def everything(cache: Path) -> dict[tuple[str, bytes], np.ndarray]:
    found = {}
    for file in cache.rglob("*.safetensors"):
        tensors = load_file(file)
        values = np.split(tensors["values"], np.cumsum(tensors["sizes"])[:-1])
        for key, own in zip(tensors["keys"], values, strict=True):
            assert (file.parent.name, key.tobytes()) not in found, "nothing is stored twice"
            found[file.parent.name, key.tobytes()] = own
    return found


def test_values_do_not_depend_on_where_a_run_was_killed(make_recipe, annotated, monkeypatch, tmp_path):
    """Bit for bit: a run that was killed after each of its first writes, and one that was not."""
    monkeypatch.setattr(reference, "SHARD_VALUES", 30)
    monkeypatch.setattr(reference, "BLOCK", 7)

    def run(cache: str, deaths: int):
        recipe = make_recipe(**TREG, train={"tokens_per_batch": 70}, reference={"cache_dir": str(tmp_path / cache)})
        write = value_cache._write
        for _ in range(deaths):
            written = []

            def once(folder, part, written=written):
                if len(written) == 3:
                    raise KeyboardInterrupt
                written.append(folder)
                write(folder, part)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(value_cache, "_write", once)
                annotated(recipe)
        annotated(recipe)
        return everything(tmp_path / cache)

    whole, killed = run("undisturbed", 0), run("disturbed", 4)
    assert whole.keys() == killed.keys()
    assert all(np.array_equal(whole[key], killed[key]) for key in whole)


def test_the_command_fills_the_cache_that_training_reads(make_recipe, tmp_path, capsys, monkeypatch):
    recipe = make_recipe(**TREG, sampling={"prompts": 0, "token_lists": 2}, train={"steps": 2})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    main(["annotate", str(path)])
    out = capsys.readouterr().out
    assert "mean |token reward|" in out and "CHES" in out
    monkeypatch.setattr(value_cache, "_write", lambda folder, part: pytest.fail("computed again"))
    result = train(recipe)
    figures = result.summary["annotation"]
    assert 0 < figures["mean_abs_token_reward"] < 0.5 and 0 <= figures["share_above_0.05"] <= 1
    view = [json.loads(line) for line in (result.path / "token_view.jsonl").read_text().splitlines()]
    for completion in (c for line in view for c in line["completions"]):
        assert len(completion["token_rewards"]) == len(completion["tokens"])
    displacement = result.summary["displacement"]
    assert displacement["lists"] == 6
    assert displacement["fell_share"] == pytest.approx(result.summary["eval_after"]["best_fell_share"])


def test_a_contrast_that_says_nothing_is_named(make_recipe, caplog):
    same = {"name": "contrast", "better": "w30 {prompt}", "worse": "w30 {prompt}"}
    with caplog.at_level(logging.WARNING, logger="align"):
        logging.getLogger("align").propagate = True
        annotate(make_recipe(regularizer={"name": "token_reg"}, token_rewards=same))
    assert "the contrast does nothing" in caplog.text and "token_rewards.better" in caplog.text


@pytest.mark.parametrize("rule", [{"keep_fraction": 0.25}, {"threshold": "median"}])
@pytest.mark.parametrize("other_weight", [0.0, 0.3])
def test_the_filter_keeps_the_lowest_and_counts_the_others(make_recipe, annotated, rule, other_weight):
    plain = annotated(make_recipe()).train
    scores = list_ches(plain)
    if "threshold" in rule:
        rule = {"threshold": float(np.median(scores))}
        expected = sorted(i for i, score in enumerate(scores) if score <= rule["threshold"])
    else:
        expected = sorted(np.argsort(scores)[: len(scores) // 4].tolist())
    recipe = make_recipe(data={"ches": rule | {"other_weight": other_weight}})
    prepared = prepare(recipe)
    kept = filter_by_ches(recipe, prepared, annotated(recipe).train)
    audit = prepared.audit.to_dict()
    if other_weight:
        assert len(kept) == len(plain)
        assert [i for i, weight in enumerate(kept["weight"]) if weight == 1.0] == expected
        assert {weight for weight in kept["weight"] if weight != 1.0} == {other_weight}
        assert audit["down_weighted"] == len(plain) - len(expected)
    else:
        assert kept["id"][:] == [plain["id"][i] for i in expected]
        (count,) = [n for reason, n in audit["refused"].items() if "CHES" in reason]
        assert count == len(plain) - len(expected) and audit["train_lists"] == len(expected)
        assert audit["used"] + count == audit["read"]


def test_training_is_on_the_kept_lists_alone(make_recipe):
    result = train(make_recipe(data={"ches": {"keep_fraction": 0.25}}, train={"lists_per_step": 3, "epochs": 1}))
    assert result.summary["data"]["train_lists"] == 6 and result.summary["steps"] == 2


def test_a_threshold_below_every_list_is_a_user_s_mistake(make_recipe):
    with pytest.raises(UserError, match=r"data.ches.threshold: no list has a score of -1e\+09 or less; the lowest is"):
        train(make_recipe(data={"ches": {"threshold": -1e9}}))


def test_a_run_that_has_not_finished_gives_no_token_rewards(make_recipe, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "recipe.yaml").write_text("")
    source = {"name": "log_ratio", "model": str(tmp_path / "half")}
    with pytest.raises(UserError, match=r"token_rewards.model: .*half: the run has not finished"):
        annotate(make_recipe(regularizer={"name": "token_reg"}, token_rewards=source))


@pytest.mark.parametrize(
    "sections",
    [{"regularizer": {"name": "token_reg"}}, {"token_weights": {"name": "tgdpo"}}],
    ids=["token_reg", "tgdpo"],
)
def test_a_step_with_token_rewards_is_the_same_however_it_is_cut(make_recipe, sections):
    sections = sections | {"token_rewards": CONTRAST, "sampling": {"prompts": 0}}
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "epochs": 1}
    whole = train(make_recipe("whole", **sections, train=sgd | {"tokens_per_batch": 10**6}))
    cut = train(make_recipe("cut", **sections, train=sgd | {"tokens_per_batch": 1}))
    base = train(make_recipe("base", train=sgd, sampling={"prompts": 0}))
    paths = [result.path / "adapter" / "adapter_model.safetensors" for result in (whole, cut, base)]
    tensors = [load_file(path) for path in paths]
    for name, own in tensors[0].items():
        np.testing.assert_allclose(own, tensors[1][name], rtol=1e-4, atol=1e-6)
    assert max(np.abs(own - tensors[2][name]).max() for name, own in tensors[0].items()) > 1e-5, "it does something"


def test_alpha_zero_trains_the_base_objective_bit_for_bit(make_recipe):
    base = train(make_recipe("base", train={"steps": 3}, sampling={"prompts": 0}))
    zero = train(
        make_recipe(
            "zero",
            regularizer={"name": "token_reg", "alpha": 0.0},
            token_rewards=CONTRAST,
            train={"steps": 3},
            sampling={"prompts": 0},
        )
    )
    files = [result.path / "adapter" / "adapter_model.safetensors" for result in (base, zero)]
    assert files[0].read_bytes() == files[1].read_bytes()
