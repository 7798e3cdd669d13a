"""token_view.jsonl: some held-out lists token by token, before and after training."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.evaluate.token_view import token_strings
from align.training.train import train


def read_view(path):
    return [json.loads(line) for line in (path / "token_view.jsonl").read_text().splitlines()]


def logprobs_by_hand(model, prompt: list[int], completion: list[int]) -> list[float]:
    """One sequence, the model's own logits, float64."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return [logits[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


def test_it_holds_every_tokens_values_before_and_after(make_recipe, tiny_policy, tmp_path):
    recipe = make_recipe(sampling={"prompts": 1, "token_lists": 3}, train={"steps": 3})
    result = train(recipe)
    lists = read_view(result.path)
    assert len(lists) == 3
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    moved = 0.0
    for line in lists:
        prompt = tokenizer(line["prompt"])["input_ids"]
        assert len(line["grades"]) == len(line["completions"])
        for completion in line["completions"]:
            ids = [tokenizer.convert_tokens_to_ids(token.strip()) for token in completion["tokens"]]
            expected = logprobs_by_hand(model, prompt, ids)
            assert completion["token_rewards"] is None
            assert completion["logprob_before"] == pytest.approx(expected, abs=1e-4)
            assert completion["implicit_before"] == pytest.approx([0.0] * len(ids), abs=1e-5)
            changes = [0.1 * (a - b) for a, b in zip(completion["logprob_after"], expected, strict=True)]
            assert completion["implicit_after"] == pytest.approx(changes, abs=1e-5)
            moved = max(moved, *map(abs, changes))
    assert moved > 1e-3, "training has changed something"


def test_none_are_written_where_none_are_asked_for(make_recipe):
    result = train(make_recipe(sampling={"prompts": 1, "token_lists": 0}, train={"steps": 1}))
    assert read_view(result.path) == []


def test_a_resumed_run_still_knows_what_was_before(make_recipe, monkeypatch):
    from align.training.trainer import AlignTrainer

    options = {"sampling": {"prompts": 1, "token_lists": 2}, "train": {"steps": 3}}
    whole = train(make_recipe("whole", **options))
    step = AlignTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(AlignTrainer, "training_step", killed)
        train(make_recipe("killed", **options))
    assert read_view(train(make_recipe("killed", **options)).path) == read_view(whole.path)


def test_tokens_joined_are_the_completion(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    prompt = tokenizer("Once upon a time", add_special_tokens=True)["input_ids"]
    text = " there was a café, 日本, \n a cat."
    ids = tokenizer("Once upon a time" + text, add_special_tokens=True)["input_ids"][len(prompt) :]
    strings = token_strings(tokenizer, prompt, ids)
    assert len(strings) == len(ids)
    assert "".join(strings) == text


def test_a_long_completion_in_chunks_is_the_whole_decoded_each_time(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    prompt = tokenizer("Once upon a time", add_special_tokens=True)["input_ids"]
    text = " there was a café, 日本, \n a cat." * 12
    ids = tokenizer("Once upon a time" + text, add_special_tokens=True)["input_ids"][len(prompt) :]
    whole = [str(tokenizer.decode([*prompt, *ids[:end]])) for end in range(len(ids) + 1)]
    expected, shown = [], len(whole[0])
    for own in whole[1:]:
        expected.append("" if own.endswith("\N{REPLACEMENT CHARACTER}") else own[shown:])
        shown = shown if not expected[-1] else len(own)
    assert len(ids) > 200 and token_strings(tokenizer, prompt, ids) == expected
