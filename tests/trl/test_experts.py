"""The load-balancing loss of a mixture of experts: TRL's, of the rows of its padded micro-batches."""

import pytest
import torch
import transformers as t
from peft import LoraConfig
from same_script import assert_same_lines, log_histories, pairs, trainer

from align.errors import UserError
from align.packing import packed_collate
from align.packing.trie import grow
from align.trl.experts import token_counts

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "initializer_range": 0.3, "num_experts_per_tok": 2, "pad_token_id": 0}
MODELS = {
    "mixtral": lambda **more: t.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, **more),
    "qwen3 moe": lambda **more: t.Qwen3MoeConfig(
        **SIZES, head_dim=8, intermediate_size=24, moe_intermediate_size=8, num_experts=4, **more
    ),
}
COMMON = {"learning_rate": 1e-3, "gradient_accumulation_steps": 2, "max_steps": 4}
EVALUATED = COMMON | {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}


@pytest.fixture
def experts(tmp_path, save_tokenizer):
    """The folder of a tiny mixture of experts, and its name in the test's own folder."""

    def save(kind: str = "mixtral", **config) -> str:
        torch.manual_seed(2)
        folder = tmp_path / kind
        t.AutoModelForCausalLM.from_config(MODELS[kind](**config)).save_pretrained(folder)
        save_tokenizer(folder, bos_token="<s>", eos_token="</s>", pad_token="</s>")
        return str(folder)

    return save


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def labelled(count: int):
    made = pairs(count)
    side = [row["chosen" if place % 2 else "rejected"] for place, row in enumerate(made)]
    made = made.remove_columns(["chosen", "rejected"]).add_column("completion", side)
    return made.add_column("label", [bool(place % 2) for place in range(count)])


@pytest.mark.parametrize(("kind", "adapter"), [("mixtral", None), ("qwen3 moe", lora)])
def test_dpo_adds_trls_load_balancing_loss(experts, tmp_path, kind, adapter):
    options = EVALUATED | {"router_aux_loss_coef": 0.5}
    given = {"train_dataset": pairs(18), "eval_dataset": pairs(7, seed=1)} | (
        {"peft_config": adapter} if adapter else {}
    )
    theirs, ours = log_histories("DPO", tmp_path, experts(kind), options, **given)
    assert_same_lines(theirs, ours)
    assert {"aux_loss", "eval_aux_loss"} <= {key for line in ours for key in line}


def test_kto_adds_it_too_by_the_models_own_weight(experts, tmp_path):
    model = experts(router_aux_loss_coef=0.3)
    theirs, ours = log_histories("KTO", tmp_path, model, COMMON, train_dataset=labelled(36))
    assert_same_lines(theirs, ours)
    assert "aux_loss" in ours[0]


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_cpo_and_orpo_add_it_where_the_model_says_so(experts, tmp_path, name):
    model = experts(router_aux_loss_coef=0.3, output_router_logits=True)
    given = {"train_dataset": pairs(18), "packages": (f"trl.experimental.{name.lower()}", "align.trl")}
    given |= {"processing_class": lambda: t.AutoTokenizer.from_pretrained(model)}
    theirs, ours = log_histories(name, tmp_path, lambda: t.AutoModelForCausalLM.from_pretrained(model), COMMON, **given)
    assert_same_lines(theirs, ours, without=("logits/chosen", "logits/rejected"))


def test_lists_of_two_add_what_pairs_add(experts, tmp_path):
    model, given = experts(), {"train_dataset": pairs(18)}
    logs = []
    for own in ({}, {"align": {"objective": "logistic"}}):
        options = COMMON | {"router_aux_loss_coef": 0.5, "max_length": None} | own
        one = trainer("align.trl", "DPO", tmp_path, model, options, **given)
        one.train()
        logs.append(one.state.log_history)
    of_pairs, of_lists = logs
    for theirs, ours in zip(of_pairs, of_lists, strict=True):
        both = ("loss", "grad_norm", "aux_loss") if "loss" in theirs else ("train_loss",)
        assert {key: ours[key] for key in both} == pytest.approx({key: theirs[key] for key in both}, rel=1e-5)


def test_a_model_whose_loss_is_of_another_form_is_refused_by_name(experts, tmp_path, monkeypatch):
    other = lambda gate_logits, num_experts, num_keys, top_k, attention_mask: 0.0  # noqa: E731  # as Doge's
    monkeypatch.setattr(t.models.mixtral.modeling_mixtral, "load_balancing_loss_func", other)
    with pytest.raises(UserError, match="MixtralForCausalLM: its load-balancing loss is not known for packed rows"):
        trainer("align.trl", "DPO", tmp_path, experts(), {"router_aux_loss_coef": 0.1}, train_dataset=pairs(9))


def test_every_token_counts_once_for_each_completion_that_it_belongs_to(deep):
    batch = packed_collate(deep)
    chosen = torch.tensor([True, False, True])
    wanted = torch.zeros(batch.input_ids.numel())
    sequences = [[*example["prompt_ids"], *ids] for example in deep for ids in example["completion_ids"]]
    groups = [n for n, example in enumerate(deep) for _ in example["completion_ids"]]
    for group, rows in zip(groups, grow(sequences, groups).rows, strict=True):
        wanted[rows] += float(chosen[group])
    assert len(batch.branches) > len(deep) + len(sequences)
    assert torch.equal(token_counts(batch, chosen), wanted)
