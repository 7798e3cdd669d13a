"""Three optimizer steps beside TRL's RewardTrainer: the same head and LoRA, the same pairs, loss and gradients."""

import pytest
import torch
from beside_trl import PAIRS, STEPS, TARGETS, assert_same_steps, ours, theirs
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from align.model.adapters import Full, Lora
from align.model.reward import load_reward_model

LOSSES = {
    "plain": ({}, {}),
    "centred": ({"center_rewards_coefficient": 0.05}, {"center": 0.05}),
    "margin": ({}, {"strength": "margin"}),
    "margin of the row": ({}, {"name": "logistic"}),
}
"""Case -> TRL's options and ours."""


@pytest.fixture(scope="module")
def lists() -> list[dict]:
    """Pairs with a prompt, a strength each, and what our trainer reads besides."""
    generator = torch.Generator().manual_seed(4)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 40, (n,), generator=generator).tolist()

    return [
        {
            "prompt_ids": ids(3 + i % 4),
            "completion_ids": [ids(2 + i % 5), ids(1 + i % 3)],
            "grades": [1.0, 0.0],
            "attributes": [[float("nan")]] * 2,
            "strength": 0.5 + i % 3,
            "set": 0,
        }
        for i in range(STEPS * PAIRS)
    ]


def as_pair(example: dict, *, margin: bool) -> dict:
    """A list as TRL's trainer takes it when it is tokenised already."""
    chosen, rejected = (example["prompt_ids"] + ids for ids in example["completion_ids"])
    return {"chosen_ids": chosen, "rejected_ids": rejected} | ({"margin": example["strength"]} if margin else {})


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("case", LOSSES)
def test_three_steps_agree(folder, lists, tmp_path, case, lora):
    """Ours packed, from TRL's weights."""
    their_options, our_options = LOSSES[case]
    targets = {"target_modules": list(TARGETS), "init_lora_weights": False, "modules_to_save": ["score"]}
    _, losses, gradients, start = theirs(
        RewardTrainer,
        RewardConfig,
        their_options,
        tmp_path / "trl",
        model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32),
        train_dataset=Dataset.from_list([as_pair(example, margin="margin" in case) for example in lists]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", **targets) if lora else None,
    )
    adapter = Lora(rank=4, alpha=8, targets=TARGETS) if lora else Full()
    sections = {
        "task": "reward",
        "policy": {"model": str(folder), "adapter": adapter.model_dump()},
        "objective": {"name": "bradley_terry", **our_options},
    }
    load = lambda recipe: load_reward_model(recipe.policy, outputs=["reward"])  # noqa: E731
    if case == "margin of the row":
        lists = [example | {"margin": example["strength"]} for example in lists]
    found = ours(sections, load, lists, start, tmp_path / "align", tokens_per_batch=25)
    assert all(any("score" in name for name in step) for step in found[1])
    assert_same_steps(losses, gradients, *found)
