"""vLLM itself: seeds, log-probabilities, both ways of new weights, and its defects behind our guards.

One engine in this process serves most tests, as vLLM's own process would; two tests start the real one.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.model.adapters import Full
from align.model.config import PolicySection
from align.model.policy import load_policy
from align.rollout.agreement import check_agreement
from align.rollout.engine import Sampling, Weights
from align.rollout.process import EngineProcess
from align.rollout.vllm_arguments import VllmArguments
from align.rollout.vllm_engine import VllmEngine
from align.rollout.weights import write_weights

pytestmark = pytest.mark.vllm

SAMPLING = Sampling(completions=4, max_tokens=12, seed=5, temperature=0.8, stop_ids=(2,))
PROMPTS = [[5, 6, 7], [9], [8, 3, 4, 4], [11, 12], list(range(3, 60)) * 2]  # the last fills blocks of the prefix cache


@pytest.fixture(scope="module")
def merging(tied, tmp_path_factory):
    """An engine on a tied base, for merged weights."""
    engine = VllmEngine(VllmArguments(str(tied), "float32", 256, cache_bytes=16 << 20))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def adapting(untied, tmp_path_factory):
    """An engine for adapters."""
    engine = VllmEngine(VllmArguments(str(untied), "float32", 256, lora_rank=4, cache_bytes=16 << 20))
    yield engine
    engine.close()


def ids(engine, prompts=PROMPTS, sampling=SAMPLING):
    return {place: [one.ids for one in completions] for place, completions in engine.sample(prompts, sampling)}


def agreement(engine, policy, temperature=0.8):
    return check_agreement(engine, policy, PROMPTS, replace(SAMPLING, temperature=temperature), bound=None)


def test_completions_depend_on_prompt_and_seed_alone(merging):
    together = ids(merging)
    assert together == ids(merging)
    assert together == {place: ids(merging, [prompt])[0] for place, prompt in enumerate(PROMPTS)}
    turned = ids(merging, PROMPTS[::-1])
    assert together == {len(PROMPTS) - 1 - place: own for place, own in turned.items()}
    left = merging.sample(PROMPTS, SAMPLING, done={0, 2})
    assert {0, 2} ^ together.keys() == {place for place, own in left if [one.ids for one in own] == together[place]}
    assert together != ids(merging, sampling=replace(SAMPLING, seed=6))
    assert all(len({tuple(one) for one in own}) > 1 for own in together.values())


def test_logprobs_are_those_of_the_filtered_distribution(merging, tied, trained):
    model = AutoModelForCausalLM.from_pretrained(merging.loaded[-1].folder if merging.loaded else tied)
    filters = {"min_p": 0.05, "top_k": 8, "top_p": 0.9}
    for place, completions in merging.sample(PROMPTS[:3], replace(SAMPLING, **filters)):
        for one in completions:
            with torch.no_grad():
                whole = torch.tensor([PROMPTS[place] + one.ids])
                logits = model(input_ids=whole).logits[0, -len(one.ids) - 1 : -1].double() / 0.8
            for token, row, found in zip(one.ids, logits, one.logprobs, strict=True):
                p = row.softmax(-1)
                p = torch.where(p >= 0.05 * p.max(), p, 0.0)
                p = torch.where(p >= p.sort(descending=True).values[7], p, 0.0)
                p = p / p.sum()
                order = p.argsort(descending=True)
                p[order[p[order].cumsum(0) - p[order] >= 0.9]] = 0.0
                assert found == pytest.approx(float((p / p.sum())[token].log()), abs=1e-4)


def test_a_completion_keeps_its_end_and_stop_texts_end_it(merging):
    drawn = [one for _, own in merging.sample(PROMPTS, replace(SAMPLING, max_tokens=60)) for one in own]
    assert all(one.ended == (one.ids[-1] == 2) for one in drawn) and any(one.ended for one in drawn)
    sampling = replace(SAMPLING, stop=("w2",), max_tokens=60)
    stopped = [one.ids for _, own in merging.sample(PROMPTS, sampling) for one in own if one.ended]
    assert any(20 <= own[-1] < 30 for own in stopped)
    assert not any(20 <= token < 30 for own in stopped for token in own[:-1])


def test_many_seeded_prompts_whose_tokens_exceed_a_step(merging):
    """Defect 9: a seeded request that is split over steps crashes on a CPU."""
    prompts = [[3 + i, *([4 + i % 7] * 120)] for i in range(45)]  # 5445 tokens, and a step takes 4096
    assert len(ids(merging, prompts)) == 45


def test_merged_weights_reach_head_and_cache(merging, tied, tmp_path, trained):
    """Defects 1 (a tied head keeps its old weights) and 3 (the prefix cache keeps old keys and values)."""
    for version in (1, 2):
        policy = trained(tied, tmp_path / str(version), version)
        ids(merging)  # fills the cache with the old weights' keys and values
        weights = write_weights(
            tmp_path / str(version), tmp_path / "w", kind="merged", version=version, dtype="float32"
        )
        merging.load(weights)
        assert agreement(merging, policy).max < 1e-4


def test_full_training_of_a_tied_model_moves_embeddings_and_head(merging, tied, tmp_path, trained):
    policy = trained(tied, tmp_path / "full", 3, Full())
    merging.load(write_weights(tmp_path / "full", tmp_path / "w", kind="merged", version=3, dtype="float32"))
    assert agreement(merging, policy).max < 1e-4


def test_incomplete_weights_never_reach_the_engine(merging, tied, tmp_path, trained):
    """Defects 6 (part of a fused module) and 7 (an exception in the reload leaves no weights)."""
    policy = trained(tied, tmp_path / "whole", 4)
    whole = write_weights(tmp_path / "whole", tmp_path / "w", kind="merged", version=4, dtype="float32")
    merging.load(whole)
    for name, change in {
        "less": lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"),
        "headless": lambda t: t.pop("lm_head.weight"),
        "odd": lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
    }.items():
        folder = tmp_path / "w" / name
        folder.mkdir()
        tensors = load_file(Path(whole.folder) / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((Path(whole.folder) / "config.json").read_text())
        with pytest.raises(ValueError, match="lm_head|differ in name or shape"):
            merging.load(Weights("merged", str(folder), 5, name))
    assert agreement(merging, policy).max < 1e-4


def test_a_reload_that_fails_ends_in_a_new_engine(merging, tied, tmp_path, monkeypatch, trained):
    policy = trained(tied, tmp_path / "new", 6)
    before = merging.llm

    def fails(*_, **__):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(merging.llm, "collective_rpc", fails)
    merging.load(write_weights(tmp_path / "new", tmp_path / "w", kind="merged", version=6, dtype="float32"))
    assert merging.llm is not before
    assert agreement(merging, policy).max < 1e-4


def test_adapters_follow_one_another_exactly(adapting, untied, tmp_path, trained):
    """Defects 2 (base and adapter in one batch), 4 and 5 (names, paths and ids used again)."""
    base = agreement(adapting, load_policy(PolicySection(model=str(untied), adapter=Full()), keep_reference=False))
    assert base.max < 1e-4
    for version in (1, 2, 3):
        policy = trained(untied, tmp_path / str(version), version)
        ids(adapting)
        kept = write_weights(tmp_path / str(version), tmp_path / "w", kind="adapter", version=version, dtype="float32")
        adapting.load(kept)
        assert agreement(adapting, policy).max < 1e-4
        assert adapting.llm.llm_engine.list_loras() == {adapting.lora.lora_int_id}
    with pytest.raises(ValueError, match="was loaded before"):
        adapting.load(kept)
    with pytest.raises(ValueError, match="was loaded before"):
        adapting.load(replace(kept, name="another"))


def test_a_bad_adapter_is_refused_and_the_engine_goes_on(adapting, untied, tmp_path, trained):
    """Defect 8: inside a step it would leave requests that never end."""
    policy = trained(untied, tmp_path / "good", 7)
    adapting.load(write_weights(tmp_path / "good", tmp_path / "w", kind="adapter", version=7, dtype="float32"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{}")
    with pytest.raises(Exception, match="bad|adapter|LoRA|field"):
        adapting.load(Weights("adapter", str(tmp_path / "bad"), 8, "bad"))
    assert not adapting.llm.llm_engine.has_unfinished_requests()
    assert agreement(adapting, policy).max < 1e-4


def test_completions_that_no_one_waits_for_are_taken_back(adapting):
    next(iter(adapting.sample(PROMPTS, SAMPLING)))
    assert not adapting.llm.llm_engine.has_unfinished_requests()
    assert len(ids(adapting, PROMPTS[:2])) == 2


def test_killed_in_its_own_process_it_samples_the_same(merging, tied, tmp_path, trained):
    arguments = VllmArguments(str(tied), "float32", 256, cache_bytes=16 << 20)
    engine = EngineProcess(arguments, timeout=120.0, log_file=tmp_path / "engine.log")
    trained(tied, tmp_path / "own", 8)
    weights = write_weights(tmp_path / "own", tmp_path / "w", kind="merged", version=8, dtype="float32")
    try:
        engine.load(weights)
        merging.load(weights)
        expected = ids(merging)
        found = {}
        for count, (place, completions) in enumerate(engine.sample(PROMPTS, SAMPLING)):
            assert place not in found
            found[place] = [one.ids for one in completions]
            if count == 1:
                os.killpg(engine.pid, signal.SIGKILL)
        assert found == expected
    finally:
        engine.close()
