"""No engine and no scorer takes anything from a model's own generation configuration but its end tokens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.evaluate.sampling import sample_tokens
from align.export.export import export
from align.rollout.engine import Sampling
from align.rollout.process import EngineProcess
from align.rollout.transformers_engine import TransformersEngine
from align.rollout.vllm_arguments import VllmArguments
from align.rollout.weights import write_weights
from rewards import load_scorer

PROMPTS = [[5, 6, 7, 5, 6], [9], [8, 3, 4, 4]]
SAMPLING = Sampling(completions=4, max_tokens=14, seed=5, temperature=0.9, stop_ids=(2,))
HOSTILE = {
    "temperature": {"do_sample": True, "temperature": 0.3},
    "top_k": {"do_sample": True, "top_k": 2},
    "top_p": {"do_sample": True, "top_p": 0.2},
    "min_p": {"do_sample": True, "min_p": 0.5},
    "typical_p": {"do_sample": True, "typical_p": 0.1},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.05},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(4, 64, 2)]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 64, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 40))},
    "forced_eos_token_id": {"forced_eos_token_id": 2, "max_length": 8},
    "sequence_bias": {"sequence_bias": [[[4], 9.0]]},
    "exponential_decay": {"exponential_decay_length_penalty": [2, 3.0]},
    "min_new_tokens": {"min_new_tokens": 10},
    "max_new_tokens": {"max_new_tokens": 3},
    "stop_strings": {"stop_strings": ["w4", "w7"]},
    "num_beams": {"num_beams": 3, "early_stopping": True},
    "guidance_scale": {"guidance_scale": 3.0},
}
"""What a generation_config.json may hold; each changes what a plain `generate` writes."""


@pytest.fixture
def hostile(untied, tmp_path):
    """Makes the same model with other defaults of generation."""

    def make(settings: dict) -> Path:
        folder = tmp_path / "hostile"
        shutil.copytree(untied, folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | settings))
        return folder

    return make


def everything() -> dict:
    """Those of HOSTILE that go together, all at once."""
    alone = {"num_beams", "guidance_scale", "stop_strings", "max_new_tokens", "sequence_bias"}
    return {key: value for name, own in HOSTILE.items() if name not in alone for key, value in own.items()}


def transformers_engine(folder: Path) -> TransformersEngine:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformersEngine(folder, tokenizer, dtype="float32", tokens_per_batch=128, trusted=False)


def drawn(model, tokenizer) -> list:
    options = {"max_tokens": 14, "temperature": 0.9, "per_prompt": 4, "seed": 5}
    return sorted(((i, k, s.ids, s.ended) for i, k, s in sample_tokens(model, tokenizer, PROMPTS, **options)))


@pytest.mark.parametrize("name", HOSTILE)
def test_samples_are_those_of_a_model_without_it(untied, hostile, name):
    tokenizer = AutoTokenizer.from_pretrained(untied)
    expected = drawn(AutoModelForCausalLM.from_pretrained(untied), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(hostile(HOSTILE[name]))
    before = model.generation_config.to_dict()
    assert drawn(model, tokenizer) == expected
    assert model.generation_config.to_dict() == before  # which an export still has


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - {"stop_strings"}))  # which needs a tokenizer of texts
def test_each_changes_what_a_plain_generate_writes(untied, hostile, name):
    """Or the test above could not fail."""
    ids, options = torch.tensor([[5, 6, 7, 5, 6]]), {"max_new_tokens": 14, "pad_token_id": 0}
    if name == "max_new_tokens":
        options.pop("max_new_tokens")
    found = []
    for folder in (untied, hostile(HOSTILE[name])):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(folder)
        sampled = {} if name in ("num_beams", "top_k") else {"do_sample": True, "top_k": 0}
        found.append(model.generate(ids.repeat(32, 1), **options, **sampled).tolist())
    assert found[0] != found[1]


@pytest.mark.parametrize("kind", ["base", "adapter", "merged"])
def test_the_transformers_engine_writes_the_same(untied, hostile, trained, tmp_path, kind):
    bad = hostile(everything())
    engines = []
    for place, folder in enumerate((untied, bad)):
        engine = transformers_engine(folder)
        if kind != "base":
            trained(folder, tmp_path / f"adapter{place}", 3)
            output = tmp_path / f"weights{place}"
            engine.load(write_weights(tmp_path / f"adapter{place}", output, kind=kind, version=1, dtype="float32"))
        engines.append(engine)
    expected, found = (dict(engine.sample(PROMPTS, SAMPLING)) for engine in engines)
    assert found == expected


def test_a_wrapped_policy_and_its_export_keep_their_configuration(untied, hostile, trained, tmp_path):
    bad = hostile(everything())
    trained(bad, tmp_path / "adapter", 3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bad), tmp_path / "adapter")
    drawn(model, AutoTokenizer.from_pretrained(bad))
    assert model.generation_config.suppress_tokens == everything()["suppress_tokens"]
    export(tmp_path / "adapter", tmp_path / "out", merge=True)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["suppress_tokens"] == everything()["suppress_tokens"]


def test_a_judge_reads_its_own_probabilities(untied, hostile):
    texts = (["w5 w6", "w7", "w8 w9"], ["w10", "w11 w12", "w13"])
    options = {"name": "judge", "verdicts": ("w20", "w21"), "dtype": "float32"}
    folders = (untied, hostile(everything()))
    scores = [load_scorer({**options, "model": str(folder)}).score(*texts) for folder in folders]
    assert scores[0] == scores[1] and len(set(scores[0])) == 3


@pytest.mark.vllm
@pytest.mark.parametrize("sampler", ["auto", "vllm"])
def test_vllm_writes_the_same(untied, hostile, tmp_path, sampler):
    found = []
    for folder in (untied, hostile(everything() | HOSTILE["max_new_tokens"])):
        arguments = VllmArguments(str(folder), "float32", 64, sampler=sampler, cache_bytes=1 << 24)
        engine = EngineProcess(arguments, timeout=300, log_file=tmp_path / "log")
        try:
            found.append({i: [one.ids for one in own] for i, own in engine.sample(PROMPTS, SAMPLING)})
        finally:
            engine.close()
    assert found[0] == found[1]
