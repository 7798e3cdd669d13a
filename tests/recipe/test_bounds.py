"""How much of a YAML file and of a model's config is read; what is within is read as before."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from align.bounds import LAYERS, TooMuch, check_folder, load_yaml, parse_python
from align.errors import UserError
from align.shipped import PACKAGE

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 30))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "aliases that make more than 1,000,000 values"),
        ("a: &a [*a]", "aliases that make more than"),
        ("a: &a {b: {c: *a}}", "aliases that make more than"),
        ("[" * 102 + "]" * 102, "deeper than 100 levels"),
        ("[" * 100_000, "deeper than 100 levels"),
        ("a: " + "b" * 1_000_000, "longer than 1,000,000 characters"),
        ("a: 2026-99-99", "holds a value that cannot be read"),
        ("a: " + "1" * 1001, "a whole number of more than 1,000 digits"),
        ("a: 0x" + "f" * 1000, "a whole number of more than 1,000 digits"),
        ("[1" + ":1" * 500 + "]", "a whole number of more than 1,000 digits"),
    ],
    ids=range(10),
)
def test_what_is_out_of_bounds_is_named(text, said):
    with pytest.raises(TooMuch, match=said):
        load_yaml(text)


@pytest.mark.parametrize("text", ["", "3", "a: &a [1, 2]\nb: *a\nc: [*a, *a]", "[" * 90 + "]" * 90, "a: {<<: {b: 1}}"])
def test_what_is_in_bounds_is_read_as_yaml_reads_it(text):
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["1" * 1001, "[0x" + "f" * 1000 + "]", "f(a, b=-" + "9" * 1001 + ")"])
def test_python_with_a_number_that_python_does_not_write_is_refused(text):
    """As its message would hold the number, which raises where nobody expects it."""
    with pytest.raises(ValueError, match="a whole number of more than 1,000 digits"):
        parse_python(text, "eval")
    parse_python("1" * 1000, "eval")


def test_every_recipe_that_ships_is_read_as_yaml_reads_it():
    files = sorted((PACKAGE.parent / "recipes").rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        assert load_yaml(file.read_text()) == yaml.safe_load(file.read_text())


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system"])
def test_yaml_makes_no_objects_of_python(text):
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        load_yaml(text)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", json.dumps({"num_hidden_layers": LAYERS + 1}), "`num_hidden_layers` is beyond 10,000"),
        ("config.json", json.dumps({"text_config": {"vocab_size": 10**12}}), "`text_config.vocab_size` is beyond"),
        ("config.json", json.dumps({"layers": [{"n_layer": 10**7}]}), "`layers.n_layer` is beyond 10,000"),
        ("config.json", json.dumps({"text_config": {"num_labels": 10**9}}), "`text_config.num_labels` is beyond 100"),
        ("config.json", '{"a": ' + "9" * 400 + "}", "`a` is beyond"),
        ("config.json", json.dumps({"attn_implementation": "a/b"}), "names a/b, compiled code of the hub"),
        ("config.json", json.dumps({"n_layer": -1}), "`n_layer` is -1, and a model has 1 or more"),
        ("config.json", "[]", "holds a list and no keys"),
        (
            "adapter_config.json",
            '{"base_model_name_or_path": ["a"]}',
            "`base_model_name_or_path` is no name of a model",
        ),
        ("adapter_config.json", "[" * 100_000, "deeper than 100 levels"),
        ("tokenizer_config.json", "{", "not valid JSON"),
    ],
)
def test_a_folder_with_what_no_model_has_is_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        check_folder(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size"])
def test_a_width_of_which_the_weights_hold_nothing_is_refused(tmp_path, key):
    save_file({"a": torch.zeros(4, 20)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({key: 20 * 16}))
    check_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({key: 20 * 16 + 1}))
    with pytest.raises(UserError, match=f"`{key}` is 321, and no tensor of the weights is near it"):
        check_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", (2**62).to_bytes(8, "little"), b"\x02" + bytes(7) + b"[]"])
def test_weights_without_a_header_are_for_their_reader_to_refuse(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16}))
    check_folder(tmp_path)


def test_sizes_that_models_have_pass(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 262_144, "num_hidden_layers": 126, "tie": True}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    check_folder(tmp_path)


def test_numbers_with_an_exponent_alone_are_numbers():
    """As in YAML 1.2 and JSON; PyYAML reads them as texts, which an optimizer's options are then refused for."""
    read = load_yaml("[1e-6, 2E5, -3e+3, 1.e2, 1.5e-3, 1e, e5, x1e5, 1e5x, '1e5']")
    assert read == [1e-6, 2e5, -3e3, 1e2, 1.5e-3, "1e", "e5", "x1e5", "1e5x", "1e5"]
