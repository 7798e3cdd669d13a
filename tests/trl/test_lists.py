"""DPOTrainer with an objective of lists in `align`: the numbers of `align train` on the same rows."""

import json

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel
from same_script import pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from align.errors import UserError
from align.training.train import train
from align.trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from align.trl.extra import OF_LISTS

STEPS = 5
LORA = {"name": "lora", "rank": 4, "alpha": 8}
FIGURES = ("loss", "grad_norm", "learning_rate", "ndcg", "rewards/margins", "rewards/accuracies", "logps/chosen", "kl")
T_REG = {"objective": "logistic", "regularizer": {"name": "token_reg", "alpha": 0.25}}
T_REG |= {"token_rewards": {"name": "contrast", "better": "w3 {prompt}", "worse": "w4 w5 {prompt}"}}


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def configured(tmp_path, align, **options) -> DPOConfig:
    common = {"output_dir": str(tmp_path / "ours"), "bf16": False, "use_cpu": True, "report_to": "none", "seed": 0}
    common |= {"per_device_train_batch_size": 30, "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-2}
    common |= {"lr_scheduler_type": "constant", "disable_tqdm": True, "save_strategy": "no"}
    return DPOConfig(**common | options, align=align)


def lists_of(tmp_path, tiny_policy, rows, align, options=None, **given) -> DPOTrainer:
    args = configured(tmp_path, align, **(options or {}))
    return DPOTrainer(str(tiny_policy), args=args, train_dataset=Dataset.from_list(rows), **given)


def recipe_like(make_recipe, path, align: dict, **sections):
    """The recipe that says what `align` does; all lists are one step's, so that the order of rows is rounding."""
    own = {name: value for name, value in align.items() if name not in ("adapter", "data")}
    own["policy"] = {"adapter": align.get("adapter", {"name": "full"})}
    own["data"] = {"sources": [str(path)], "eval_fraction": 0.0} | align["data"]
    own["train"] = {"lists_per_step": 30, "schedule": "constant", "warmup_ratio": 0.0, "steps": STEPS, "epochs": 1}
    return make_recipe(**own | sections, sampling={"prompts": 0, "token_lists": 0})


@pytest.mark.parametrize(
    "align",
    [
        {"objective": "lambda"},
        {"objective": {"name": "lambda"}, "adapter": LORA},
        {"objective": [{"name": "logistic"}, {"name": "sft", "weight": 0.1}], "adapter": LORA, "dpop": 0.5},
        {"objective": "logistic", "score": {"name": "likelihood_mean", "beta": 2.0}, "data": {"select": "best_worst"}},
        {"objective": "softmax", "adapter": {"name": "pissa", "rank": 4, "alpha": 4}, "wpo": "clamped"},
        T_REG | {"adapter": LORA},
        {"objective": "lambda", "adapter": LORA, "reference": {"name": "moving", "every": 2, "mixture": 0.6}},
        {"objective": "lambda", "reference": {"name": "moving", "every": 2, "mixture": 0.6}},
    ],
    ids=lambda align: "-".join(str(v if isinstance(v, str) else k) for k, v in align.items()),
)
def test_lists_step_as_align_train_does(make_recipe, tiny_policy, rows_file, tmp_path, align):
    align = align | {"data": {"grades": "raw"} | align.get("data", {})}
    one = lists_of(tmp_path, tiny_policy, rows_of(rows_file), align)
    one.train()
    ours = [line for line in one.state.log_history if "loss" in line]
    theirs = rows_of(train(recipe_like(make_recipe, rows_file, align)).path / "metrics.jsonl")
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        for name in [n for n in FIGURES if n in other]:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (name, other["step"])


def test_weights_accumulation_and_an_incomplete_step_are_one_mean_over_lists(tiny_policy, rows_file, tmp_path):
    """Seven micro-batches of four, then two lists: every step is the mean over its lists, weighted as the rows say."""
    rows = [row | {"weight": 1.0 + place % 3} for place, row in enumerate(rows_of(rows_file))]
    align = {"objective": "lambda", "data": {"grades": "raw"}, "adapter": LORA}
    found = {}
    for size, accumulation, tokens in ((30, 1, 4096), (4, 8, 60)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        one = lists_of(tmp_path, tiny_policy, rows, align | {"tokens_per_batch": tokens}, options)
        one.train()
        found[size] = [line for line in one.state.log_history if "loss" in line]
    for whole, parts in zip(found[30], found[4], strict=True):
        for name in ("loss", "grad_norm"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-4), name


def test_the_configurations_beta_and_prompt_length_are_those_of_lists(tiny_policy, rows_file, tmp_path):
    options = {"beta": 0.7, "max_prompt_length": 3}
    one = lists_of(tmp_path, tiny_policy, rows_of(rows_file)[:6], {"objective": "lambda"}, options)
    assert one.beta == one.list_loss.terms[0].beta == 0.7
    assert {len(ids) for ids in one.train_dataset["prompt_ids"]} == {3}


def test_evaluation_is_of_lists_too(tiny_policy, rows_file, tmp_path):
    rows = rows_of(rows_file)
    held, more = Dataset.from_list(rows[20:]), {"per_device_eval_batch_size": 4}
    one = lists_of(tmp_path, tiny_policy, rows[:20], {"objective": "lambda"}, more, eval_dataset=held)
    first = one.evaluate()
    assert {"eval_loss", "eval_ndcg", "eval_rewards/margins"} <= first.keys()
    assert one.evaluate(held)["eval_loss"] == pytest.approx(first["eval_loss"])


def test_a_subclass_stays_one_and_pairs_are_lists_of_two(tiny_policy, tmp_path):
    class Own(DPOTrainer):
        def log(self, logs, start_time=None):
            self.seen = {**getattr(self, "seen", {}), **logs}
            super().log(logs, start_time)

    args = configured(tmp_path, {"objective": "logistic"}, max_steps=1)
    one = Own(
        str(tiny_policy), args=args, train_dataset=pairs(9), peft_config=LoraConfig(r=4, target_modules=["q_proj"])
    )
    one.train()
    assert isinstance(one, Own) and isinstance(one.model, PeftModel)
    assert one.seen["loss"] == pytest.approx(0.6931, abs=1e-3)

    class Other(Own):
        def _prepare_dataset(self, *given):
            raise AssertionError

    with pytest.raises(UserError, match=r"Other\._prepare_dataset would never be called: DPOTrainer takes"):
        Other(str(tiny_policy), args=args, train_dataset=pairs(9))

    class Hidden(DPOTrainer):
        def __init__(self, settings):
            super().__init__(str(tiny_policy), args=settings, train_dataset=pairs(9))

    with pytest.raises(UserError, match="align: a subclass must be given its configuration as `args`"):
        Hidden(args)


def test_a_command_line_says_it_too(tmp_path):
    line = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--bf16",
        "False",
        "--align",
        '{"objective": {"name": "lambda"}}',
    ]
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(line)
    assert args.align == {"objective": {"name": "lambda"}}


def test_a_moving_reference_goes_on_from_a_checkpoint(tiny_policy, rows_file, tmp_path):
    align = {"objective": "lambda", "data": {"grades": "raw"}, "adapter": LORA}
    align |= {"reference": {"name": "moving", "every": 2, "mixture": 0.6}}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = lists_of(tmp_path, tiny_policy, rows_of(rows_file), align, saving)
    whole.train()
    rest = lists_of(tmp_path, tiny_policy, rows_of(rows_file), align, saving)
    rest.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    for one, other in zip(whole.state.log_history[:-1], rest.state.log_history[:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), one["step"]


MISTAKES = [
    ({"objektive": "lambda"}, {}, r"align: there is no 'objektive'; did you mean 'objective'\? it takes tokens_per"),
    ({"score": "log_ratio"}, {}, "align: 'score' goes with an `objective` of lists"),
    ({"objective": "lamda"}, {}, "there is no objective `lamda`"),
    ({"objective": "kto"}, {}, "align.objective: kto measures from a baseline of a whole step; use KTOTrainer"),
    ({"objective": "lambda"}, {"loss_type": ["ipo"]}, "loss_type: pairs read it, and `align` has an objective"),
    ({"objective": "lambda"}, {"precompute_ref_log_probs": True}, "precompute_ref_log_probs: pairs read it"),
    ({"objective": "lambda", "data": {"sources": ["x"]}}, {}, "align.data.sources: rows come as train_dataset"),
    ({"objective": "lambda", "adapter": {"name": "eva"}}, {}, "align.adapter: eva has to see the rows"),
    ({"objective": "lambda", "adapter": {"name": "adalora"}}, {}, "align.adapter: adalora has to see"),
    (T_REG | {"token_rewards": {"name": "log_ratio", "model": "x"}}, {}, "align.token_rewards: only the contrast"),
]


@pytest.mark.parametrize(("align", "options", "sentence"), MISTAKES, ids=lambda own: str(own)[:40])
def test_a_mistake_in_align_is_answered_in_a_sentence(tiny_policy, rows_file, tmp_path, align, options, sentence):
    with pytest.raises(UserError, match=sentence):
        lists_of(tmp_path, tiny_policy, rows_of(rows_file), align, options)


def test_rows_are_refused_by_their_data_set_and_number(tiny_policy, rows_file, tmp_path):
    rows = rows_of(rows_file)
    rows[4]["grades"] = rows[4]["grades"][:-1]
    with pytest.raises(UserError, match=r"^train\.jsonl, row 5"):
        lists_of(tmp_path, tiny_policy, rows, {"objective": "lambda", "data": {"grades": "raw"}})
    args = configured(tmp_path, {"objective": "lambda"})
    with pytest.raises(UserError, match="^train: a stream; lists are read whole"):
        DPOTrainer(str(tiny_policy), args=args, train_dataset=Dataset.from_list(rows[:4]).to_iterable_dataset())
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    args = KTOConfig(output_dir=str(tmp_path), bf16=False, align={"objective": "lambda"})
    given = {"train_dataset": pairs(9), "processing_class": AutoTokenizer.from_pretrained(tiny_policy)}
    with pytest.raises(UserError, match=r"align: 'objective' is DPOTrainer's; KTOTrainer takes tokens_per_batch"):
        KTOTrainer(model, args=args, **given)
    assert all(OF_LISTS.values())
