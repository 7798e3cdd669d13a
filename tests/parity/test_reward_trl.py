"""Three optimizer steps beside TRL's RewardTrainer: the same head and LoRA, the same pairs, loss and gradients."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer

from align.build import loss_of
from align.model.adapters import Full, Lora
from align.model.reward import load_reward_model
from align.recipe import parse_recipe
from align.run_directory import RunDirectory
from align.trainer import AlignTrainer
from align.training import training_arguments

STEPS, PAIRS = 3, 4
TARGETS = ("q_proj", "v_proj", "down_proj")
LOSSES = {
    "plain": ({}, {}),
    "centred": ({"center_rewards_coefficient": 0.05}, {"center": 0.05}),
    "margin": ({}, {"strength": "margin"}),
}
"""Case -> TRL's options and ours."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(3)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 40)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


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


class Recorder(TrainerCallback):
    """Keeps every step's gradients."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        own = {
            name.removeprefix(self.prefix): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
        }
        self.gradients.append(own)


class InOrder(RewardTrainer):
    """Takes the pairs in the order of the file."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def theirs(folder: Path, lists: list[dict], options: dict, *, margin: bool, lora: bool, output: Path):
    """TRL's losses, gradients, and trainable weights before the first step."""
    pairs = []
    for example in lists:
        chosen, rejected = (example["prompt_ids"] + ids for ids in example["completion_ids"])
        pairs.append(
            {"chosen_ids": chosen, "rejected_ids": rejected} | ({"margin": example["strength"]} if margin else {})
        )
    arguments = RewardConfig(
        output_dir=str(output),
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **options,
    )
    recorder = Recorder("")
    targets = {"target_modules": list(TARGETS), "init_lora_weights": False, "modules_to_save": ["score"]}
    peft_config = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", **targets) if lora else None
    trainer = InOrder(
        model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=peft_config,
        callbacks=[recorder],
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, recorder.gradients, start


def ours(folder: Path, lists: list[dict], options: dict, start: dict[str, torch.Tensor], *, lora: bool, output: Path):
    """Our losses and gradients from TRL's weights, packed and in several micro-batches a step."""
    adapter = Lora(rank=4, alpha=8, targets=TARGETS) if lora else Full()
    tree = {
        "task": "reward",
        "output": str(output),
        "policy": {"model": str(folder), "adapter": adapter.model_dump()},
        "data": {"sources": ["none"]},
        "objective": {"name": "bradley_terry", **options},
        "train": {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0},
    }
    recipe = parse_recipe(tree, origin="test")
    run = RunDirectory(recipe.output)
    run.open(recipe)
    model = load_reward_model(str(folder), outputs=["reward"], adapter=adapter)
    own = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    assert own.keys() == start.keys() and model.packing
    for name, parameter in own.items():
        parameter.data.copy_(start[name])
    arguments = training_arguments(recipe.train, checkpoints=run.checkpoints, run_name="align")
    arguments.max_steps = STEPS
    trainer = AlignTrainer(
        policy=model,
        loss=loss_of(recipe),
        lists=Dataset.from_list(lists),
        plan=[list(range(first, first + PAIRS)) for first in range(0, STEPS * PAIRS, PAIRS)],
        heldout=[],
        run=run,
        tokens_per_batch=25,
        keep_checkpoints=1,
        keep_best=None,
        args=arguments,
    )
    recorder = Recorder("model.")
    trainer.add_callback(recorder)
    trainer.train_from(None, logging_steps=1)
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    return losses, recorder.gradients


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("case", LOSSES)
def test_three_steps_agree(folder, lists, tmp_path, case, lora):
    their_options, our_options = LOSSES[case]
    margin = case == "margin"
    losses, gradients, start = theirs(folder, lists, their_options, margin=margin, lora=lora, output=tmp_path / "trl")
    our_losses, our_gradients = ours(folder, lists, our_options, start, lora=lora, output=tmp_path / "align")
    assert len(losses) == STEPS and len({round(x, 6) for x in losses}) == STEPS
    assert our_losses == pytest.approx(losses, abs=1e-5, rel=2e-6)
    for their_step, our_step in zip(gradients, our_gradients, strict=True):
        assert their_step.keys() == our_step.keys() and any("score" in name for name in our_step)
        for name, gradient in their_step.items():
            assert_close(our_step[name], gradient, rtol=0, atol=1e-5 * max(1.0, gradient.abs().max().item()))
