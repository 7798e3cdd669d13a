"""Three optimizer steps beside TRL's DPOTrainer: the same LoRA, the same pairs, the same loss and gradients."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from align.build import loss_of
from align.model.policy import load_policy
from align.recipe import parse_recipe
from align.run_directory import RunDirectory
from align.trainer import AlignTrainer
from align.training import training_arguments

STEPS, PAIRS, BETA = 3, 4, 0.3
TARGETS = ["q_proj", "v_proj", "down_proj"]
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
def pairs() -> list[dict]:
    """Completions of one length, so that TRL's token mean of `sft` over a batch is our mean over lists."""
    generator = torch.Generator().manual_seed(4)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, 40, (n,), generator=generator).tolist())

    sizes = [(3 + i % 4, 5, 5 + i % 3) for i in range(STEPS * PAIRS)]
    return [{"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)} for p, c, r in sizes]


class Recorder(TrainerCallback):
    """Keeps every step's gradients."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        own = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        self.gradients.append(own)


class InOrder(DPOTrainer):
    """Takes the pairs in the order of the file."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def theirs(folder: Path, pairs: list[dict], loss_type: str, output: Path):
    """TRL's losses, gradients, and LoRA weights before the first step."""
    names = loss_type.split("+")
    smoothing = {"exo_pair": 1e-3, "robust": 0.1}.get(loss_type, 0.0)
    arguments = DPOConfig(
        output_dir=str(output),
        loss_type=names,
        loss_weights=[1.0, 0.5][: len(names)] if len(names) > 1 else None,
        beta=BETA,
        label_smoothing=smoothing,
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
    )
    recorder = Recorder()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False),
        callbacks=[recorder],
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    rows = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    lists = [{"prompt_ids": p, "completion_ids": [c, r], "grades": [1.0, 0.0]} for p, c, r in rows]
    return losses, recorder.gradients, start, lists


def ours(folder: Path, lists: list[dict], sections: dict, start: dict[str, torch.Tensor], output: Path):
    """Our losses and gradients on TRL's tokens from TRL's LoRA weights, in two micro-batches a step."""
    adapter = {"name": "lora", "rank": 4, "alpha": 8, "targets": TARGETS}
    tree = {
        "output": str(output),
        "policy": {"model": str(folder), "adapter": adapter},
        "data": {"sources": ["none"]},
        "score": {"name": "log_ratio", "beta": BETA},
        "train": {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0},
    }
    recipe = parse_recipe(tree | sections, origin="test")
    run = RunDirectory(recipe.output)
    run.open(recipe)
    policy = load_policy(str(folder), adapter=recipe.policy.adapter)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(start[name])
    arguments = training_arguments(recipe.train, checkpoints=run.checkpoints, run_name="align")
    arguments.max_steps = STEPS
    trainer = AlignTrainer(
        policy=policy,
        loss=loss_of(recipe),
        lists=Dataset.from_list(lists),
        plan=[list(range(first, first + PAIRS)) for first in range(0, STEPS * PAIRS, PAIRS)],
        heldout=[],
        run=run,
        tokens_per_batch=60,
        keep_checkpoints=1,
        keep_best=None,
        args=arguments,
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train_from(None, logging_steps=1)
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    return losses, [{name.removeprefix("model."): g for name, g in step.items()} for step in recorder.gradients]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_three_steps_agree(folder, pairs, tmp_path, loss_type):
    losses, gradients, start, lists = theirs(folder, pairs, loss_type, tmp_path / "trl")
    our_losses, our_gradients = ours(folder, lists, LOSSES[loss_type], start, tmp_path / "align")
    assert len(losses) == STEPS and len({round(x, 6) for x in losses}) == STEPS
    assert our_losses == pytest.approx(losses, abs=1e-5, rel=2e-6)
    for their_step, our_step in zip(gradients, our_gradients, strict=True):
        assert their_step.keys() == our_step.keys()
        for name, gradient in their_step.items():
            assert_close(our_step[name], gradient, rtol=0, atol=1e-5 * max(1.0, gradient.abs().max().item()))
