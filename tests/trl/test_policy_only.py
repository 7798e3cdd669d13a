"""CPOTrainer, SimPO and AlphaPO in it, and ORPOTrainer beside those of TRL's experimental part."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from same_script import assert_same_lines, log_histories, pairs, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from align.errors import UserError
from align.trl import ORPOTrainer

LOGITS = ("logits/",)
"""TRL's mean is over the prompt and the padding too; ours over the completions' tokens, as DPOTrainer's."""


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


def padding(tiny_policy):
    """The tokenizer with a pad token, without which TRL's trainers stop here."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def same(name, tiny_policy, tmp_path, options, **given) -> list[dict]:
    packages = (f"trl.experimental.{name.lower()}", "align.trl")
    given = {"train_dataset": pairs(22), "packages": packages, "processing_class": padding(tiny_policy)} | given
    theirs, ours = log_histories(name, tmp_path, str(tiny_policy), options, **given)
    assert_same_lines(theirs, ours, without=LOGITS)
    return ours


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
@pytest.mark.parametrize("adapter", [None, lora])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_steps_evaluation_and_last_incomplete_accumulation_are_trls(tiny_policy, tmp_path, name, adapter, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": -1, "num_train_epochs": 3}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3, "learning_rate": 2e-3}
    options["beta"] = 0.3
    more = {"peft_config": adapter} if adapter else {}
    log = same(name, tiny_policy, tmp_path, options, eval_dataset=pairs(7, seed=1), **more)
    assert sum("loss" in line for line in log) == {1: 24, 4: 6}[accumulation]
    assert sum("eval_loss" in line for line in log) >= 3


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "hinge"},
        {"loss_type": "ipo", "cpo_alpha": 0.3},
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7, "beta": 2.0},
        {"loss_type": "simpo", "label_smoothing": 0.1, "logging_steps": 3},
        {"loss_type": "alphapo", "alpha": 0.2},
        {"loss_type": "sigmoid", "alpha": -0.1, "label_smoothing": 0.2},
        {"max_length": 12},
        {"max_length": None},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_loss_and_option_is_trls(tiny_policy, tmp_path, options):
    common = {"gradient_accumulation_steps": 2, "learning_rate": 2e-3}
    same("CPO", tiny_policy, tmp_path, common | options, peft_config=lora)


def test_a_pair_of_equal_rewards_is_not_won_as_in_trl(tiny_policy, tmp_path):
    """Lines are compared without accuracies where rewards are equal."""
    rows = Dataset.from_list([{"prompt": f"w{n} ", "chosen": "w5 w7", "rejected": "w5 w7"} for n in range(3, 9)])
    given = {"train_dataset": rows, "processing_class": padding(tiny_policy), "model": str(tiny_policy)}
    packages = ("trl.experimental.cpo", "align.trl")
    for log in log_histories("CPO", tmp_path, options={"max_steps": 2}, packages=packages, **given):
        assert [line["rewards/accuracies"] for line in log if "loss" in line] == [0.0, 0.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_smoothing_that_the_loss_does_not_read_is_said_where_it_is_set(tiny_policy, tmp_path, caplog, smoothing):
    options = {"loss_type": "hinge", "label_smoothing": smoothing}
    trainer("align.trl", "CPO", tmp_path, str(tiny_policy), options, train_dataset=pairs(3))
    assert ("the loss hinge does not read it" in caplog.text) == (smoothing > 0)


def test_orpos_odds_of_a_certain_completion_are_those_of_the_nearest_number_below_one():
    """log p - log(1 - p) with log p = -2^-23, float32's step at 1, of which TRL's are infinite; with a gradient."""
    means = torch.tensor([[0.0, -0.5], [-0.5, 0.0]], requires_grad=True)
    odds = ORPOTrainer._log_odds(None, means)
    half, certain = -0.5 - math.log(1 - math.exp(-0.5)), 23 * math.log(2)
    assert odds.tolist() == pytest.approx([certain - half, half - certain], rel=1e-6)
    odds[0].backward()
    assert torch.isfinite(means.grad).all()


def test_messages_and_implicit_prompts_are_tokenised_as_trl_does(tiny_policy, tmp_path):
    tokenizer = padding(tiny_policy)
    tokenizer.chat_template = (
        "{% if loud %}w13 {% endif %}"
        "{% for m in messages %}{{ '<s> ' + m['role'][0] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}<s> w4 {% endif %}"
    )
    turn = [{"role": "user", "content": "w5 w6"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("w7 w8", "w9"))
    data = [
        [{"prompt": turn, "chosen": chosen, "rejected": rejected, "chat_template_kwargs": {"loud": True}}],
        [{"chosen": turn + chosen, "rejected": turn + rejected}],
        [{"chosen": "w3 w4 w5", "rejected": "w3 w4 w6 w7"}, {"chosen": "w3 w9", "rejected": "w3 w4"}],
        [{"prompt": "w3 ", "chosen": "w4 </s>", "rejected": "w5 w6"}],
    ]
    for rows in data:
        found = []
        for package in ("trl.experimental.cpo", "align.trl"):
            given = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
            found.append(trainer(package, "CPO", tmp_path, str(tiny_policy), {}, **given).train_dataset)
        theirs, ours = found
        assert {*theirs.column_names} - {*ours.column_names} <= {"prompt_input_ids", "prompt_attention_mask"}
        assert ours.to_list() == theirs.select_columns(ours.column_names).to_list()


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_a_prompt_that_fills_max_length_is_left_out_with_a_count(tiny_policy, tmp_path, name, caplog):
    long = Dataset.from_list([{"prompt": "w3 " * 30, "chosen": "w4", "rejected": "w5"}])
    rows = Dataset.from_list([*pairs(5), *long])
    with caplog.at_level(logging.WARNING):
        one = trainer("align.trl", name, tmp_path, str(tiny_policy), {"max_length": 25}, train_dataset=rows)
    assert len(one.train_dataset) == 5
    assert "train: 1 pairs are left out, whose prompt alone fills max_length" in caplog.text


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_mean_logits_are_of_completions_tokens(tiny_policy, tmp_path, name):
    options = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4}
    one = trainer("align.trl", name, tmp_path, str(tiny_policy), options, train_dataset=pairs(4))
    one.train()
    model = AutoModelForCausalLM.from_pretrained(tiny_policy).double()
    for side in ("chosen", "rejected"):
        sums, count = 0.0, 0
        for row in one.train_dataset:
            logits = model(torch.tensor([row[f"{side}_input_ids"]])).logits[0, :-1].mean(dim=1)
            learnt = torch.tensor(row[f"{side}_labels"])[1:] != -100
            sums, count = sums + float(logits[learnt].sum()), count + int(learnt.sum())
        assert one.state.log_history[0][f"logits/{side}"] == pytest.approx(sums / count, rel=1e-5, abs=1e-6)


def test_micro_batches_of_a_run_that_broke_off_are_not_the_next_ones(tiny_policy, tmp_path):
    class BreaksOff(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            one.remove_callback(self)
            raise InterruptedError

    logs = []
    for callbacks in ([], [BreaksOff()]):
        options = {"gradient_accumulation_steps": 3, "max_steps": 2, "per_device_train_batch_size": 2}
        given = {"train_dataset": pairs(12), "callbacks": callbacks}
        one = trainer("align.trl", "CPO", tmp_path, str(tiny_policy), options, **given)
        if callbacks:
            with pytest.raises(InterruptedError):
                one.train()
        set_seed(3)
        one.train()
        logs.append(one.state.log_history)
    assert_same_lines(*logs)


def test_without_a_limit_sequences_have_512_tokens(tiny_policy, tmp_path, caplog):
    rows = Dataset.from_list([{"prompt": "w3 ", "chosen": "w4 " * 600, "rejected": "w5"}])
    one = trainer("align.trl", "CPO", tmp_path, str(tiny_policy), {"max_length": None}, train_dataset=rows)
    assert len(one.train_dataset[0]["chosen_input_ids"]) == 512 and "max_length is not set" in caplog.text


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_what_they_cannot_do_is_said(tiny_policy, tmp_path, name):
    def made(options=None, **given):
        return trainer("align.trl", name, tmp_path, str(tiny_policy), options or {}, train_dataset=pairs(9), **given)

    with pytest.raises(UserError, match="model_init: no release of TRL 1 takes it"):
        made(model_init=lambda: None)
    with pytest.raises(UserError, match="model: missing; give a name"):
        trainer("align.trl", name, tmp_path, None, {}, train_dataset=pairs(9))
    with pytest.raises(UserError, match="data_collator: a batch has no 'chosen_input_ids', only label"):
        made(data_collator=lambda rows: {"label": torch.zeros(len(rows))}).train()
