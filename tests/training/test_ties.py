"""A step does not depend on how it is cut, also where lists run in parts and all that ranks is rounding.

Before the first step every implicit reward is 0 but for float noise, which differs with every cut, with padding, and
between a cached reference and one that is computed beside the policy.
"""

import gzip
import json
import random
from pathlib import Path

import pytest

from align.recipe import Recipe, parse_recipe
from align.training.train import train

BUDGETS = (100_000, 8192, 3000, 1500, 900, 600, 300, 150, 60, 1)
WAYS = ((True, True), (False, False), (True, False), (False, True))
"""Packed or padded, cached reference or live."""
SPEED = ("seconds", "lists_per_second", "completion_tokens_per_second", "crc32")


def step_one(recipe: Recipe) -> dict[str, float]:
    line = json.loads((train(recipe).path / "metrics.jsonl").read_text().splitlines()[0])
    return {name: value for name, value in line.items() if name not in SPEED}


def assert_every_cut_is_the_same(make, *, budgets=BUDGETS, **allowed) -> None:
    """Loss, gradient norm and every metric; each budget in two of the four ways."""
    first = None
    for number, budget in enumerate(budgets):
        for packing, cache in (WAYS[number % 4], WAYS[(number + 1) % 4]):
            name = f"{budget}-{packing}-{cache}"
            found = step_one(make(name, {"packing": packing, "tokens_per_batch": budget}, {"cache": cache}))
            first = first or found
            assert found == pytest.approx(first, **allowed), name


@pytest.fixture
def generated(tmp_path) -> Path:
    """Lists as long as makes sums of float32 differ by more than 1e-5, with equal completions and equal grades."""
    draw = random.Random(7)
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for row in range(8):
            texts = [" " + " ".join(f"w{draw.randrange(3, 40)}" for _ in range(draw.randrange(20, 160))) for _ in "abc"]
            texts.append(texts[0])
            line = {"id": str(row), "prompt": f"w{10 + row} w5", "completions": texts, "grades": [3, 1, 1, row % 3]}
            file.write(json.dumps(line) + "\n")
    return path


@pytest.mark.parametrize(
    "sections",  # DPOP's and a hinge's gradients jump where a score or a margin changes its sign
    [
        pytest.param({"objective": "lambda"}, marks=pytest.mark.long),
        {"objective": [{"name": "lambda"}, {"name": "partial_order", "score": {"name": "log_ratio"}}], "dpop": 5.0},
        {"objective": "lambda", "regularizer": {"name": "token_reg"}},
        pytest.param({"objective": "pl_policy_gradient", "score": {"name": "log_ratio_mean"}}, marks=pytest.mark.long),
    ],
    ids=["lambda", "dpop", "token_reg", "pl_policy_gradient"],
)
def test_generated_lists(make_recipe, save_llama, generated, tmp_path, sections):
    model = save_llama(tmp_path / "model", initializer_range=0.5, num_hidden_layers=3)

    def make(name: str, how: dict, reference: dict) -> Recipe:
        return make_recipe(
            name,
            policy={"model": str(model)},
            data={"sources": [str(generated)], "eval_fraction": 0, "grades": "raw", "max_length": 400},
            train={"steps": 1, "lists_per_step": 8} | how,
            reference=reference,
            sampling={"prompts": 0, "token_lists": 0},
            **sections,
        )

    budgets = BUDGETS if sections == {"objective": "lambda"} else (8192, 60)
    assert_every_cut_is_the_same(make, budgets=budgets, rel=2e-4, abs=2e-4)


@pytest.mark.long
def test_real_lists(shared_data, tmp_path):
    with gzip.open(shared_data / "oasst_ranked" / "lists.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    largest = sorted(rows, key=lambda row: -len(row["items"]))[:4]
    source = tmp_path / "oasst.jsonl"
    with source.open("w") as file:
        for row in largest:
            prompt = "\n".join(message["content"] for message in row["messages"])
            completions = [" " + item["text"] for item in row["items"]]
            grades = [float(len(completions) - item["rank"]) for item in row["items"]]
            file.write(json.dumps({"prompt": prompt, "completions": completions, "grades": grades}) + "\n")

    def make(name: str, how: dict, reference: dict) -> Recipe:
        tree = {
            "output": str(tmp_path / name),
            "policy": {"model": str(shared_data / "models" / "stories260k"), "adapter": {"name": "lora", "rank": 4}},
            "reference": {"cache_dir": str(tmp_path / "cache")} | reference,
            "data": {"sources": [str(source)], "eval_fraction": 0, "grades": "win_probability", "max_length": 400},
            "objective": "lambda",
            "train": {"lists_per_step": 4, "steps": 1, "threads": 1} | how,
            "sampling": {"prompts": 0, "token_lists": 0},
        }
        return parse_recipe(tree, origin="test")

    assert_every_cut_is_the_same(make, rel=1e-3, abs=2e-4)
