"""Files of other tools become recipes: every key is answered, and losses are the tool's."""

import dataclasses
import json

import pytest
import torch
import yaml
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from align.errors import UserError
from align.importing import axolotl, llama_factory, options, swift, trl
from align.importing.losses import INSTEAD
from align.importing.run import import_file, plan_of
from align.importing.templates import TEMPLATES, elements, jinja_text
from align.objectives import OBJECTIVES
from align.recipe import load_recipe

LF = {"model_name_or_path": "m", "stage": "dpo", "dataset": "mine", "output_dir": "out"}
AXOLOTL = {"base_model": "m", "rl": "dpo", "datasets": [{"path": "hub/rows", "type": "chat_template.default"}]}
AXOLOTL |= {"learning_rate": 1e-5}
SWIFT = {"rlhf_type": "dpo", "model": "m", "dataset": "hub/rows"}
TRL = {"method": "dpo", "model_name_or_path": "m", "dataset_name": "hub/rows", "output_dir": "out"}
TOOLS = {
    "LLaMA-Factory": (llama_factory, LF),
    "axolotl": (axolotl, AXOLOTL),
    "ms-swift": (swift, SWIFT),
    "TRL": (trl, TRL),
}


def twins(tool):
    """A tool's keys, but those that say the same as one of its small file."""
    module, small = TOOLS[tool]
    said = {module.GENERAL.get(name, name) for name in small}
    return [key for key in sorted(module.KEYS) if module.GENERAL.get(key, key) not in said]


KEYS = [(tool, key) for tool in TOOLS for key in twins(tool)]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a tool's file and give its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    info = {"mine": {"file_name": "p.json", "ranking": True}, "hub": {"hf_hub_url": "a/b", "subset": "en"}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))

    def written(values, name="old.yaml"):
        file = tmp_path / name
        file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return file

    return written


def imported(file):
    """The recipe that comes of a file."""
    target = file.with_name("new.yaml")
    import_file(str(file), str(target))
    return load_recipe(target)


@pytest.mark.parametrize(("tool", "key"), KEYS)
def test_no_key_is_passed_over_in_silence(write, tool, key):
    plan = plan_of(write({**TOOLS[tool][1], key: None}))
    assert [line for line in plan.lines if key in line.names]


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_key_stops_with_the_nearest(write, tool):
    with pytest.raises(UserError, match=r"old.yaml: `learning_rat` is no key .* did you mean `learning_rate`\?"):
        plan_of(write({**TOOLS[tool][1], "learning_rat": 1}))


@pytest.mark.parametrize("tool", TOOLS)
def test_the_recipe_loads_and_names_every_dropped_key(write, tool):
    file = write({**TOOLS[tool][1], "dataloader_num_workers": 4})
    assert imported(file).policy.model == "m"
    assert "#   dataloader_num_workers: 4: " in file.with_name("new.yaml").read_text()


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_recomputation_is_read_by_its_old_name_and_its_new_one(write, name, on):
    assert imported(write({**TRL, name: on})).train.gradient_checkpointing == on


def test_what_a_file_leaves_empty_or_off_asks_for_nothing(write):
    plan = plan_of(write({**AXOLOTL, "wandb_project": None, "load_in_4bit": False, "load_in_8bit": False}))
    why = {line.names[0]: line.why for line in plan.lines if line.verdict == "dropped"}
    assert why == {"wandb_project": "not set", "load_in_4bit": "off, as here", "load_in_8bit": "off, as here"}


def test_trl_has_no_key_that_is_not_answered():
    package = pytest.importorskip("trl")
    cpo, orpo = (pytest.importorskip(f"trl.experimental.{name}") for name in ("cpo", "orpo"))
    classes = [getattr(package, name) for name in ("DPOConfig", "KTOConfig", "RewardConfig", "ModelConfig")]
    classes += [package.ScriptArguments, cpo.CPOConfig, orpo.ORPOConfig]
    assert not {field.name for cls in classes for field in dataclasses.fields(cls)} - trl.KEYS


def test_trls_defaults_are_trls():
    package = pytest.importorskip("trl")
    classes = (package.DPOConfig, package.ModelConfig, package.ScriptArguments)
    fields = {field.name: field.default for cls in classes for field in dataclasses.fields(cls)}
    shared = set(trl.DEFAULTS) & fields.keys() - {"bf16"}  # None there: on, unless fp16 is
    assert len(shared) > 15
    for name in shared:
        assert str(getattr(fields[name], "value", fields[name])) == str(trl.DEFAULTS[name]), name


METHODS = {
    ("LLaMA-Factory", "stage"): ("sft", "pt", "ppo"),
    ("axolotl", "rl"): ("grpo", "gdpo", "ebft"),
    ("ms-swift", "rlhf_type"): ("ppo", "grpo", "gkd"),
    ("TRL", "method"): ("sft", "grpo", "rloo", "online_dpo"),
}


@pytest.mark.parametrize(
    ("tool", "key", "method"), [(*where, name) for where, names in METHODS.items() for name in names]
)
def test_other_methods_are_refused_by_name(write, tool, key, method):
    with pytest.raises(UserError) as caught:
        plan_of(write({**TOOLS[tool][1], key: method}))
    assert f"trains by `{method}`, which is not imported; {INSTEAD[method]}" in str(caught.value)


BETA, GAMMA, SMOOTH = 0.3, 0.7, 0.2


def log_odds(c, r):
    return (c - r) - (torch.log1p(-c.exp()) - torch.log1p(-r.exp()))


PREFERENCE_LOSSES = {
    "sigmoid": lambda c, r, a, b: (
        -(1 - SMOOTH) * logsigmoid(BETA * (c - r - a + b)) - SMOOTH * logsigmoid(-BETA * (c - r - a + b))
    ),
    "hinge": lambda c, r, a, b: (1 - BETA * (c - r - a + b)).clamp(min=0),
    "ipo": lambda c, r, a, b: (c - r - a + b - 1 / (2 * BETA)) ** 2,
    "orpo": lambda c, r, a, b: -c - BETA * logsigmoid(log_odds(c, r)),
    "simpo": lambda c, r, a, b: -logsigmoid(BETA * (c - r - GAMMA / BETA)),
}
"""LLaMA-Factory's losses from its formulas: c, r are a pair's log-probabilities, a, b the reference's."""


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_llama_factorys_losses_are_its_formulas(write, loss):
    smoothing = {"dpo_label_smoothing": SMOOTH} if loss == "sigmoid" else {}
    recipe = imported(write({**LF, "pref_loss": loss, "pref_beta": BETA, "simpo_gamma": GAMMA, **smoothing}))
    policy = torch.tensor([[-0.4, -0.9], [-1.3, -0.2]], dtype=torch.float64)
    reference = torch.tensor([[-0.5, -0.6], [-0.7, -0.8]], dtype=torch.float64)
    total = torch.zeros(2, dtype=torch.float64)
    for term in recipe.objective:
        score = term.score or recipe.score
        scores = score.beta * (policy - reference if score.name.startswith("log_ratio") else policy)
        own = term.model_dump(exclude={"name", "score", "weight"})
        own |= {"beta": score.beta} if term.name == "squared" else {}
        mask = torch.ones(2, 2, dtype=torch.bool)
        total += term.weight * OBJECTIVES[term.name](scores, torch.tensor([[1.0, 0.0]] * 2), mask, **own)
    assert_close(total, PREFERENCE_LOSSES[loss](*policy.T, *reference.T))
    means = {"ipo": "log_ratio_mean", "orpo": "likelihood_mean", "simpo": "likelihood_mean"}
    assert recipe.score.name == means.get(loss, "log_ratio")


OBJECTIVES_OF = [
    (
        "TRL",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        [{"name": "logistic", "weight": 0.8}, {"name": "bco", "weight": 0.2}, {"name": "sft"}],
    ),
    ("TRL", {"loss_type": "sigmoid", "label_smoothing": 0.1}, {"name": "logistic"}),
    ("TRL", {"loss_type": "robust", "label_smoothing": 0.1}, {"name": "robust", "label_smoothing": 0.1}),
    ("TRL", {"method": "orpo", "beta": 0.2}, [{"name": "sft"}, {"name": "odds_ratio", "weight": 0.2}]),
    ("TRL", {"method": "cpo", "cpo_alpha": 0}, {"name": "logistic"}),
    ("TRL", {"method": "cpo", "loss_type": "simpo"}, [{"name": "logistic", "margin": 0.5}, {"name": "sft"}]),
    ("TRL", {"method": "kto", "desirable_weight": 2.0}, {"name": "kto", "desirable_weight": 2.0}),
    ("TRL", {"method": "kto", "undesirable_weight": 0.5}, {"name": "kto", "undesirable_weight": 0.5}),
    ("TRL", {"method": "reward", "center_rewards_coefficient": 0.01}, {"name": "bradley_terry", "center": 0.01}),
    ("axolotl", {"rl": "ipo"}, {"name": "squared"}),
    ("axolotl", {"rl": "orpo", "orpo_alpha": 0.3}, [{"name": "sft"}, {"name": "odds_ratio", "weight": 0.3}]),
    ("axolotl", {"rl": "simpo", "cpo_alpha": 0}, {"name": "logistic", "margin": 0.5}),
    ("ms-swift", {"rlhf_type": "simpo", "cpo_alpha": 0}, {"name": "logistic", "margin": 1.0}),
    (
        "ms-swift",
        {"rlhf_type": "simpo", "cpo_alpha": 0, "rpo_alpha": 0.1},
        [{"name": "logistic", "margin": 1.0}, {"name": "sft", "weight": 0.1}],
    ),
    ("ms-swift", {"rpo_alpha": 0.1}, [{"name": "logistic"}, {"name": "sft", "weight": 0.1}]),
    ("LLaMA-Factory", {"pref_ftx": 0.5}, [{"name": "logistic"}, {"name": "sft", "weight": 0.5}]),
    (  # (loss + 0.25 bco) / 1.25
        "LLaMA-Factory",
        {"pref_bco_weight": 0.25},
        [{"name": "logistic", "weight": 0.8}, {"name": "bco", "weight": 0.2}],
    ),
    ("LLaMA-Factory", {"stage": "rm"}, {"name": "bradley_terry"}),
]
"""Tool, what its file says besides, and the objective, from the code of its trainers."""


@pytest.mark.parametrize(("tool", "said", "wanted"), OBJECTIVES_OF)
def test_a_method_is_its_objective(write, tool, said, wanted):
    assert plan_of(write({**TOOLS[tool][1], **said})).tree["objective"] == wanted


@pytest.mark.parametrize(
    ("tool", "said", "whole"),
    [
        ("TRL", {"method": "orpo"}, True),
        ("axolotl", {"rl": "orpo"}, True),
        ("ms-swift", {"rlhf_type": "orpo"}, True),
        ("LLaMA-Factory", {"pref_loss": "orpo"}, False),  # whose likelihood term is the completion's alone, as ours
    ],
)
def test_that_a_tools_orpo_learns_the_prompt_too_is_told(write, tool, said, whole):
    plan = plan_of(write({**TOOLS[tool][1], **said}))
    (line,) = [line for line in plan.lines if line.ours.startswith("objective:")]
    assert ("learns the prompt's tokens too" in line.why, line.differs) == (whole, whole)


LORA = {"name": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"}
DORA = {"name": "dora"}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 50}
SETTINGS = [
    ("TRL", {}, {"train.learning_rate": 1e-6, "train.epochs": 3.0, "policy.adapter": {"name": "full"}}),
    ("TRL", {"method": "reward"}, {"train.learning_rate": 1e-4, "data.overlong": "drop_list"}),
    ("TRL", {"max_steps": 200, "warmup_steps": 20}, {"train.steps": 200, "train.warmup_ratio": 0.1}),
    ("TRL", {"eval_strategy": "steps", "eval_steps": 50}, {"train.eval_steps": 50}),
    ("TRL", {"eval_steps": 50}, {"data.eval_fraction": 0.0, "train.eval_steps": None}),
    ("TRL", {"warmup_steps": 0.05}, {"train.warmup_ratio": 0.05}),
    ("TRL", {"save_total_limit": 3}, {"train.keep_checkpoints": 3}),
    ("TRL", BEST | {"metric_for_best_model": "eval_loss"}, {"train.keep_best": "loss"}),
    ("TRL", BEST | {"metric_for_best_model": "eval_rewards/margins"}, {"train.keep_best": None}),
    ("TRL", {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "use_dora": True}, {"policy.adapter": LORA | DORA}),
    ("LLaMA-Factory", {"lora_rank": 4}, {"policy.adapter": LORA}),
    ("LLaMA-Factory", {"train_on_prompt": False}, {"task": "preference"}),
    (
        "LLaMA-Factory",
        {"dataset": "hub"},
        {"data.sources": [{"path": "a/b", "split": "train", "turns": True, "config": "en"}]},
    ),
    ("axolotl", {"micro_batch_size": 3, "gradient_accumulation_steps": 4}, {"train.lists_per_step": 12}),
    ("ms-swift", {"tuner_type": "full"}, {"train.learning_rate": 1e-5, "train.lists_per_step": 16}),
    (
        "ms-swift",
        {"dataset": "a/b:en#500"},
        {"data.limit": 500, "data.sources": [{"path": "a/b", "turns": True, "config": "en"}]},
    ),
]


@pytest.mark.parametrize(("tool", "said", "wanted"), SETTINGS)
def test_a_setting_is_what_the_tool_would_take(write, tool, said, wanted):
    tree = plan_of(write({**TOOLS[tool][1], **said})).tree
    assert {key: tree.get(key) for key in wanted} == wanted


def test_dropout_reaches_the_adapter_as_trl_has_it(write):
    both = {**TRL, "use_peft": True, "lora_dropout": 0.05}
    assert "dropout" not in plan_of(write(both)).tree["policy.adapter"]
    assert plan_of(write({**both, "disable_dropout": False})).tree["policy.adapter"]["dropout"] == 0.05


REFUSED = [
    ("LLaMA-Factory", {"quantization_bit": 8}, "`quantization_bit: 8` cannot be imported"),
    ("LLaMA-Factory", {"ref_model": "other"}, "`ref_model: other` is another model"),
    ("LLaMA-Factory", {"dataset": "yours"}, "is none of dataset_info.json"),
    ("LLaMA-Factory", {"template": "martian"}, "`template: martian` is no chat template"),
    ("LLaMA-Factory", {"finetuning_type": "oft"}, "there is no adapter `oft`"),
    ("LLaMA-Factory", {"adapter_name_or_path": "a,b"}, "names several adapters; merge them"),
    ("LLaMA-Factory", {"train_on_prompt": True}, "`train_on_prompt: true` cannot be imported: only completions"),
    ("TRL", {"loss_type": "aot"}, "`loss_type: aot` cannot be imported"),
    ("TRL", {"use_peft": True, "use_dora": True, "use_rslora": True}, "together with rslora and dora is no adapter"),
    ("axolotl", {"lr_scheduler": "rex"}, "is no schedule here"),
    ("axolotl", {"process_reward_model": True, "reward_model": True}, "trains by `prm`"),
    ("ms-swift", {"dataset": "a#1 b#2"}, "numbers of rows that differ"),
    ("TRL", {"seed": float("inf")}, "`seed: .inf` is no finite number"),
    ("axolotl", {"micro_batch_size": float("nan")}, "`micro_batch_size: .nan` is no finite number"),
    ("TRL", {"learning_rate": 10**400}, "is no number"),
    ("LLaMA-Factory", {"pref_bco_weight": -1}, "`pref_bco_weight: -1` is below 0"),
]


@pytest.mark.parametrize(("tool", "said", "problem"), REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(write, tool, said, problem):
    with pytest.raises(UserError, match="old.yaml") as caught:
        plan_of(write({**TOOLS[tool][1], **said}))
    assert problem in str(caught.value)


@pytest.mark.parametrize("tool", ["ms-swift", "TRL"])
def test_a_batch_of_nothing_is_the_recipes_mistake(write, tool):
    with pytest.raises(UserError, match="train.lists_per_step"):
        imported(write({**TOOLS[tool][1], "per_device_train_batch_size": 0}))


def test_a_recipe_that_is_there_is_not_overwritten(write):
    file = write(TRL)
    imported(file)
    with pytest.raises(UserError, match="is there already"):
        imported(file)


def test_another_tools_run_is_not_written_into(write, tmp_path):
    (tmp_path / "out").mkdir()
    assert plan_of(write(TRL)).tree["output"] == "out"
    (tmp_path / "out/checkpoint-5").mkdir()
    assert plan_of(write(TRL)).tree["output"] == "out-align"


def test_the_command_knows_trls_methods():
    assert tuple(trl.METHODS) == options.METHODS


MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "It's 'so'\nhere"},
    {"role": "assistant", "content": "A \\ b"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_written_chat_template_joins_messages_as_its_pieces_do(name, system):
    from transformers.utils.chat_template_utils import render_jinja_template

    pieces, messages = TEMPLATES[name], MESSAGES if system else MESSAGES[1:]
    wanted = "".join("<s>" if part is None else part for part in elements(pieces, messages))
    if pieces.eos:  # the end token is behind every answer
        first = pieces.assistant.replace("{}", "A \\ b")
        wanted = wanted.replace(first, first + "</s>") + "</s>"
    rendered, _ = render_jinja_template([messages], chat_template=jinja_text(pieces), bos_token="<s>", eos_token="</s>")
    assert rendered[0] == wanted


@pytest.mark.parametrize(
    ("tool", "key", "held_out"),
    [("axolotl", "early_stopping_patience", "val_set_size"), ("LLaMA-Factory", "early_stopping_steps", "val_size")],
)
def test_early_stopping_is_kept_where_it_looks_at_held_out_rows(write, tool, key, held_out):
    looking = {held_out: 0.1, "eval_strategy": "steps", "eval_steps": 5}
    for own, patience in (({}, None), (looking, 3)):
        plan = plan_of(write(TOOLS[tool][1] | {key: 3} | own))
        assert plan.tree.get("train.early_stopping") == patience


ODD = (5, -1, 0.5, "x", True, [], ["x", 2], [[1]], {"a": 1}, [{"path": 3, "weight": "x"}])


@pytest.mark.parametrize("tool", TOOLS)
def test_a_value_of_another_kind_is_taken_or_answered_in_a_sentence(write, tool):
    module, small = TOOLS[tool]
    for key in sorted(module.KEYS):
        for value in ODD:
            try:
                plan_of(write(small | {key: value}))
            except UserError:
                continue
            except Exception as error:
                raise AssertionError(f"{key}: {value!r}") from error
