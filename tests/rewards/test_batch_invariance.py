"""A reward depends on its prompt and completion alone: not on neighbours, order, padding or batch size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LANGUAGE_MODELS, WORDS, bert, letters, lists, llama, saved
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
)

from rewards import load_scorer

GPT2 = {"vocab_size": len(WORDS), "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
CLASSIFIERS = {
    "pad is eos": lambda: LlamaForSequenceClassification(llama(num_labels=1, pad_token_id=2)),
    "no pad": lambda: LlamaForSequenceClassification(llama(num_labels=1, pad_token_id=None)),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=1, pad_token_id=0)),
    "bert": lambda: BertForSequenceClassification(
        bert().config.__class__(**bert().config.to_dict() | {"num_labels": 1})
    ),
}
SCORERS = [*CLASSIFIERS, "implicit", "likelihood", "judge", "relevance"]


@pytest.fixture(scope="module")
def specs(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("scorers")
    pads = {"pad is eos": "</s>"}
    found = {
        name: {"model": saved(folder / name, make(), letters(pads.get(name, "<pad>")))}
        for name, make in CLASSIFIERS.items()
    }
    policy, reference = (saved(folder / f"lm{seed}", LANGUAGE_MODELS["llama"](), seed=seed) for seed in (0, 1))
    found["implicit"] = {"name": "implicit", "model": policy, "reference": reference}
    found["likelihood"] = {"name": "likelihood", "model": policy, "of": "mean"}
    found["judge"] = {"name": "judge", "model": policy, "log_odds": True}
    found["relevance"] = {"name": "relevance", "model": saved(folder / "encoder", bert())}
    return found


def rows() -> tuple[list[str], list[str]]:
    prompts, completions = lists(n=5, k=3)
    ends = [" </s>", " <pad>", "", " </s> </s>"]
    return prompts, [own + ends[i % 4] for i, own in enumerate(completions)]


@pytest.fixture(scope="module")
def scorers(specs):
    """Each scorer in three settings of its batches, and one text alone."""
    made = {}
    for name in SCORERS:
        alone = load_scorer({**specs[name], "exact": True})
        batched = [load_scorer({**specs[name], "tokens_per_batch": size}) for size in (1, 100, 8192)]
        prompts, completions = rows()
        expected = [alone.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
        made[name] = (alone, batched, expected)
    return made


@pytest.mark.parametrize("name", SCORERS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_rows_in_any_order_and_batch(scorers, name, data):
    alone, batched, expected = scorers[name]
    prompts, completions = rows()
    chosen = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=12))
    asked = [prompts[i] for i in chosen], [completions[i] for i in chosen]
    scale = max(1.0, max(map(abs, expected)))
    for scorer in batched:
        assert scorer.score(*asked) == pytest.approx([expected[i] for i in chosen], abs=1e-6 * scale)
    assert alone.score(*asked) == [expected[i] for i in chosen], "exact is the same to the last bit"


@pytest.mark.parametrize("name", ["pad is eos", "no pad", "gpt2", "implicit"])
def test_a_shared_prompt_is_computed_once(scorers, name):
    scorer = scorers[name][1][2]
    models = [scorer] if name != "implicit" else [scorer.policy, scorer.reference]
    read: list[int] = []
    hooks = [
        model.backbone.decoder.register_forward_pre_hook(
            lambda module, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        for model in models
    ]
    prompt, k = "a b c d " * 8, 4
    before = scorer.tally.tokens
    scorer.score([prompt] * k, [f"e {letter}" for letter in "fghi"])
    for hook in hooks:
        hook.remove()
    # start token, prompt and `e` once; then one letter each, and the end token where likelihood asks for it
    assert sum(read) == len(models) * (1 + 32 + 1 + k * (1 if name != "implicit" else 2))
    assert scorer.tally.tokens - before == len(models) * k * (1 + 32 + (2 if name != "implicit" else 3))


def test_a_model_that_cannot_run_packed_rows_is_padded(specs, scorers, monkeypatch, caplog):
    monkeypatch.setattr("rewards.backbone.ATTENTION", {})
    for name in ("pad is eos", "implicit", "likelihood"):
        scorer = load_scorer({**specs[name], "tokens_per_batch": 120})
        assert "completions of one prompt run as separate rows" in caplog.text
        scale = max(1.0, max(map(abs, scorers[name][2])))
        assert scorer.score(*rows()) == pytest.approx(scorers[name][2], abs=1e-6 * scale)
