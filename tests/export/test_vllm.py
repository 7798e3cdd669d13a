"""vLLM reads exports again: the log-probabilities and prompts are those of the policy, and what is not is refused."""

import json
import shutil
from importlib import import_module

import pytest
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.export.compare import compare, refuse_other
from align.export.export import export
from align.export.heldout import held_out
from align.export.made import Made
from align.export.trained import find_trained, read_tokenizer_of
from align.export.vllm_engine import opened
from align.recipe import parse_recipe
from align.training.train import train

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}w7 {% endif %}"
)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,  # vLLM's attention on a CPU wants heads of 32 or more
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 24,  # the longest row fills all of it
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, save_llama):
    """A run on texts and talks, of a policy whose template its base lacks."""
    folder = tmp_path_factory.mktemp("vllm")
    base = save_llama(folder / "base", seed=1, **SIZES, tie_word_embeddings=False)
    for kind in ("texts", "talks"):  # two sources, as one has prompts of one kind
        with (folder / f"{kind}.jsonl").open("w") as file:
            for i in range(6):
                completions = [" ".join(f"w{5 + (i * k + j) % 50}" for j in range(4 + k)) for k in (1, 2)]
                row = {"id": f"{kind}{i}", "prompt": f"w{3 + i} w{20 + i}", "completions": completions}
                if kind == "talks":
                    row["prompt"] = [{"role": "user", "content": row["prompt"]}]
                    row["completions"] = [[{"role": "assistant", "content": own}] for own in completions]
                file.write(json.dumps(row | {"grades": [1.0, 0.0]}) + "\n")
    (folder / "template.jinja").write_text(TEMPLATE)
    recipe = parse_recipe(
        {
            "output": str(folder / "run"),
            "policy": {
                "model": str(base),
                "adapter": {"name": "lora", "rank": 4},
                "chat_template": str(folder / "template.jinja"),
            },
            "reference": {"cache_dir": str(folder / "cache")},
            "data": {
                "sources": [str(folder / "texts.jsonl"), str(folder / "talks.jsonl")],
                "eval_fraction": 0.4,
                "max_length": 24,
            },
            "objective": {"name": "logistic"},
            "train": {"lists_per_step": 4, "learning_rate": 3e-2, "threads": 1, "steps": 3},
            "sampling": {"prompts": 0},
        },
        origin="test",
    )
    return train(recipe).path


@pytest.mark.vllm
@pytest.mark.parametrize(("to", "dtype"), [("peft", "float32"), ("transformers", "bfloat16")])
def test_vllm_reads_what_was_trained(run, tmp_path, to, dtype):
    out = export(run, tmp_path / "out", to=to, dtype=dtype, engine="vllm")
    found = json.loads((out / "export.json").read_text())
    assert found["engine"].startswith("vllm 0.")
    assert found["token_ids_equal"] is True and found["prompts_compared"] == found["lists"] > 2
    assert found["max_logprob_difference"] < (1e-4 if dtype != "bfloat16" else 0.5)
    assert found["max_logprob_difference"] > (0 if dtype != "bfloat16" else 1e-3)
    assert found["pair_accuracy_after"] == pytest.approx(found["pair_accuracy_before"])


@pytest.mark.vllm
def test_what_vllm_reads_as_another_model_is_refused(run, tmp_path):
    trained = find_trained(run)
    tokenizer = read_tokenizer_of(trained)
    held = held_out(trained, tokenizer, lists=16)
    folder = shutil.copytree(export(run, tmp_path / "out", lists=1), tmp_path / "other")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 0 * value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    tokenizer.chat_template = TEMPLATE.replace("w7", "w8")
    tokenizer.save_pretrained(folder)
    with opened(Made(trained, tokenizer, folder, "other", None), held) as engine:
        found = compare(held, engine)
    with pytest.raises(UserError, match="talks.jsonl, row [0-9]: the export reads the prompt as other token ids"):
        refuse_other(found, 1.0)
    with pytest.raises(UserError, match="vllm 0.* gives log-probabilities that are .* nats off on average"):
        refuse_other(found | {"token_ids_equal": True}, 1e-4)


@pytest.mark.vllm
def test_what_vllm_says_is_handed_on(run, tmp_path):
    trained = find_trained(run)
    broken = shutil.copytree(export(run, tmp_path / "out", lists=1), tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"none")
    held = held_out(trained, read_tokenizer_of(trained), lists=1)
    with (
        pytest.raises(UserError, match=r"--engine vllm: the export is not kept, as vLLM ended: \w+Error"),
        opened(Made(trained, read_tokenizer_of(trained), broken, "x", None), held),
    ):
        pass


def test_what_vllm_cannot_read_is_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch):
    found = {"vllm": None}
    monkeypatch.setattr("align.export.vllm_start.importlib.util.find_spec", lambda name: found.get(name, name))
    monkeypatch.setattr(import_module("align.export.export"), "held_out", None)
    refusals = [
        (
            {"to": "peft"},
            r"--engine vllm: vLLM is not installed; run `align doctor --install rollout(-cpu)?`, or leave it",
        ),
        (
            {"to": "lora-gguf"},
            "--engine vllm: language models in peft and transformers are compared by it, not --to lora",
        ),
    ]
    for options, why in refusals:
        with pytest.raises(UserError, match=why):
            export(run, tmp_path / "out", engine="vllm", **options)
    found["vllm"] = "there"
    dora = shutil.copytree(run / "adapter", tmp_path / "dora")
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (dora / "digests.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="it does not serve .* as an adapter, since it is a DoRA; add --merge"):
        export(dora, tmp_path / "out", engine="vllm")
