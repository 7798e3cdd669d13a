"""`align rollout` with the engine that runs everywhere."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.data.sources import read_source
from align.errors import UserError
from align.model.adapters import Lora
from align.model.config import PolicySection
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.rollout.agreement import check_agreement
from align.rollout.engine import Sampling, Weights
from align.rollout.journal import read_lines
from align.rollout.sample import rewards_of, rollout
from align.rollout.transformers_engine import TransformersEngine
from align.training.train import train

SAMPLING = Sampling(completions=2, max_tokens=6, seed=1, temperature=0.7, stop_ids=(2,))
PROMPTS = [[5, 6, 7], [9], [8, 3, 4, 4]]


def transformers_engine(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformersEngine(folder, tokenizer, dtype="float32", tokens_per_batch=64, trusted=False)


def adapter(base, folder, seed):
    """An adapter of random weights."""
    policy = load_policy(PolicySection(model=str(base), adapter=Lora(rank=4)), LoadOptions(seed=seed))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    policy.save_adapter(folder)
    return policy


def test_rows_are_what_the_policy_wrote(online_recipe, scorer, untied):
    path = rollout(online_recipe(online=None))
    lines = list(read_lines(path))
    assert [line["id"] for line in lines] == [f"p{i}" for i in range(12)]
    model = AutoModelForCausalLM.from_pretrained(untied)
    tokenizer = AutoTokenizer.from_pretrained(untied)
    for number, line in enumerate(lines):
        assert line["meta"] == {"answer": number} and line["policy_version"] == 0
        assert line["prompt_ids"] == tokenizer(line["prompt"])["input_ids"]
        assert line["rewards"] == scorer.score([line["prompt"]] * 3, line["completions"])
        for text, ids, logprobs, ended in zip(
            line["completions"], line["completion_ids"], line["sampled_logprobs"], line["ended"], strict=True
        ):
            assert text.split() == [f"w{i}" for i in ids if i > 2]
            assert ended == (ids[-1] == 2) and (ended or len(ids) == 8)
            whole = torch.tensor([line["prompt_ids"] + ids])
            with torch.no_grad():
                exact = model(input_ids=whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            expected = exact.gather(1, whole[0, -len(ids) :, None]).squeeze(1)
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert line["raw_logprobs"] == line["sampled_logprobs"]  # at temperature 1, without filters
    entropies = [own for line in lines for one in line["entropies"] for own in one]
    assert len(entropies) == sum(len(ids) for line in lines for ids in line["completion_ids"])
    stages = json.loads((path.parent / "stages.json").read_text())
    assert stages["sample"]["tokens"] == len(entropies)
    assert stages["sample"]["entropy"] == pytest.approx(sum(entropies) / len(entropies))
    assert {len(set(map(tuple, line["completion_ids"]))) for line in lines} == {3}


def test_a_training_is_not_sampled_in_its_own_folder(online_recipe, tmp_path):
    recipe = online_recipe(online=None)
    Path(recipe.output, "iterations").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a training; to sample it set policy.start_run="):
        rollout(recipe)


def test_training_reads_the_ids_that_were_sampled(online_recipe, scorer):
    path = rollout(online_recipe(online=None))
    found = read_source(str(path)).rows
    assert [list(row.completion_ids) for row in found] == [line["completion_ids"] for line in read_lines(path)]
    assert found[3].rewards == tuple(scorer.score([""] * 3, found[3].completions))


def test_a_killed_rollout_goes_on_to_the_same_file(online_recipe, scorer):
    whole = rollout(online_recipe("whole", online=None))
    content = whole.read_bytes()
    sampled = (whole.parent / "sampled.jsonl").read_bytes().splitlines(keepends=True)
    for kept, torn in ((0, b""), (5, sampled[5][:40]), (12, b"")):
        recipe = online_recipe(f"killed{kept}", online=None)
        folder = whole.parents[1].parent / f"killed{kept}" / "rollout"
        folder.mkdir(parents=True)
        rollout_files(recipe)
        (folder / "sampled.jsonl.partial").write_bytes(b"".join(sampled[:kept][::-1]) + torn)
        assert rollout(recipe).read_bytes() == content
    calls = []
    scorer.score, real = lambda *both: calls.append(both) or real(*both), scorer.score
    assert rollout(online_recipe("whole", online=None)).read_bytes() == content and not calls


def rollout_files(recipe):
    """The files that a run writes before it samples."""
    from align.runs.run_directory import RunDirectory

    folder = RunDirectory(recipe.output)
    held = folder.path / "rollout"
    held.rename(folder.path.with_name("held"))
    folder.path.rmdir()
    folder.open(recipe)
    folder.path.with_name("held").rename(held)


def test_a_kill_while_scoring_costs_no_list_twice(online_recipe, scorer, monkeypatch):
    monkeypatch.setattr("align.rollout.sample.SCORED_AT_ONCE", 5)
    whole = rollout(online_recipe("whole", online=None)).read_bytes()
    real, calls = scorer.score, []

    def dies(prompts, completions):
        calls.append(len(completions))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(prompts, completions)

    scorer.score = dies
    with pytest.raises(KeyboardInterrupt):
        rollout(online_recipe("killed", online=None))
    assert rollout(online_recipe("killed", online=None)).read_bytes() == whole
    assert calls == [15, 15, 15, 6]


def test_conversations_and_stop_texts(online_recipe, scorer, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} w9 {% endfor %}")
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "w4 w5"}]}) + "\n")
    recipe = online_recipe(
        online=None,
        data={"sources": [str(file)]},
        policy={"chat_template": str(template)},
        rollout={"stop": ["w2"], "completions": 30, "reward": None, "adaptive_temperature": True},
    )
    [line] = read_lines(rollout(recipe))
    assert line["prompt_ids"] == [4, 5, 9] and line["prompt"][0]["content"] == "w4 w5" and "rewards" not in line
    texts = [completion[0]["content"] for completion in line["completions"]]
    assert not any("w2" in text for text in texts)
    stopped = [ids for ids, ended in zip(line["completion_ids"], line["ended"], strict=True) if ended]
    drawn, raw = (sum(line[name], []) for name in ("sampled_logprobs", "raw_logprobs"))
    assert sum(drawn) > sum(raw) + 0.1 * len(raw), "an adaptive temperature was asked for, and the policy is uncertain"
    assert any(ids[-1] in range(20, 30) for ids in stopped) and all(ids[-1] == 2 or ids[-1] >= 20 for ids in stopped)


def test_vllm_that_is_not_there(online_recipe, monkeypatch):
    monkeypatch.setattr("align.export.vllm_start.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="align doctor --install rollout.*rollout.engine=transformers"):
        rollout(online_recipe(online=None, rollout={"engine": "vllm"}))
    with pytest.raises(UserError, match="rollout.engine=transformers"):
        train(online_recipe(rollout={"engine": "vllm"}))
    assert not Path(online_recipe().output).exists()  # so that the same command with another engine can go on


def test_an_engine_with_the_policys_weights_agrees_and_one_without_is_found_out(untied, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)  # a run in this process has turned that off
    policy, engine = adapter(untied, tmp_path / "v1", 1), transformers_engine(untied)
    engine.load(Weights("adapter", str(tmp_path / "v1"), 1, "v1"))
    found = check_agreement(engine, policy, PROMPTS, SAMPLING, bound=None)
    assert found.max < 1e-4 and found.tokens >= 6 and not caplog.records
    policy = adapter(untied, tmp_path / "v2", 2)
    assert check_agreement(engine, policy, PROMPTS, SAMPLING, bound=None).max > 0.1  # a stale adapter
    assert "differ from the trainer's by up to" in caplog.text
    engine.load(Weights("adapter", str(tmp_path / "v2"), 2, "v2"))
    assert check_agreement(engine, policy, PROMPTS, SAMPLING, bound=None).max < 1e-4
    adaptive = replace(SAMPLING, adaptive_temperature=True)
    assert check_agreement(engine, policy, PROMPTS, adaptive, bound=None).max < 1e-4
    caplog.clear()
    check_agreement(engine, policy, PROMPTS, SAMPLING, bound=1e-12)
    assert "bound 1e-12" in caplog.text


def test_agreement_notices_logprobs_without_the_temperature(untied, tmp_path, monkeypatch):
    policy, engine = adapter(untied, tmp_path / "v1", 1), transformers_engine(untied)
    engine.load(Weights("adapter", str(tmp_path / "v1"), 1, "v1"))
    real = engine.sample
    monkeypatch.setattr(engine, "sample", lambda prompts, sampling: real(prompts, replace(sampling, temperature=1.0)))
    assert check_agreement(engine, policy, PROMPTS, SAMPLING, bound=None).max > 0.05


def test_equal_completions_are_refused_before_any_work(online_recipe):
    with pytest.raises(UserError, match="temperature 0 gives equal completions"):
        online_recipe(rollout={"temperature": 0})
    with pytest.raises(UserError, match="adaptive_temperature: vllm has none; set `engine: transformers`"):
        online_recipe(rollout={"adaptive_temperature": True, "engine": "vllm"})
    with pytest.raises(UserError, match="adaptive_temperature: temperature 0 takes the likeliest token"):
        online_recipe(rollout={"adaptive_temperature": True, "temperature": 0, "completions": 1})


class Recorder:
    """A scorer that keeps what it is given."""

    def __init__(self):
        self.calls = []

    def score(self, *columns):
        self.calls.append(columns)
        return [float(len(self.calls))] * len(columns[0])


LINES = [
    {"id": "a", "prompt": "p", "completions": ["x", "y"], "meta": {"answer": 1}},
    {"id": "b", "prompt": "q", "completions": ["z"], "meta": {"answer": 2}},
]


def test_scorers_get_what_they_look_at():
    alone, listwise, compares = Recorder(), Recorder(), Recorder()
    assert rewards_of(alone, SimpleNamespace(), LINES) == [1.0, 1.0, 1.0]
    assert alone.calls == [(["p", "p", "q"], ["x", "y", "z"])]
    assert rewards_of(listwise, SimpleNamespace(listwise=True), LINES) == [1.0, 1.0, 2.0]
    assert listwise.calls == [(["p", "p"], ["x", "y"]), (["q"], ["z"])]
    rewards_of(compares, SimpleNamespace(answer_column="answer"), LINES)
    assert compares.calls == [(["p", "p", "q"], ["x", "y", "z"], [1, 1, 2])]
    with pytest.raises(UserError, match="prompt a has no `gold`"):
        rewards_of(compares, SimpleNamespace(answer_column="gold"), LINES)
