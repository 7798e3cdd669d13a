"""DPOTrainer beside TRL's: the same script, twenty steps, every figure of the log."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from same_script import assert_same_lines, log_histories, pairs, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import UserError
from align.trl import DPOConfig, DPOTrainer
from align.trl.config import LOSS_TYPES

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
LOUD = {"chat_template_kwargs": {"loud": True}}
SMOOTHED = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1, "sigmoid": 0.3}


def lora() -> LoraConfig:
    return LoraConfig(**LORA)


def same(tiny_policy, tmp_path, options: dict, **given) -> list[dict]:
    given = {"train_dataset": pairs(22)} | given
    theirs, ours = log_histories("DPO", tmp_path, given.pop("model", str(tiny_policy)), options, **given)
    assert_same_lines(theirs, ours)
    return ours


@pytest.mark.parametrize("adapter", [None, lora])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_steps_evaluation_and_last_incomplete_accumulation_are_trls(tiny_policy, tmp_path, adapter, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "max_steps": -1, "num_train_epochs": 3}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    more = {"peft_config": adapter} if adapter else {}
    log = same(tiny_policy, tmp_path, options, eval_dataset=pairs(7, seed=1), **more)
    assert sum("loss" in line for line in log) == {1: 24, 4: 6}[accumulation]
    assert sum("eval_loss" in line for line in log) >= 3


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_every_loss_is_trls(tiny_policy, tmp_path, loss):
    options = {"loss_type": [loss], "label_smoothing": SMOOTHED.get(loss, 0.0), "gradient_accumulation_steps": 2}
    options |= {"learning_rate": 2e-4, "max_grad_norm": 1.0}
    options["beta"] = 0.05 if loss == "discopop" else 0.3  # whose blend turns at 1 / 20 of the others' scale
    same(tiny_policy, tmp_path, options, peft_config=lora)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["sigmoid", "aot"], "loss_weights": [1.0, 0.5]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence", "loss_type": ["ipo"]},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "loss_type": ["sigmoid_norm"]},
        {"ld_alpha": 0.4},
        {"use_weighting": True},
        {"loss_type": ["discopop"], "discopop_tau": 0.5, "beta": 0.3},
        {"loss_type": ["discopop", "sft"], "discopop_tau": 0.2, "f_divergence_type": "forward_kl"},
        {"precompute_ref_log_probs": True, "ld_alpha": 0.4},
        {"max_length": 8},
        {"max_length": 7, "truncation_mode": "keep_end"},
        {"gradient_checkpointing": False, "max_grad_norm": 0.0},
        {"lr_scheduler_type": "cosine", "warmup_steps": 4, "seed": 3, "weight_decay": 0.1},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_every_option_is_trls(tiny_policy, tmp_path, options):
    common = {"gradient_accumulation_steps": 2, "learning_rate": 2e-3}
    same(tiny_policy, tmp_path, common | options, peft_config=lora)


def wpo_weight(logits, ids, first) -> torch.Tensor:
    """exp of the mean over a completion's tokens of log p(token) - log sum_v p(v)^2."""
    logps = logits[first - 1 : -1].log_softmax(dim=1)
    own = logps.gather(1, ids[first:, None])[:, 0]
    return (own - (2 * logps).logsumexp(dim=1)).mean().exp()


def test_sft_under_wpos_weights_is_the_micro_batchs_mean_times_each_pairs_weight(tiny_policy, tmp_path):
    """Where TRL 1.16 stops (`*=` on an expanded tensor); what its lines say, in float64: no step has been taken, so
    that sigmoid is log 2."""
    options = {"use_weighting": True, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "max_steps": 1}
    options |= {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    one = trainer("align.trl", "DPO", tmp_path, str(tiny_policy), options, train_dataset=pairs(6))
    one.train()
    model, losses = AutoModelForCausalLM.from_pretrained(tiny_policy).double(), []
    for inputs in one.get_train_dataloader():
        weights, nll, tokens = torch.ones(3, dtype=torch.float64), 0.0, 0
        for row in range(6):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            first = int(inputs["completion_mask"][row].argmax())
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            weights[row % 3] *= wpo_weight(logits, ids, first)
            if row < 3:
                nll -= logits[first - 1 : -1].log_softmax(dim=1).gather(1, ids[first:, None]).sum()
                tokens += len(ids) - first
        losses.append((math.log(2) * weights).mean() + 0.5 * (nll / tokens * weights).mean())
    assert one.state.log_history[0]["loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


def test_a_moving_reference_is_trls(tiny_policy, tmp_path):
    same(tiny_policy, tmp_path, {"sync_ref_model": True, "ref_model_sync_steps": 3, "learning_rate": 1e-3})


def test_full_training_with_a_precomputed_reference_is_trls(tiny_policy, tmp_path):
    options = {"precompute_ref_log_probs": True, "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 7}
    same(tiny_policy, tmp_path, options, eval_dataset=pairs(7, seed=1))


def test_a_reference_that_is_given_is_the_one(tiny_policy, save_llama, tmp_path):
    """Margins are large from the first step, so that which of two rewards is larger is no rounding."""
    other = save_llama(tmp_path / "other", seed=5)
    log = same(
        tiny_policy,
        tmp_path,
        {"learning_rate": 1e-3},
        model=lambda: AutoModelForCausalLM.from_pretrained(tiny_policy),
        ref_model=lambda: AutoModelForCausalLM.from_pretrained(other),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy),
    )
    steps = [line for line in log if "loss" in line]
    assert min(abs(line["rewards/margins"]) for line in steps) > 1e-3
    assert len({line["rewards/accuracies"] for line in steps}) > 1


def test_an_adapter_that_is_trained_on_is_its_own_reference(tiny_policy, tmp_path):
    def model():
        torch.manual_seed(4)
        made = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy), lora())
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return made

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    log = same(tiny_policy, tmp_path, {"learning_rate": 1e-3}, model=model, processing_class=tokenizer)
    assert log[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)


def test_an_adapter_that_is_its_own_reference_goes_on_where_it_was(tiny_policy, tmp_path):
    """transformers passes over the adapter that trains where a checkpoint holds its copy too."""

    def made():
        torch.manual_seed(4)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy), lora())
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "output_dir": str(tmp_path / "run")}
        given = {"train_dataset": pairs(22), "processing_class": AutoTokenizer.from_pretrained(tiny_policy)}
        return trainer("align.trl", "DPO", tmp_path, model, options, **given)

    whole, rest = made(), made()
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_lines(whole.state.log_history[:-1], rest.state.log_history[:-1], without=("num_tokens",))


@pytest.mark.parametrize(("first", "then"), [("trl", "align.trl"), ("align.trl", "trl"), ("align.trl", "align.trl")])
def test_a_checkpoint_of_one_goes_on_with_the_other(tiny_policy, tmp_path, first, then):
    options = {"gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "run"), "save_total_limit": 2}
    options |= {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    given = {"train_dataset": pairs(22), "peft_config": lora()}
    whole = trainer("trl", "DPO", tmp_path, str(tiny_policy), options, **given)
    whole.train()
    begun = trainer(first, "DPO", tmp_path, str(tiny_policy), options | {"max_steps": 8}, **given)
    begun.train()
    rest = trainer(then, "DPO", tmp_path, str(tiny_policy), options, **given)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same_lines(
        whole.state.log_history[:-1], rest.state.log_history[:-1], without=("num_tokens",)
    )  # TRL counts from 0


def test_messages_and_implicit_prompts_are_tokenised_as_trl_does(tiny_policy, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].name + ' ' }}{% endif %}{% if loud %}w13 {% endif %}"
        "{% for m in messages %}{{ '<s> ' + m['role'][0] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}<s> w4 {% endif %}"
    )
    turn = [{"role": "user", "content": "w5 w6"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("w7 w8", "w9"))
    more = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w11"}]
    data = [
        [{"prompt": turn, "chosen": chosen + more, "rejected": rejected}],
        [{"chosen": turn + chosen, "rejected": turn + rejected}],
        [{"prompt": turn, "chosen": chosen, "rejected": rejected, "tools": '[{"name": "w12"}]'} | LOUD],
        [{"chosen": "w3 w4 w5", "rejected": "w3 w4 w6 w7"}, {"chosen": "w3", "rejected": "w3 w4"}],
        [{"chosen": "w3 x5", "rejected": "w3 w4"}, {"chosen": "w5 </s>", "rejected": "w5 w6 </s>"}],
    ]
    for rows in data:
        found = []
        for package in ("trl", "align.trl"):
            given = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
            one = trainer(package, "DPO", tmp_path, str(tiny_policy), {}, **given)
            found.append(one.train_dataset)
        theirs, ours = found
        assert ours.column_names == theirs.column_names
        assert ours.to_list() == theirs.to_list()
    assert "train: in 1 of 1 rows the prompt's last tokens are others than before a completion" in caplog.text


def test_arguments_of_older_releases_are_taken_or_answered(tiny_policy, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    args = DPOConfig(
        output_dir=str(tmp_path), rpo_alpha=0.5, max_prompt_length=3, generate_during_eval=True, bf16=False
    )
    assert args.loss_type == ["sigmoid", "sft"] and args.loss_weights == [1.0, 0.5]
    assert "generate_during_eval has no effect: add TRL's LogCompletionsCallback" in caplog.text
    one = DPOTrainer(str(tiny_policy), args=args, train_dataset=pairs(9), tokenizer=tokenizer, beta=0.7)
    assert one.beta == 0.7 and max(map(len, one.train_dataset["prompt_ids"])) == 3
    with pytest.raises(UserError, match="ref_adapter_name: the adapter that the model comes with"):
        DPOConfig(output_dir=str(tmp_path), ref_adapter_name="x", bf16=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        DPOTrainer(str(tiny_policy), args=args, train_dataset=pairs(9), nonsense=1)


def test_a_method_that_is_never_called_is_refused_and_compute_loss_is_called(tiny_policy, tmp_path):
    class Old(DPOTrainer):
        def concatenated_forward(self, model, batch):
            return None

    class Double(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs)

    options = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none", "max_steps": 4}
    options |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0}
    with pytest.raises(UserError, match=r"Old\.concatenated_forward would never be called: DPOTrainer takes"):
        Old(str(tiny_policy), args=DPOConfig(**options), train_dataset=pairs(9), peft_config=lora())
    logs = []
    for cls in (DPOTrainer, Double):
        one = cls(str(tiny_policy), args=DPOConfig(**options), train_dataset=pairs(22), peft_config=lora())
        one.train()
        logs.append([line for line in one.state.log_history if "loss" in line])
    for once, twice in zip(*logs, strict=True):
        assert twice["loss"] == pytest.approx(2 * once["loss"], rel=1e-5)
        assert twice["grad_norm"] == pytest.approx(2 * once["grad_norm"], rel=1e-5)
        assert twice["logps/chosen"] == pytest.approx(once["logps/chosen"], rel=1e-5)
