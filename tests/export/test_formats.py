"""Every format is read again by its engine, held against what was trained, and refused where it is something else."""

import importlib.util
import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from align.errors import UserError
from align.export import options
from align.export.compare import compare, refuse_other
from align.export.engines import Transformers
from align.export.export import export
from align.export.formats import FORMATS, check_format
from align.export.heldout import HeldOut, Prompt, calibration, held_out
from align.export.made import Made
from align.export.trained import Trained, find_trained, read_tokenizer_of
from align.recipe import parse_recipe
from align.runs.build import prepare
from align.shipped import with_shipped_paths
from align.training.train import train

STORIES = Path(with_shipped_paths("data/story-policy"))
TEMPLATE = "{% for m in messages %}<|story|>{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, rows_file):
    folder = tmp_path_factory.mktemp("story")
    return parse_recipe(
        {
            "output": str(folder / "run"),
            "policy": {"model": str(STORIES), "adapter": {"name": "pissa", "rank": 4, "alpha": 8}},
            "reference": {"cache_dir": str(folder / "cache")},
            "data": {"sources": [str(rows_file)], "eval_fraction": 0.2, "grades": "raw"},
            "objective": {"name": "logistic"},
            "train": {"lists_per_step": 6, "learning_rate": 3e-3, "threads": 1, "steps": 2},
            "sampling": {"prompts": 0},
        },
        origin="test",
    )


@pytest.fixture(scope="module")
def run(recipe) -> Path:
    return train(recipe).path


def needs(name: str):
    missing = [module for module in FORMATS[name].modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, the extra {FORMATS[name].extra}")


def test_the_command_line_names_the_formats_and_what_they_store():
    assert tuple(FORMATS) == options.TO
    stored = {dtype for form in FORMATS.values() for dtype in form.stored_in}
    assert stored - {form.default for form in FORMATS.values()} <= {*options.DTYPES, *options.GGUF_TYPES} <= stored


@torch.no_grad()
def test_the_figures_are_those_of_the_run_and_of_the_folder(run, recipe, tmp_path):
    """Computed once more by PEFT, transformers and loops."""
    out = export(run, tmp_path / "out", to="transformers", dtype="bfloat16", lists=3)
    found = json.loads((out / "export.json").read_text())
    held = prepare(recipe).heldout.select(range(3))
    base = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32), run / "adapter"
    )
    moved, right = [], {"before": [], "after": []}
    for row in held:
        scores = {"before": [], "after": []}
        for completion in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + completion])
            logprobs = [
                model(input_ids=ids)
                .logits[0]
                .log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(row["prompt_ids"]) - 1 :]
                for model in (base, policy, own)
            ]
            moved.append((logprobs[1] - logprobs[2]).abs())
            scores["before"].append((logprobs[1] - logprobs[0]).sum())
            scores["after"].append((logprobs[2] - logprobs[0]).sum())
        for when, values in scores.items():
            pairs = [
                float(values[i] > values[j])
                for i, a in enumerate(row["grades"])
                for j, b in enumerate(row["grades"])
                if a > b
            ]
            right[when].append(sum(pairs) / len(pairs))
    moved = torch.cat(moved)
    assert found["tokens"] == len(moved) and found["lists"] == 3
    assert found["max_logprob_difference"] == pytest.approx(moved.max().item(), rel=0.02)
    assert found["mean_logprob_difference"] == pytest.approx(moved.mean().item(), rel=0.02)
    assert moved.max() > 1e-3
    assert found["pair_accuracy_before"] == pytest.approx(sum(right["before"]) / 3)
    assert found["pair_accuracy_after"] == pytest.approx(sum(right["after"]) / 3)
    assert found["pair_accuracy_by"] == "implicit reward"
    assert found["token_ids_equal"] is True and found["prompts_compared"] == 3
    assert f"{found['mean_logprob_difference']:.1e} nats on average" in (out / "README.md").read_text()


def test_an_export_beyond_its_tolerance_is_not_kept(run, tmp_path):
    with pytest.raises(UserError, match=r"nats off on average .* more than 1e-06: .* not kept; store it in more bits"):
        export(run, tmp_path / "out", to="transformers", dtype="bfloat16", lists=2, tolerance=1e-6)
    assert not (tmp_path / "out").exists()
    assert export(run, tmp_path / "adapter", lists=2, tolerance=1e-5).is_dir()


def test_a_quantiser_sees_the_first_training_prompts_with_their_best_completions(run, recipe, monkeypatch):
    monkeypatch.setattr("align.export.heldout.CALIBRATED", 3)
    expected = []
    for row in list(prepare(recipe).train)[:3]:
        best = row["grades"].index(max(row["grades"]))
        expected.append((*row["prompt_ids"], *row["completion_ids"][best]))
    assert list(calibration(find_trained(run))) == expected
    with pytest.raises(UserError, match="needs the rows of a run; give the run directory"):
        calibration(find_trained(run / "adapter"))


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> tuple[HeldOut, Path, Trained]:
    """What a run gives, and its export, for tests that break a copy of it."""
    trained = find_trained(run)
    folder = export(run, tmp_path_factory.mktemp("written") / "out", to="transformers", lists=1)
    return held_out(trained, read_tokenizer_of(trained), lists=1), folder, trained


def refusal(held: HeldOut, folder: Path, trained: Trained) -> str:
    with pytest.raises(UserError) as refused:
        refuse_other(compare(held, Transformers(folder, trained)), 1.0)
    return str(refused.value)


def test_a_second_start_token_is_caught(written, tmp_path):
    held, folder, trained = written
    broken = shutil.copytree(folder, tmp_path / "broken")
    file = broken / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    first = tokenizer["post_processor"]["single"][0]
    tokenizer["post_processor"]["single"].insert(0, first)
    file.write_text(json.dumps(tokenizer))
    assert "with two start tokens (id 1) for one" in refusal(held, broken, trained)


def test_a_chat_template_that_is_lost_or_broken_is_caught(written, tmp_path):
    held, folder, trained = written
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    talk = [{"role": "user", "content": "Tell me of a bird."}]
    ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    held = HeldOut(held.said, [Prompt(talk, {}, ids, "rows, row 1")], *[getattr(held, name) for name in LISTS])
    for name, template, message in (
        ("whole", TEMPLATE, None),
        ("lost", None, f"{len(ids)} and 0 tokens"),
        ("broken", TEMPLATE.replace(": ", ":"), "from place [0-9]+ on"),
    ):
        broken = shutil.copytree(folder, tmp_path / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(broken)
        if message is None:
            refuse_other(compare(held, Transformers(broken, trained)), 1.0)
        else:
            said = refusal(held, broken, trained)
            assert re.search(message, said) and "rows, row 1" in said


LISTS = ("prompt_ids", "completion_ids", "grades", "logprobs", "reference")


@needs("gguf")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_a_gguf_file_is_what_was_trained(run, tmp_path, dtype):
    found = json.loads((export(run, tmp_path / "out", to="gguf", dtype=dtype, lists=2) / "export.json").read_text())
    assert found["mean_logprob_difference"] < {"float32": 1e-5, "bfloat16": 0.02, "q8_0": 0.05}[dtype]
    assert (tmp_path / "out" / "Modelfile").read_text() == 'FROM ./model.gguf\nTEMPLATE "{{ .Prompt }}"\n'


@needs("gguf")
def test_a_gguf_file_with_rotated_rows_in_the_wrong_order_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("align.export.gguf_model"), "as_llama_cpp", lambda name, tensor, config: tensor)
    with pytest.raises(UserError, match="the export is another model than what was trained"):
        export(run, tmp_path / "out", to="gguf", dtype="float32", lists=1)


SIZES = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LONG | {"original_max_position_embeddings": 64}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=32),
    "gemma3": Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6}, query_pre_attn_scalar=32),
}


@needs("lora-gguf")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_of_gguf_gives_the_models_own_log_probabilities(name, tmp_path):
    from align.export.gguf_model import write_gguf
    from align.export.llama_cpp import Model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms of 1 and biases of 0 would not show where they go
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    trained = Trained(tmp_path, None, None, False, [], {})
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    write_gguf(model, Made(trained, tokenizer, tmp_path, "x", "float32"), tmp_path / "model.gguf", "float32")
    ids = torch.randint(3, 4000, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(input_ids=ids[None]).logits[0].log_softmax(-1)[torch.arange(59), ids[1:]]
    bound = 0.1 if name.startswith("gemma") else 1e-3  # llama.cpp looks GELU up in a table of float16
    torch.testing.assert_close(Model(tmp_path, trained).logprobs(ids.tolist(), 1), exact, atol=bound, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name)) for name in ("lora-gguf", "nf4", "fp8", "gptq", "awq", "onnx")]
)
def test_other_formats_are_within_their_bounds(run, tmp_path, name):
    if name == "lora-gguf" and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python")
    out = export(run, tmp_path / "out", to=name, lists=2)
    found = json.loads((out / "export.json").read_text())
    assert 0 < found["mean_logprob_difference"] <= found["tolerance"] == FORMATS[name].tolerance[found["dtype"]]
    assert not (out / "recipe.yaml").exists()  # which would make it a run directory


def test_what_cannot_be_written_is_refused_by_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to onnx needs onnx and .*; pip install 'align-lm\[onnx\]'"):
        check_format(FORMATS["onnx"], None)
    with pytest.raises(UserError, match="--dtype q8_0: transformers is stored in float32, float16, bfloat16"):
        export(run, tmp_path / "out", to="transformers", dtype="q8_0")
    with pytest.raises(UserError, match="--merge is --to transformers"):
        export(run, tmp_path / "out", to="peft", merge=True)


def test_dropping_keeps_the_mean_of_the_update_and_says_what_it_costs(merged, tmp_path):
    run = merged[0]["two"]
    out = export(run, tmp_path / "out", drop=0.75, seed=3, lists=2, tolerance=10.0)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", out))
    kept = 0.0
    for name, value in before.items():
        if "lora_A" in name:
            assert torch.equal(after[name], value)
        else:
            stays = after[name] != 0
            torch.testing.assert_close(after[name][stays], value[stays] * 4)
            kept += stays.float().mean().item() / (len(before) / 2)
    assert kept == pytest.approx(0.25, abs=0.02)
    found = json.loads((out / "export.json").read_text())
    assert found["drop"] == 0.75 and found["mean_logprob_difference"] > 1e-3
    again = load_file(
        export(run, tmp_path / "again", drop=0.75, seed=3, lists=0, tolerance=10.0) / "adapter_model.safetensors"
    )
    assert all(torch.equal(value, again[name]) for name, value in after.items())


@pytest.mark.parametrize("name", ["pissa", "olora", "sorsa", "nlora"])
def test_a_difference_of_two_loras_is_not_dropped_from(name, run, tmp_path):
    began = shutil.copytree(run, tmp_path / "began")
    tree = yaml.safe_load((began / "recipe.yaml").read_text())
    tree["policy"]["adapter"] = {"name": name}
    (began / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (began / "digests.json").unlink()
    with pytest.raises(UserError, match=f"is {name}'s difference of two LoRAs"):
        export(began, tmp_path / "out", drop=0.5)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def merged(run, recipe, tmp_path_factory):
    """Two LoRA runs and one of all weights, each merged; and the base's weights."""
    place = tmp_path_factory.mktemp("merged")
    runs = {"one": run}
    for name, adapter in (("two", {"name": "lora", "rank": 2, "alpha": 8}), ("full", {"name": "full"})):
        tree = recipe.model_dump(mode="json", exclude_defaults=True)
        tree |= {"output": str(place / f"run_{name}"), "objective": {"name": "logistic"}}
        tree["policy"] |= {"model": str(STORIES), "adapter": adapter}
        own = parse_recipe(tree, origin="test")
        runs[name] = train(own).path
    folders = {
        name: export(path, place / name, to="transformers", dtype="float32", lists=0) for name, path in runs.items()
    }
    return runs, folders, weights(STORIES)


def assert_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = weights(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)


def test_an_average_of_runs_has_the_mean_of_their_weights(merged, tmp_path):
    """Of LoRAs of other ranks and scales, and of whole models; the comparison is with the mean, not one of them."""
    runs, folders, _ = merged
    one, two = (weights(folders[name]) for name in ("one", "two"))
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    out = export(runs["one"], tmp_path / "mean", average=[runs["two"]], to="transformers", dtype="float32", lists=2)
    assert_weights(out, mean)
    found = json.loads((out / "export.json").read_text())
    assert found["average"] == [str(runs["two"])] and found["max_logprob_difference"] < 1e-3
    assert f"what training changed in the mean of this run and {runs['two']}." in (out / "README.md").read_text()
    assert not list(out.rglob(".*ed")), "no folder of the way is left"
    whole = export(folders["one"], tmp_path / "whole", average=[folders["two"]], dtype="float32", lists=0)
    assert_weights(whole, mean)
    again = export(runs["one"], tmp_path / "adapter", average=[runs["two"]], lists=0)
    assert_weights(export(again, tmp_path / "merged", to="transformers", dtype="float32", lists=0), mean)


@pytest.mark.parametrize("name", ["one", "full"])
def test_extrapolation_goes_on_from_the_base(merged, tmp_path, name):
    runs, folders, base = merged
    trained = weights(folders[name])
    assert max((trained[key] - base[key]).abs().max() for key in trained) > 1e-3
    out = export(runs[name], tmp_path / "out", extrapolate=0.5, to="transformers", dtype="float32", lists=0)
    assert_weights(out, {key: base[key] + 1.5 * (trained[key] - base[key]) for key in trained})


def changed(folder: Path, tensors, **config) -> None:
    """Change a folder's weights, and keys of its adapter's config."""
    (file,) = folder.glob("*.safetensors")
    found = load_file(file)
    tensors(found)
    save_file(found, file, metadata={"format": "pt"})
    if config:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))


def same(tensors) -> None:
    pass


def without_one(tensors) -> None:
    del tensors[min(tensors)]


def with_another(tensors) -> None:
    tensors["another.weight"] = torch.zeros(2)


def narrower(tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()


@pytest.mark.parametrize(
    ("whole", "tensors", "config", "said"),
    [
        (False, same, {"use_dora": True}, "a LoRA with use_dora does not add up; export it --to transformers before"),
        (False, same, {"rank_pattern": {"q_proj": 2}}, "a LoRA with rank_pattern does not add up"),
        (False, same, {"alpha_pattern": {"q_proj": 2}}, "a LoRA with alpha_pattern does not add up"),
        (False, same, {"peft_type": "LOHA"}, "holds no LoRA, whose updates alone add up; export it --to transformers"),
        (False, without_one, {}, "adapt other modules; average runs of the same `targets`"),
        (True, without_one, {}, "one alone has .*; average runs of one base and one architecture"),
        (True, with_another, {}, "one alone has another.weight; average runs"),
        (True, narrower, {}, "model.norm.weight has other sizes in one of the runs; average runs of one base"),
    ],
)
def test_what_does_not_add_up_is_refused(whole, tensors, config, said, merged, run, tmp_path):
    _, folders, _ = merged
    good = folders["full"] if whole else run / "adapter"
    odd = shutil.copytree(good, tmp_path / "odd")
    (odd / "digests.json").unlink(missing_ok=True)
    changed(odd, tensors, **config)
    with pytest.raises(UserError, match=said):
        export(good, tmp_path / "out", average=[odd])
    assert not (tmp_path / "out").exists()


def test_what_has_no_sum_is_refused(merged, run, tmp_path):
    runs, folders, _ = merged
    with pytest.raises(UserError, match="is a whole model, .* is not; average runs of one base"):
        export(runs["one"], tmp_path / "out", average=[runs["full"]])
    with pytest.raises(UserError, match="is of no run, so that its start is not known; give the run"):
        export(folders["one"], tmp_path / "out", extrapolate=0.5)
    odd = shutil.copytree(run / "adapter", tmp_path / "odd")
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="a LoRA with use_dora does not add up; train a plain lora"):
        export(odd, tmp_path / "out", extrapolate=0.5)
    began = shutil.copytree(run, tmp_path / "began")
    tree = yaml.safe_load((began / "recipe.yaml").read_text())
    tree["policy"]["start_adapter"] = "sft/adapter"
    (began / "digests.json").unlink()
    (began / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="began as sft/adapter; export that merged, and train on it"):
        export(began, tmp_path / "out", extrapolate=0.5)
