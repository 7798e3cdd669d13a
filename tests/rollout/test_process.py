"""An engine's process that dies, hangs or is killed costs time and nothing else; it ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import fake_completions

from align.errors import UserError
from align.evaluate.sampling import Sampled
from align.export.vllm_start import environment
from align.rollout.engine import Sampling, Weights
from align.rollout.process import STARTS, EngineProcess
from align.rollout.vllm_arguments import VllmArguments, baseline, llm_arguments

STUB = Path(__file__).with_name("stub_worker.py")
PROMPTS = [[1, 3 + i] for i in range(7)]
SAMPLING = Sampling(completions=3, max_tokens=5, seed=11)
EXPECTED = {i: [Sampled(**one) for one in fake_completions(p, 11, 3, 5)] for i, p in enumerate(PROMPTS)}
ARGUMENTS = VllmArguments(folder="model", dtype="float32", max_length=32)


@pytest.fixture
def engine(tmp_path):
    made = []

    def make(failure: str, timeout: float = 30.0) -> EngineProcess:
        one = EngineProcess(ARGUMENTS, timeout=timeout, log_file=tmp_path / "engine.log")
        one.command = [sys.executable, str(STUB), str(tmp_path), failure]
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text().splitlines())


@pytest.mark.parametrize(("failure", "count"), [("none", 1), ("dies twice", 3), ("hangs once", 2)])
def test_every_prompt_comes_back_once_whatever_the_process_does(engine, failure, count, tmp_path):
    sampler = engine(failure, timeout=2.0)
    weights = Weights("merged", "folder", 1, "merged-v1")
    sampler.load(weights)
    found = list(sampler.sample(PROMPTS, SAMPLING))
    assert dict(found) == EXPECTED and len(found) == len(PROMPTS)
    assert starts(tmp_path) == count
    assert (tmp_path / "loads").read_text().split() == ["merged-v1"] * count  # a new process needs them too


def test_contexts_stay_with_their_prompts_when_the_process_dies(engine):
    contexts = [[5, 2 * i] for i in range(len(PROMPTS))]
    found = dict(engine("dies twice").sample(PROMPTS, SAMPLING, contexts))
    for place, (prompt, context) in enumerate(zip(PROMPTS, contexts, strict=True)):
        assert found[place] == [Sampled(**one) for one in fake_completions(prompt + context, 11, 3, 5)]


def test_prompts_that_are_done_are_not_sampled_again(engine):
    contexts = [[5, 2 * i] for i in range(len(PROMPTS))]
    found = dict(engine("dies twice").sample(PROMPTS, SAMPLING, contexts, done={0, 2}))
    expected = [fake_completions(prompt + own, 11, 3, 5) for prompt, own in zip(PROMPTS, contexts, strict=True)]
    wanted = set(range(len(PROMPTS))) - {0, 2}
    assert found == {place: [Sampled(**one) for one in expected[place]] for place in wanted}


def test_a_killed_process_is_started_again_with_the_present_weights(engine, tmp_path):
    sampler = engine("none")
    for version in (1, 2):
        sampler.load(Weights("adapter", f"folder{version}", version, f"adapter-v{version}"))
    found = {}
    for count, (place, completions) in enumerate(sampler.sample(PROMPTS, SAMPLING)):
        found[place] = completions
        if count == 2:
            os.killpg(sampler.pid, signal.SIGKILL)
    assert found == EXPECTED
    assert dict(sampler.sample(PROMPTS[:2], SAMPLING)) == {0: EXPECTED[0], 1: EXPECTED[1]}
    loads = (tmp_path / "loads").read_text().split()
    assert loads[:2] == ["adapter-v1", "adapter-v2"] and set(loads[2:]) <= {"adapter-v2"}


def test_a_sample_that_no_one_reads_on_leaves_nothing_for_the_next(engine):
    sampler = engine("none")
    next(iter(sampler.sample(PROMPTS, SAMPLING)))
    assert dict(sampler.sample(PROMPTS[3:], SAMPLING)) == {i - 3: EXPECTED[i] for i in range(3, 7)}


def test_what_cannot_work_is_said_at_once_and_what_keeps_failing_in_the_end(engine, tmp_path):
    with pytest.raises(UserError, match="prompt too long"):
        list(engine("refuses").sample(PROMPTS, SAMPLING))
    (tmp_path / "starts").unlink()
    with pytest.raises(UserError, match=f"failed {STARTS} times in a row.*engine.log"):
        list(engine("never starts").sample(PROMPTS, SAMPLING))
    assert starts(tmp_path) == STARTS


def test_the_worker_ends_with_its_input(tmp_path):
    worker = subprocess.Popen(
        [sys.executable, "-m", "align.rollout.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        text=True,
    )
    worker.stdin.write('{"do": "sample"}\n')  # before any start: an answer, not an end
    worker.stdin.flush()
    assert "error" in worker.stdout.readline()
    worker.stdin.close()
    assert worker.wait(timeout=60) == -signal.SIGKILL


def test_stopping_frees_the_process(engine):
    sampler = engine("none")
    list(sampler.sample(PROMPTS, SAMPLING))
    pid = sampler.pid
    sampler.rest(stop=True)
    time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() and sampler.pid is None
    assert dict(sampler.sample(PROMPTS, SAMPLING)) == EXPECTED


def test_a_process_that_died_while_it_rested_is_started_again(engine):
    sampler = engine("none")
    list(sampler.sample(PROMPTS, SAMPLING))
    os.killpg(sampler.pid, signal.SIGKILL)
    sampler.rest(stop=False)
    assert sampler.pid is None
    assert dict(sampler.sample(PROMPTS, SAMPLING)) == EXPECTED


def test_settings_that_make_vllm_fail_or_lie_on_a_cpu():
    with pytest.raises(UserError, match="VLLM_BATCH_INVARIANT"):
        environment({"VLLM_BATCH_INVARIANT": "1"})
    assert environment({"OMP_NUM_THREADS": "4"}).keys().isdisjoint({"OMP_NUM_THREADS"})
    with pytest.raises(UserError, match="model_impl"):
        llm_arguments(VllmArguments("m", "float32", 32, options={"model_impl": "transformers"}), ours=True)
    given = llm_arguments(VllmArguments("m", "bfloat16", 9000, lora_rank=20), ours=False)
    assert given["dtype"] == "bfloat16" and given["logprobs_mode"] == "processed_logprobs"
    assert given["max_num_batched_tokens"] >= 9000 and not given["enable_chunked_prefill"]
    assert given["max_lora_rank"] == 32 and given["max_loras"] == 1
    assert given.keys().isdisjoint({"logits_processors", "worker_extension_cls", "additional_config"})


@pytest.mark.parametrize("name", ["additional_config", "generation_config", "logits_processors", "max_logprobs"])
def test_options_do_not_take_the_place_of_what_our_sampler_needs(name):
    decoding = {"name": "contrast"}
    with pytest.raises(UserError, match=f"options: {name} is set by Align"):
        llm_arguments(VllmArguments("m", "float32", 32, decoding=decoding, options={name: None}), ours=True)


def test_drafts_of_several_tokens_are_for_vllms_own_sampler():
    arguments = VllmArguments("m", "float32", 32, options={"speculative_config": {"method": "ngram"}})
    with pytest.raises(UserError, match="speculative_config .* set `rollout.engine.sampler: vllm`"):
        llm_arguments(arguments, ours=True)
    assert llm_arguments(arguments, ours=False)["speculative_config"] == {"method": "ngram"}


def test_a_baseline_on_a_gpu_leaves_room_and_does_not_sleep(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = VllmArguments(
        "m", "bfloat16", 32, decoding={"name": "transfer_q", "baseline": "b"}, options={"seed": 3}
    )
    given = llm_arguments(arguments, ours=True)
    assert given["enable_sleep_mode"] and given["gpu_memory_utilization"] == 0.5
    second = llm_arguments(baseline(arguments), ours=False)
    assert not second["enable_sleep_mode"] and second["gpu_memory_utilization"] == 0.2 and second["seed"] == 3
    with pytest.raises(UserError, match="leave it on one device"):
        llm_arguments(replace(arguments, options={"tensor_parallel_size": 2}), ours=True)


@pytest.mark.parametrize(("chosen", "module"), [("0", "runner_v1"), ("1", "runner_v2")])
def test_vllm_gets_the_processor_of_the_runner_that_it_uses(chosen, module, monkeypatch):
    assert environment({})["VLLM_USE_V2_MODEL_RUNNER"] == "0" and "VLLM_USE_V2_MODEL_RUNNER" not in environment(
        {"VLLM_USE_V2_MODEL_RUNNER": chosen}
    )
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", chosen)
    arguments = VllmArguments("m", "float32", 32, lora_rank=4, decoding={"name": "transfer_q", "baseline": "b"})
    given = llm_arguments(arguments, ours=True)
    assert given["logits_processors"] == [f"align.rollout.inside_vllm.{module}:Requests"]
    assert given["max_loras"] == 2
    with pytest.raises(UserError, match="rollout.decoding: needs our sampler"):
        llm_arguments(arguments, ours=False)
    second = VllmArguments(**given["additional_config"]["align_decoding"]["engine"])
    assert second == VllmArguments("b", "float32", 32, sampler="vllm")
