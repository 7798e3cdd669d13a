"""What other trainers call our keys: each name leads to a key that a recipe has, wherever it is written."""

import re

import pytest
import yaml

from align.cli import main
from align.errors import UserError
from align.other_tools import NAMES, TELLTALES, VALUES
from align.recipe import load_recipe, parse_recipe, recipe_keys

KEYS = recipe_keys()
SMALL = {
    "output": "runs/x",
    "policy": {"model": "m"},
    "data": {"sources": ["rows.jsonl"]},
    "objective": {"name": "lambda"},
    "rollout": {"reward": {"name": "length", "max": 9}},
}
WANTED = {
    "policy.model": "model_name_or_path base_model model_name",
    "policy.dtype": "torch_dtype",
    "policy.revision": "model_revision",
    "policy.attention": "attn_implementation attn_impl flash_attn",
    "policy.attention=flash_attention_2": "flash_attention",
    "policy.quantization=4bit": "load_in_4bit quantization_bit quant_bits",
    "policy.chat_template": "template chat_template_path",
    "policy.adapter.rank": "lora_r lora_rank r",
    "policy.adapter.alpha": "lora_alpha",
    "policy.adapter.dropout": "lora_dropout",
    "policy.adapter.targets": "lora_target_modules target_modules lora_target",
    "policy.adapter.targets=all-linear": "lora_target_linear",
    "policy.adapter=rslora": "use_rslora",
    "policy.adapter=dora": "use_dora",
    "policy.adapter": "finetuning_type train_type tuner_type adapter",
    "policy.start_adapter": "adapter_name_or_path lora_model_dir adapters",
    "data.sources": "dataset_name dataset datasets",
    "data.eval_sources": "eval_dataset val_dataset test_datasets",
    "data.eval_fraction": "val_size val_set_size split_dataset_ratio",
    "data.limit": "max_samples",
    "data.max_length": "cutoff_len max_seq_length sequence_len",
    "data.overlong": "truncation_mode",
    "data.workers": "dataset_num_proc preprocessing_num_workers",
    "score.beta": "beta pref_beta dpo_beta",
    "objective": "loss_type pref_loss rl rlhf_type stage",
    "objective.weight": "loss_weights pref_ftx rpo_alpha",
    "objective.margin": "simpo_gamma",
    "objective.label_smoothing": "label_smoothing",
    "objective.desirable_weight": "kto_chosen_weight",
    "score.alpha": "ld_alpha",
    "score.divergence.name": "f_divergence_type",
    "reference.cache": "precompute_ref_log_probs",
    "train.learning_rate": "lr",
    "train.steps": "max_steps",
    "train.epochs": "num_train_epochs num_epochs",
    "train.lists_per_step": "per_device_train_batch_size gradient_accumulation_steps micro_batch_size batch_size",
    "train.tokens_per_batch": "per_device_eval_batch_size auto_find_batch_size",
    "train.schedule": "lr_scheduler_type lr_scheduler",
    "train.warmup_ratio": "warmup_steps",
    "train.optimizer": "optim",
    "train.precision=bfloat16": "bf16",
    "train.precision=float16": "fp16",
    "train.gradient_checkpointing": "use_gradient_checkpointing",
    "train.dropout": "disable_dropout",
    "train.seed": "random_state data_seed",
    "train.packing": "padding_free sample_packing group_by_length",
    "train.eval_steps": "eval_strategy evals_per_epoch",
    "train.save_steps": "save_strategy saves_per_epoch",
    "train.keep_checkpoints": "save_total_limit",
    "train.keep_best": "load_best_model_at_end metric_for_best_model",
    "output": "output_dir",
    "rollout.completions": "num_generations",
    "rollout.max_tokens": "max_new_tokens",
}
"""Our key -> other tools' names of it, as their documentation has them."""
PAIRS = [(name, key) for key, names in WANTED.items() for name in names.split()]


def said(tree: dict) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(SMALL | tree, origin="r")
    return str(caught.value)


def test_there_are_enough():
    assert len(PAIRS) >= 70 and len(NAMES) > 200


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_a_name_leads_to_its_key_wherever_it_stands(name, key):
    value = {"rl": "grpo", "stage": "ppo"}.get(name, 3)
    for place, tree in ((name, {name: value}), (f"train.{name}", {"train": {name: value}})):
        message = said(tree)
        assert message.startswith(f"r: unknown key `{place}`; ") and f" `{key}` here" in message, message
    assert f" `{key}` here" in said({"data": {"sources": ["rows.jsonl"], name: value}})


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_to_a_key_that_a_recipe_has_or_says_what_holds(name, tmp_path):
    here = NAMES[name]
    assert here.write or here.note
    key, fixed, value = here.write.partition("=")
    if key:
        assert re.sub(r"\.\d", "", key) in KEYS
    if fixed:
        check_value(key, value, tmp_path)
    for note in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)[`=]", here.note):
        assert note in KEYS, note


@pytest.mark.parametrize(("key", "elsewhere"), [(key, word) for key, words in VALUES.items() for word in words])
def test_every_value_is_one_that_its_key_takes(key, elsewhere, tmp_path):
    ours = VALUES[key][elsewhere]
    check_value(key, ours, tmp_path)
    try:
        load(key, elsewhere, tmp_path)
    except UserError as error:
        assert f"did you mean `{ours}`?" in str(error)


def load(key: str, value: str, folder) -> None:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL | ({"online": {}} if key.startswith("online") else {})))
    load_recipe(path, [f"{key}={value}"])


def check_value(key: str, value: str, folder) -> None:
    """The key takes the value; the recipe may still need another to go with it."""
    try:
        load(key, value, folder)
    except UserError as error:
        assert not re.search("unknown key|input should|there is no|is missing", str(error)), error


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ipo", "`ipo` is {objective: {name: squared}, score: {name: log_ratio_mean}} here"),
        ("simpo", "`simpo` is {objective: {name: logistic, margin: 0.5}, score: {name: likelihood_mean, beta: 2.0}}"),
        ("dpo", "`dpo` is {objective: {name: logistic}} here"),
        ("aot", "it sorts across the batch"),
        ("sft", "write `task: sft`"),
        ("rm", "write `task: reward`"),
    ],
)
def test_a_loss_by_its_name_elsewhere(value, message):
    assert message in said({"loss_type": value})


def test_the_nearest_value_is_one_of_the_key_at_hand():
    assert "did you mean `cosine`?" in said({"train": {"schedule": "cosin"}})
    assert "did you mean `bfloat16`?" in said({"train": {"precision": "bf16"}})
    assert "did you mean" not in said({"train": {"precision": "linear"}})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "5e-6"], "`--learning_rate 5e-6`: .* `train.learning_rate=5e-6`"),
        (["--learning_rate=5e-6"], "`--learning_rate=5e-6`: .* `train.learning_rate=5e-6`"),
        (["--learning-rate", "5e-6"], "`train.learning_rate=5e-6`"),
        (["--train.lr", "1e-3"], "`train.learning_rate=1e-3`"),
        (["-lr", "1e-3"], "`train.learning_rate=1e-3`"),
        (["--policy.model", "m"], "`policy.model=m`"),
        (["--lora_r", "8"], "`policy.adapter.rank=8`"),
        (["--bf16", "train.steps=3"], "`--bf16`: .* `train.precision=bfloat16`"),
        (["--warmup_steps", "10"], r"`train.warmup_ratio=...` \(the share of all steps"),
        (["--push_to_hub"], "align export RUN OUTPUT --push"),
        (["--nothing.like.it", "1"], "such as `train.learning_rate=1e-4`"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_an_option_is_answered_with_its_override(words, message, first, capsys, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(SystemExit) as end:
        main(["train", *words, str(path)] if first else ["train", str(path), *words])
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)


FOREIGN = {
    "TRL": "model_name_or_path: m\ndataset_name: d\nlearning_rate: 5.0e-7\nloss_type: [sigmoid]\noutput_dir: o\n"
    "per_device_train_batch_size: 8\nuse_peft: true\nlora_r: 16\n",
    "LLaMA-Factory": "model_name_or_path: m\nstage: dpo\ndo_train: true\nfinetuning_type: lora\nlora_target: all\n"
    "pref_beta: 0.1\ndataset: d\ntemplate: qwen3\ncutoff_len: 2048\noutput_dir: o\n",
    "axolotl": "base_model: m\nrl: dpo\ndatasets:\n  - path: d\n    split: train\nadapter: qlora\nlora_r: 32\n"
    "sequence_len: 2048\nmicro_batch_size: 2\nnum_epochs: 1\noutput_dir: o\n",
    "ms-swift": '{"rlhf_type": "dpo", "model": "m", "train_type": "lora", "dataset": ["d"], "lora_rank": 8,'
    ' "torch_dtype": "bfloat16", "target_modules": ["all-linear"], "output_dir": "o"}',
    "Unsloth": "model_name: m\nmax_seq_length: 2048\nload_in_4bit: true\nr: 16\nrandom_state: 3407\n"
    "use_gradient_checkpointing: unsloth\n",
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_a_recipe_of_another_tool_is_recognised_in_one_line(tool, tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(FOREIGN[tool])
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["train.steps=3"])
    message = str(caught.value)
    assert message.startswith(f"{path}: this is a recipe of {tool}, not of Align; ") and "\n" not in message
    for name in yaml.safe_load(FOREIGN[tool]):
        if name in NAMES and NAMES[name].write:
            assert f"`{name}` is `{NAMES[name].write}`" in message
    assert set(FOREIGN) == set(TELLTALES)


def test_a_recipe_of_ours_with_some_of_their_names_stays_ours():
    theirs = {"num_epochs": 1, "micro_batch_size": 2, "lora_r": 8, "rl": "dpo", "sequence_len": 9}
    assert "unknown key `num_epochs`" in said(theirs) and "axolotl" not in said(theirs)
