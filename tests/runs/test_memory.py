"""A lack of memory is one sentence for every command, with the setting that mends it; tried with half, it goes on."""

import json

import pytest
import torch
from tiny_models import letters, llama, saved
from transformers import LlamaForSequenceClassification

from align.cli import main
from align.recipe import dump_recipe

OF_SCORERS = ("rewards.backbone._packed_batches", "rewards.sequence_classifier.batches_by_length")
ROLLOUT = {"completions": 2, "max_tokens": 4, "engine": {"name": "transformers"}, "agreement_prompts": 0}
COMMANDS = {
    "annotate": ("annotate RECIPE", "train.tokens_per_batch=4096", ["align.model.reference.micro_batches"]),
    "rollout": (
        "rollout RECIPE",
        "rollout.engine.tokens_per_batch=4096",
        ["align.rollout.transformers_engine.sample_tokens"],
    ),
    "the reward of a rollout": (
        "rollout RECIPE rollout.reward=REWARD",
        "rollout.reward.tokens_per_batch=4096",
        OF_SCORERS,
    ),
    "the reward of the samples": (
        "train RECIPE sampling.reward=REWARD",
        "sampling.reward.tokens_per_batch=4096",
        OF_SCORERS,
    ),
    "score": ("score ROWS OUT --no-cache --reward REWARD", "--tokens-per-batch 4096", OF_SCORERS),
    "evaluate rows": (
        "evaluate rows ROWS --model POLICY --grades raw",
        "--tokens-per-batch 4096",
        ["align.evaluate.rows.evaluate_lists"],
    ),
    "evaluate rewards": (
        "evaluate rewards GRADED --reward REWARD",
        "`tokens_per_batch: 4096` among the keys of --reward",
        OF_SCORERS,
    ),
}
"""The command, what its sentence says to give, and what needs the memory."""


@pytest.fixture
def words(make_recipe, rows_file, tiny_policy, tmp_path):
    """What stands in for the names in capitals, and what replaces the reward's."""
    classifier = saved(tmp_path / "classifier", LlamaForSequenceClassification(llama(pad_token_id=2)), letters("</s>"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe(train={"steps": 2}, rollout=ROLLOUT)))
    graded = tmp_path / "graded.jsonl"
    graded.write_text(json.dumps({"prompt": "a", "completions": ["b", "c d"], "grades": [0, 1]}) + "\n")
    files = {"RECIPE": recipe, "ROWS": rows_file, "POLICY": tiny_policy, "GRADED": graded, "OUT": tmp_path / "o.jsonl"}
    return {name: str(path) for name, path in files.items()} | {"MODEL": str(classifier)}


def filled(command: str, words: dict[str, str], more: str = "") -> list[str]:
    reward = f"{{name: sequence_classifier, model: {words['MODEL']}{more}}}"
    return [words.get(part, part.replace("REWARD", reward)) for part in command.split()]


def lacks_above(monkeypatch, places, tokens: int) -> None:
    for place in places:
        module, name = place.rsplit(".", 1)
        original = getattr(__import__(module, fromlist=[name]), name)

        def needs(*args, original=original, **kwargs):
            numbers = [n for n in (*args, kwargs.get("tokens_per_batch")) if isinstance(n, int)]
            if max(numbers) > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(*args, **kwargs)

        monkeypatch.setattr(place, needs)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_lacks_memory_says_what_to_give_and_goes_on_with_it(name, words, monkeypatch, capsys):
    command, setting, places = COMMANDS[name]
    lacks_above(monkeypatch, places, 4096)
    with pytest.raises(SystemExit) as stopped:
        main(filled(command, words))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align: ")]
    assert stopped.value.code == 2
    assert line.startswith(f"align: out of memory with passes of up to 8192 tokens: call again with {setting}")
    if setting.startswith("`"):
        main(filled(command, words, more=", tokens_per_batch: 4096"))
    else:
        main([*filled(command, words), *setting.split()])


def test_memory_that_no_number_of_tokens_mends_is_one_sentence_too(words, monkeypatch, capsys):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("align.evaluate.rows.load_measured", load)
    with pytest.raises(SystemExit) as stopped:
        main(filled(COMMANDS["evaluate rows"][0], words))
    assert stopped.value.code == 2
    assert (
        "align: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); free some" in capsys.readouterr().err
    )


def test_another_fault_keeps_its_traceback(words, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("align.evaluate.rows.load_measured", load)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(filled(COMMANDS["evaluate rows"][0], words))
