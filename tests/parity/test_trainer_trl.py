"""Three optimizer steps beside TRL's DPOTrainer: the same LoRA, the same pairs, the same loss and gradients."""

import pytest
import torch
from beside_trl import PAIRS, STEPS, TARGETS, assert_same_steps, ours, theirs
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from align.model.policy import load_policy

BETA = 0.3
LOSSES = {
    "sigmoid": {"objective": {"name": "logistic"}},
    "hinge": {"objective": {"name": "hinge"}},
    "ipo": {"objective": {"name": "squared"}, "score": {"name": "log_ratio_mean", "beta": BETA}},
    "exo_pair": {"objective": {"name": "exo", "label_smoothing": 1e-3}},
    "nca_pair": {"objective": {"name": "nca"}},
    "robust": {"objective": {"name": "robust", "label_smoothing": 0.1}},
    "bco_pair": {"objective": {"name": "bco"}},
    "sppo_hard": {"objective": {"name": "sppo"}},
    "apo_zero": {"objective": {"name": "apo_zero"}},
    "apo_down": {"objective": {"name": "apo_down"}},
    "discopop": {"objective": {"name": "discopop"}},
    "sigmoid_norm": {"objective": {"name": "logistic"}, "score": {"name": "log_ratio_mean", "beta": BETA}},
    "sigmoid+sft": {"objective": [{"name": "logistic"}, {"name": "sft", "weight": 0.5}]},
}
"""TRL's name -> our recipe sections."""


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    """Completions of one length, so that TRL's token mean of `sft` over a batch is our mean over lists."""
    generator = torch.Generator().manual_seed(4)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, 40, (n,), generator=generator).tolist())

    sizes = [(3 + i % 4, 5, 5 + i % 3) for i in range(STEPS * PAIRS)]
    return [{"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)} for p, c, r in sizes]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_three_steps_agree(folder, pairs, tmp_path, loss_type):
    """Ours on TRL's tokens, from TRL's LoRA weights."""
    names = loss_type.split("+")
    options = {
        "loss_type": names,
        "loss_weights": [1.0, 0.5][: len(names)] if len(names) > 1 else None,
        "beta": BETA,
        "label_smoothing": {"exo_pair": 1e-3, "robust": 0.1}.get(loss_type, 0.0),
    }
    trainer, losses, gradients, start = theirs(
        DPOTrainer,
        DPOConfig,
        options,
        tmp_path / "trl",
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        train_dataset=Dataset.from_list(pairs),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), init_lora_weights=False),
    )
    rows = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    lists = [{"prompt_ids": p, "completion_ids": [c, r], "grades": [1.0, 0.0]} for p, c, r in rows]
    adapter = {"name": "lora", "rank": 4, "alpha": 8, "targets": TARGETS}
    sections = {
        "policy": {"model": str(folder), "adapter": adapter},
        "score": {"name": "log_ratio", "beta": BETA},
    }
    load = lambda recipe: load_policy(recipe.policy)  # noqa: E731
    found = ours(sections | LOSSES[loss_type], load, lists, start, tmp_path / "align", tokens_per_batch=60)
    assert_same_steps(losses, gradients, *found)
