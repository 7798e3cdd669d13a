"""Small policies that vLLM can run too, and engines that need nothing."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from align.model.adapters import AdapterConfig, Lora
from align.model.config import PolicySection
from align.model.load import LoadOptions
from align.model.policy import Policy, load_policy
from align.recipe import Recipe, parse_recipe
from align.training.train import train

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # vLLM's attention on a CPU wants heads of 32 or more
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session")
def untied(tmp_path_factory, save_llama) -> Path:
    """A Llama with an LM head of its own."""
    return save_llama(tmp_path_factory.mktemp("untied"), seed=1, **SIZES, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory, save_llama) -> Path:
    """A Llama whose LM head is its embeddings, as small models have it."""
    return save_llama(tmp_path_factory.mktemp("tied"), seed=2, **SIZES, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def trained():
    """Makes a policy of random adapter weights, and its files."""

    def make(base: Path, folder: Path, seed: int, adapter: AdapterConfig | None = None) -> Policy:
        policy = load_policy(
            PolicySection(model=str(base), adapter=adapter or Lora(rank=4)),
            LoadOptions(seed=seed),
            keep_reference=False,
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        policy.save_adapter(folder)
        policy.tokenizer.save_pretrained(folder)
        return policy

    return make


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> Path:
    """Twelve prompts, one of them twice and one too long for most."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [" ".join(f"w{3 + (5 * i + j) % 40}" for j in range(1 + i % 5)) for i in range(12)]
    lines = [{"id": f"p{i}", "prompt": text, "answer": i} for i, text in enumerate(texts)]
    lines += [{"id": "again", "prompt": texts[3]}, {"id": "long", "prompt": "w5 " * 40}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class CountingScorer:
    """The more w3 to w30, the better."""

    def score(self, prompts, completions):
        return [sum(int(word[1:]) <= 30 for word in text.split()) / 4 for text in completions]


@pytest.fixture
def scorer(monkeypatch) -> CountingScorer:
    """In place of whatever `rollout.reward` names."""
    made = CountingScorer()
    monkeypatch.setattr("align.rollout.sample.load_scorer", lambda config: made)
    return made


@pytest.fixture
def reward(tmp_path, untied) -> str:
    """A random reward model that reads the policy's words."""
    tokenizer = AutoTokenizer.from_pretrained(untied)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, num_labels=1, pad_token_id=2, initializer_range=0.5, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


LENGTH = {"name": "length", "min": 1}


def online_tree(folder: Path, output: str, model: Path, prompts: Path, **sections) -> Recipe:
    """An online recipe with the transformers engine; sections given are laid over it."""
    tree = {
        "output": str(folder / output),
        "policy": {"model": str(model), "adapter": {"name": "lora", "rank": 4, "alpha": 8}},
        "reference": {"cache_dir": str(folder / "cache")},
        "data": {"sources": [str(prompts)], "eval_fraction": 0.25, "append_eos": False, "max_length": 32},
        "objective": {"name": "lambda"},
        "rollout": {
            "completions": 3,
            "max_tokens": 8,
            "engine": "transformers",
            "reward": {"name": "length", "min": 1},
        },
        "online": {"iterations": 2, "prompts": 6},
        "train": {"learning_rate": 1e-2, "lists_per_step": 2, "schedule": "constant", "threads": 1},
        "sampling": {"prompts": 2, "max_tokens": 4},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section if isinstance(section, dict) and name != "objective" else section
    return parse_recipe(tree, origin="test")


@pytest.fixture
def online_recipe(untied, prompts_file, tmp_path):
    """Makes an online recipe below the test's folder."""

    def make(output: str = "run", **sections) -> Recipe:
        return online_tree(tmp_path, output, untied, prompts_file, **sections)

    return make


@pytest.fixture(scope="module")
def whole(untied, prompts_file, tmp_path_factory) -> Path:
    """A finished run of two iterations, of the recipe that `online_recipe` makes."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.rollout.sample.load_scorer", lambda config: CountingScorer())
        return train(online_tree(tmp_path_factory.mktemp("whole"), "whole", untied, prompts_file)).path
