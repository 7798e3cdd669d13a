"""Model folders that cannot work are refused in one sentence that names them."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from align.errors import UserError
from align.model.adapters import Full, Lora
from align.model.config import PolicySection
from align.model.load import load_tokenizer, turn_dropout_off
from align.model.policy import load_policy
from align.model.reward import load_reward_model


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        load_policy(PolicySection(model=str(folder)))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nothing", "there is no such folder; give the folder of a model, or a hub name")
    for name in ("no-such-owner/no-such-model", 300 * "a"):  # the second longer than a folder's name can be
        with pytest.raises(UserError, match=f"{name} is not a folder"):
            load_policy(PolicySection(model=name))


def test_a_hub_model_is_known_by_name_and_commit(folder, tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out, read offline."""
    stored = tmp_path / "hub" / "models--owner--tiny"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "v2").write_text("0" * 40)
    shutil.copytree(folder, stored / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    policy = load_policy(PolicySection(model="owner/tiny", revision="v2", adapter=Lora(rank=2)))
    identity = policy.reference_identity()
    assert (identity["base"], identity["commit"]) == ("owner/tiny", "0" * 40)
    policy.save_adapter(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("owner/tiny", "v2")


def test_a_local_folder_is_known_by_its_content_not_its_place(folder, model_folder):
    here, there = (load_policy(PolicySection(model=str(path))).reference_identity() for path in (folder, model_folder))
    assert here == there
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert load_policy(PolicySection(model=str(folder))).reference_identity()["base"] != there["base"]


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "no config.json$")
    (folder / "recipe.yaml").touch()
    refused(folder, "no config.json; of a run directory, name what `align export` makes")


def test_a_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json: not valid JSON")


def test_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "convert it once.*save_pretrained")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no .safetensors file")


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "cannot be loaded")


def test_a_missing_weight_is_not_drawn_at_random(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(folder, "lack 1 weights, first model.layers.1.mlp.up_proj.weight")


def test_a_weight_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))
    refused(folder, "cannot be loaded")


def with_more(folder, name, like):
    """The weights with one more, a copy of another."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[like].clone()}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_config_with_fewer_layers_than_the_weights(folder):
    """transformers would leave out the last layers without an error."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    lost = [name for name in load_file(folder / "model.safetensors") if ".layers.1." in name]
    first = r"first model\.layers\.1\.input_layernorm\.weight"
    told = rf"its config makes 1 of `model\.layers`, and its files hold weights of more \({len(lost)}, {first}\)"
    refused(folder, told)
    with pytest.raises(UserError, match=told):
        load_reward_model(PolicySection(model=str(folder)), outputs=["reward"])


@pytest.mark.parametrize("name", ["v_head.weight", "model.layers.0.mlp.up_proj.scale"])
def test_a_weight_without_a_place_is_left_out_and_said(folder, caplog, name):
    with_more(folder, name, "lm_head.weight")
    load_policy(PolicySection(model=str(folder)))
    assert f"{folder}: 1 weights have no place in the model and are left out, first {name}" in caplog.messages


def test_a_layer_that_predicts_further_tokens_is_left_out(folder):
    """As DeepSeek stores it: behind the last layer, and counted by a key of its own."""
    with_more(folder, "model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    refused(folder, "its config makes 2 of")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    load_policy(PolicySection(model=str(folder)))


def test_the_head_of_a_language_model_is_meant_to_be_left_out_of_a_reward_model(folder, caplog):
    load_reward_model(PolicySection(model=str(folder)), outputs=["reward"])
    assert not [said for said in caplog.messages if "left out" in said]


def test_an_adapter_in_place_of_a_model(model_folder, tmp_path):
    load_policy(PolicySection(model=str(model_folder), adapter=Lora(rank=2))).save_adapter(tmp_path)
    refused(tmp_path, "policy.start_adapter")


def test_an_encoder_decoder_model(tmp_path, save_tokenizer):
    config = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    refused(tmp_path, "encoder-decoder")


def test_no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()
    refused(folder, "no tokenizer")


def test_padding_falls_back_to_the_end_token(folder, save_tokenizer):
    assert load_tokenizer(str(folder)).pad_token_id == 2
    save_tokenizer(folder, bos_token="<s>")
    with pytest.raises(UserError, match="neither a padding nor an end-of-text token"):
        load_tokenizer(str(folder))


def test_a_template_file_replaces_the_tokenizers(folder, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(str(folder), chat_template=str(tmp_path / "own.jinja"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w4"}], tokenize=False) == "w4!"
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "none.jinja"))):
        load_tokenizer(str(folder), chat_template=str(tmp_path / "none.jinja"))


def test_gpt2s_dropout_is_off_in_training_mode_and_back_in_what_is_saved(tmp_path, save_tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    policy = load_policy(PolicySection(model=str(tmp_path / "gpt2"), adapter=Full()))
    ids = torch.arange(3, 12)[None]
    policy.model.train()
    assert torch.equal(policy.model(ids).logits, policy.model(ids).logits)
    policy.save_adapter(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (saved["resid_pdrop"], saved["attn_pdrop"], saved["embd_pdrop"]) == (0.4, 0.1, 0.1)
    assert policy.model.config.resid_pdrop == 0


def test_only_probabilities_count_as_dropout():
    config = GPT2Config(summary_first_dropout=0.2)
    assert turn_dropout_off(config)["resid_pdrop"] == 0.1
    assert config.initializer_range == 0.02
