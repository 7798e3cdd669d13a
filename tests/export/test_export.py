"""An export gives the log-probabilities of what was trained, loads by name, and says what it is."""

import json
import re
import shutil
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import peft
import pytest
import torch
import yaml
from harm import flipped
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.errors import UserError
from align.evaluate.rows import load_any
from align.export.export import export
from align.export.formats import FORMATS
from align.export.model_card import model_card
from align.export.trained import find_trained
from align.training.train import train

export_module = import_module("align.export.export")  # its package holds the function of that name
merging = import_module("align.export.merging")

VOCABULARY = 40
IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
ADAPTERS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=LINEAR),
    "lora_on_a_tied_head": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"]),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, target_modules=LINEAR),
    "adalora": peft.AdaLoraConfig(task_type="CAUSAL_LM", target_r=2, init_r=4, total_step=10, target_modules=LINEAR),
    "miss": peft.MissConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEAR),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


def save_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
            eos_token_id=None,
        )
    )
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")


def save_adapter(folder: Path, base: Path, kind: str = "lora") -> torch.Tensor:
    """An adapter of random weights; returns the logits of base and adapter in float32."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), deepcopy(ADAPTERS[kind])
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return logits(model.eval())


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def save_run(folder: Path, base: Path) -> torch.Tensor:
    """A run directory as `align train` leaves it; returns the logits of base and adapter."""
    trained = save_adapter(folder / "adapter", base)
    with_template = tokenizer()
    with_template.chat_template = TEMPLATE
    with_template.save_pretrained(folder / "adapter")
    recipe = {
        "output": str(folder),
        "policy": {"model": str(base), "adapter": {"name": "lora", "rank": 4}},
        "data": {"sources": [{"path": "lists.jsonl"}]},
        "objective": [{"name": "lambda", "weight": 1.0}],
        "score": {"name": "log_ratio", "beta": 0.1, "divergence": {"name": "reverse_kl"}},
        "train": {"learning_rate": 1e-3, "lists_per_step": 8, "seed": 17},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "summary.json").write_text(json.dumps({"eval_before": {"ndcg": 0.25}, "eval_after": {"ndcg": 0.75}}))
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}}))
    return trained


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_model_has_the_logits_of_base_and_adapter(tmp_path, kind):
    base = save_base(tmp_path / "base")
    trained = save_adapter(tmp_path / "adapter", base, kind)
    out = export(tmp_path / "adapter", tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-5)
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - trained).abs().max() > 0.1
    assert merged.config.tie_word_embeddings == (kind != "lora_on_a_tied_head")
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer().get_vocab()
    assert merged.generation_config.eos_token_id == tokenizer().eos_token_id


def test_a_merge_is_computed_in_float32_and_then_rounded_once(tmp_path):
    base = save_base(tmp_path / "base", torch.bfloat16)
    trained = save_adapter(tmp_path / "adapter", base)
    exact = AutoModelForCausalLM.from_pretrained(
        export(tmp_path / "adapter", tmp_path / "exact", merge=True, dtype="float32")
    )
    torch.testing.assert_close(logits(exact), trained, atol=1e-5, rtol=1e-5)
    rounded = load_file(export(tmp_path / "adapter", tmp_path / "rounded", merge=True) / "model.safetensors")
    for name, value in exact.named_parameters():
        assert torch.equal(rounded[name], value.to(torch.bfloat16))


def test_a_runs_merge_has_its_chat_template_and_a_card_of_what_it_is(tmp_path):
    trained = save_run(tmp_path / "run", save_base(tmp_path / "base"))
    out = export(tmp_path / "run", tmp_path / "out", merge=True)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), trained, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    card = (out / "README.md").read_text()
    for fact in (
        f"merged into its base model `{tmp_path}/base`",
        "lora (rank 4)",
        "lambda (weight 1.0)",
        "divergence reverse_kl)",
        "lists.jsonl",
        "| seed | 17 |",
        "torch 2.13.0",
    ):
        assert fact in card
    assert "| NDCG by implicit reward | 0.2500 | 0.7500 |" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


@pytest.mark.parametrize("own", ["float32", "bfloat16"])
@pytest.mark.parametrize("told", [None, "float16"])
def test_a_merge_keeps_the_dtype_that_the_policy_was_trained_in(tmp_path, own, told):
    """Whatever the base's files are in."""
    save_run(
        tmp_path / "run", save_base(tmp_path / "base", {"float32": torch.bfloat16, "bfloat16": torch.float32}[own])
    )
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["policy"]["dtype"] = own
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = export(tmp_path / "run", tmp_path / "out", merge=True, dtype=told)
    stored = {value.dtype for value in load_file(out / "model.safetensors").values()}
    assert stored == {getattr(torch, told or own)}
    assert json.loads((out / "config.json").read_text())["dtype"] == (told or own)


def test_what_an_export_wrote_is_said(tmp_path, capsys):
    save_run(tmp_path / "run", save_base(tmp_path / "base"))
    out = export(tmp_path / "run", tmp_path / "out", merge=True, dtype="bfloat16")
    said = capsys.readouterr().out
    assert f"{out}: a whole model in bfloat16" in said
    for file in out.iterdir():
        assert file.name in said
    size = (out / "model.safetensors").stat().st_size
    assert f"model.safetensors {size / 1e3:.2f} kB" in said and f'from_pretrained("{out}")' in said
    # What the text was measured on, here by transformers and PEFT alone.
    probe = torch.tensor([tokenizer()(merging.PROBE)["input_ids"]])
    policy = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run" / "adapter"
    )
    with torch.no_grad():
        exact, stored = (
            model.eval()(input_ids=probe).logits.float().log_softmax(-1)
            for model in (policy, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
        )
    moved = (exact - stored).abs()
    found = re.search("stored weights give them within (.*) nats of the policy's own, (.*) nats on average", said)
    assert [float(value) for value in found.groups()] == pytest.approx(
        [moved.max().item(), moved.mean().item()], rel=0.06
    )
    assert moved.max() > 1e-3 and found[0] in (out / "README.md").read_text()

    export(tmp_path / "run", tmp_path / "adapter")
    said = capsys.readouterr().out
    assert f"{tmp_path}/adapter: an adapter for {tmp_path}/base in float32" in said
    assert "AutoPeftModelForCausalLM" in said
    served = (
        f"vllm serve {tmp_path}/base --tokenizer {tmp_path}/adapter --enable-lora --max-lora-rank 8 --lora-modules "
    )
    assert f"{served}adapter={tmp_path}/adapter" in said

    save_adapter(tmp_path / "other", tmp_path / "base", "dora")
    export(tmp_path / "other", tmp_path / "dora")
    said = capsys.readouterr().out
    assert "AutoPeftModelForCausalLM" in said and "vllm" not in said


def test_an_adapters_base_is_found_from_anywhere(tmp_path, monkeypatch):
    """Of a folder the whole path, of the hub its name."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    save_run(Path("run"), save_base(Path("base")))
    config = Path("run/adapter/adapter_config.json")
    assert json.loads(config.read_text())["base_model_name_or_path"] == "base"  # as PEFT has it, and older runs
    export("run", "out")
    monkeypatch.chdir(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained("work/out")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "work" / "base")
    monkeypatch.chdir(tmp_path / "work")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "owner/model"}))
    written = json.loads((export("run", "hub") / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "owner/model"
    card = ModelCard.load(Path("hub") / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/model", "adapter")


def test_the_card_of_an_online_run_names_how_its_data_came_to_be():
    recipe = {
        "policy": {"model": "owner/model", "adapter": {"name": "lora", "rank": 4}},
        "data": {"sources": [{"path": "owner/prompts"}, {"path": "my/own.jsonl"}]},
        "objective": {"name": "lambda"},
        "train": {"seed": 1},
        "rollout": {"completions": 8, "temperature": 0.7, "reward": {"name": "length", "max": 200}},
        "online": {"iterations": 3, "prompts": 200, "reference": "previous"},
    }
    figures = {"sampled_reward": 0.25, "reward_before": 0.5, "reward_after": 0.75, "lists": 190}
    summary = {"iterations": [{"iteration": 1, **figures}]}
    text = model_card(
        name="x",
        base="owner/model",
        form=FORMATS["transformers"],
        found={},
        recipe=recipe,
        summary=summary,
        environment={},
    )
    for fact in (
        "| prompts | `owner/prompts`, `my/own.jsonl` |",
        "| iterations | 3, 200 prompts each; reference: previous |",
        "completions 8, temperature 0.7",
        "| scorer of the rollouts | length (max 200) |",
        "| 1 | +0.250 | +0.500 | +0.750 | 190 |",
    ):
        assert fact in text
    card = ModelCard(text)
    assert card.data.datasets == ["owner/prompts"] and card.data.base_model_relation == "finetune"
    assert str(card) == text


def test_an_adapter_is_copied_unchanged_or_cast(tmp_path):
    trained = save_run(tmp_path / "run", save_base(tmp_path / "base"))
    out = export(tmp_path / "run", tmp_path / "out")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(loaded), trained)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    before = load_file(out / "adapter_model.safetensors")
    cast = load_file(export(tmp_path / "run", tmp_path / "cast", dtype="float16") / "adapter_model.safetensors")
    assert {name: value.half().tolist() for name, value in before.items()} == {n: v.tolist() for n, v in cast.items()}
    assert {value.dtype for value in cast.values()} == {torch.float16}
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["library_name"] == "peft"


def test_places_that_an_adapter_trains_are_not_rounded(tmp_path):
    """The matrices have 1536 entries, and bfloat16 no odd number above 256."""
    config = peft.SupertuningConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEAR)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base")), config)
    model.save_pretrained(tmp_path / "adapter")
    out = export(tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", out))
    places = {name for name, value in before.items() if not value.is_floating_point()}
    assert any((before[name] % 2 == 1).logical_and(before[name] > 256).any() for name in places)
    for name, value in before.items():
        expected = value if name in places else value.bfloat16()
        assert after[name].dtype == expected.dtype and torch.equal(after[name], expected)


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_of_all_weights_is_written_whole(tmp_path, merge):
    save_base(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "recipe.yaml").write_text(
        yaml.safe_dump({"policy": {"model": "b"}, "data": {"sources": []}, "train": {}})
    )
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", tmp_path / "out", merge=merge))
    assert torch.equal(logits(merged), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")))


def test_a_merge_that_is_not_what_was_trained_is_refused(tmp_path, monkeypatch):
    save_adapter(tmp_path / "tied", save_base(tmp_path / "base"), "lora_on_a_tied_head")
    monkeypatch.setattr(merging, "_untie", lambda model: None)
    with pytest.raises(UserError, match="merging moves log-probabilities"):
        export(tmp_path / "tied", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_users_mistakes(tmp_path):
    base = save_base(tmp_path / "base")
    save_run(tmp_path / "run", base)
    save_adapter(tmp_path / "adapter", base)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("policy: {model: base}")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone")})
    )
    shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "lost")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    more = weights | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}
    fewer = {name: value for name, value in weights.items() if "layers.1." not in name}
    for name, tensors in (("more", more), ("fewer", fewer)):
        shutil.copytree(tmp_path / "adapter", tmp_path / name)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    cases = [
        ("absent", {}, "absent does not exist; give a run directory"),
        ("empty", {}, "neither a run directory .* nor an adapter"),
        ("unfinished", {}, "has no adapter yet; run `align train"),
        ("lost", {"merge": True}, "gone: there is no such folder"),
        ("more", {"merge": True}, "made for another base .* 1 weights have no counterpart, first .*layers.7"),
        ("fewer", {"merge": True}, "made for another base .* 14 weights have no counterpart"),
    ]
    for name, options, message in cases:
        with pytest.raises(UserError, match=message):
            export(tmp_path / name, tmp_path / "out", **options)
    with pytest.raises(UserError, match="base exists and is not empty"):
        export(tmp_path / "run", base)


@pytest.mark.parametrize("merge", [False, True])
def test_a_damaged_file_of_an_export_is_named_and_its_card_is_its_owners(tmp_path, merge):
    save_run(tmp_path / "run", save_base(tmp_path / "base"))
    out = export(tmp_path / "run", tmp_path / "out", merge=merge)
    (out / "README.md").write_text("mine")
    find_trained(out)
    (weights,) = out.glob("*.safetensors")
    flipped(weights, 0.9)
    for read in (find_trained, lambda place: load_any(str(place), None, trust_remote_code=False)):
        with pytest.raises(UserError, match=f"{weights}: damaged, it is not as it was written; export it again, or re"):
            read(out)
    (out / "digests.json").unlink()
    find_trained(out)


def test_push_uploads_the_finished_folder(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr(export_module, "HfApi", Hub)
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    export(tmp_path / "adapter", tmp_path / "out", push="someone/aligned")
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert calls[0] == ("someone/aligned", True)
    assert calls[1][0] == "someone/aligned" and files <= set(calls[1][1])


@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 2}, {"name": "full"}], ids=lambda a: a["name"])
@pytest.mark.parametrize("merge", [False, True], ids=["as it is", "merged"])
def test_an_export_has_the_bases_special_tokens_and_configs(adapter, merge, make_recipe, tmp_path, save_llama):
    """The base has no padding token; training borrows one."""
    base = save_llama(tmp_path / "base", attention_dropout=0.1)
    generation = {"eos_token_id": [2, 5], "bos_token_id": 1, "do_sample": True, "temperature": 0.6}
    (base / "generation_config.json").write_text(json.dumps(generation))
    recipe = make_recipe(policy={"model": str(base), "adapter": adapter}, train={"steps": 1}, sampling={"prompts": 0})
    made = export(train(recipe).path, tmp_path / "out", merge=merge)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, made))
    assert before.pad_token is None and after.special_tokens_map == before.special_tokens_map
    if adapter["name"] == "full" or merge:
        old, new = (json.loads((folder / "config.json").read_text()) for folder in (base, made))
        assert new == old
        stored = json.loads((made / "generation_config.json").read_text())
        assert {key: stored[key] for key in generation} == generation and stored.get("pad_token_id") is None
