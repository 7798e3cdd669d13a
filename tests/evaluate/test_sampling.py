"""Sampling against the model's own next-token probabilities, and its independence of whatever surrounds a prompt."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.evaluate.sampling import (
    GumbelNoise,
    _batches,
    completion_text,
    end_ids,
    sample_completions,
    sample_tokens,
    sharpness,
)

WORDS = ["<pad>", "</s>", *"abcdefghijklmnop"]
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10], [4, 4], [5, 9, 11, 2], [0, 3, 4]]  # the last starts with the padding token


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.4,
        )
    )
    # A chat model's own configuration, none of which may change what is sampled here.
    model.generation_config = GenerationConfig(do_sample=True, top_k=2, temperature=0.3, repetition_penalty=1.5)
    return model.eval()


def test_greedy_is_the_argmax_of_every_step(model, tokenizer):
    texts = sample_completions(model, tokenizer, PROMPTS, max_tokens=6, temperature=0)
    for prompt, [text] in zip(PROMPTS, texts, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert len({text for [text] in texts}) > 1


def test_first_tokens_follow_the_softmax_at_the_temperature(model, tokenizer):
    n, prompt = 4000, [3, 4]
    [texts] = sample_completions(model, tokenizer, [prompt], max_tokens=1, temperature=0.7, per_prompt=n)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    for token in range(2, len(WORDS)):
        share, p = texts.count(WORDS[token]) / n, float(expected[token])
        assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-3
    assert expected.max() < 0.9


def test_filters_keep_only_the_likeliest_tokens():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(500, 4)
    seen = {}
    for name, top_k, top_p in [("k", 2, 1.0), ("p", 0, 0.75), ("none", 0, 1.0)]:
        noise = GumbelNoise(list(range(500)), 1.0, top_k, top_p, "cpu")
        seen[name] = set(noise(torch.zeros(500, 1, dtype=torch.long), logits).argmax(-1).tolist())
    assert seen == {"k": {0, 1}, "p": {0, 1}, "none": {0, 1, 2, 3}}


def test_a_completion_depends_on_its_own_prompt_and_the_seed_alone(model, tokenizer):
    options = {"max_tokens": 12, "seed": 3, "per_prompt": 3}
    together = sample_completions(model, tokenizer, PROMPTS, **options)
    assert together == [sample_completions(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
    assert together == sample_completions(model, tokenizer, PROMPTS[::-1], **options)[::-1]
    assert together == sample_completions(model, tokenizer, PROMPTS, tokens_per_batch=40, **options)
    assert together != sample_completions(model, tokenizer, PROMPTS, **(options | {"seed": 4}))
    assert all(len(set(texts)) > 1 for texts in together)


@pytest.mark.parametrize("done", [{0}, {0, 4, 5}, {0, 4, 5, 1}])
def test_what_is_done_is_not_given_and_changes_no_digit_of_the_rest(done, model, tokenizer):
    """Two batches: every row of the three longest prompts, then every row of the others."""
    options = {"max_tokens": 12, "seed": 3, "per_prompt": 3, "tokens_per_batch": 9 * 17}
    whole = {row[:2]: row[2] for row in sample_tokens(model, tokenizer, PROMPTS, **options)}
    rest = {row[:2]: row[2] for row in sample_tokens(model, tokenizer, PROMPTS, done=done, **options)}
    assert rest == {place: drawn for place, drawn in whole.items() if place[0] not in done}


def test_a_text_ends_at_its_end_token_and_never_shows_it(model, tokenizer):
    texts = sample_completions(model, tokenizer, [[3]], max_tokens=40, temperature=2.0, per_prompt=64)[0]
    assert min(map(len, texts)) < 20  # at 18 tokens of about equal chance, most texts end by themselves
    assert not any("<" in text for text in texts)


def test_the_models_own_end_tokens_end_a_text_too(model, tokenizer):
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [5, 6]
    texts = sample_completions(model, tokenizer, [[3]], max_tokens=40, temperature=2.0, per_prompt=64)[0]
    model.generation_config.eos_token_id = ends
    assert min(map(len, texts)) < 20
    assert not any({WORDS[5], WORDS[6]} & set(text) for text in texts)


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [10, 30, 20, 10, 50]
    rows = [(prompt, sample) for prompt in range(5) for sample in range(2)]
    batches = list(_batches(rows, lengths, 60))
    assert sorted(row for batch in batches for row in batch) == rows
    assert all(len(batch) * max(lengths[prompt] for prompt, _ in batch) <= 60 for batch in batches)
    assert len(batches) == 2 + 1 + 1 + 1  # 50 | 50 | 30 30 | 20 20 10 | 10 10 10


def test_random_state_and_mode_are_left_as_they_were(model, tokenizer):
    model.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sample_completions(model, tokenizer, PROMPTS, max_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    model.eval()


def drawn_from(model, prompt, ids, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probability of each token, step by step in float64: divide, then keep by min-p, top-k and top-p in turn."""
    expected = []
    for t, token in enumerate(ids):
        logits = model(torch.tensor([prompt + ids[:t]])).logits[0, -1].double() / temperature
        p = logits.softmax(-1)
        p = torch.where(p >= min_p * p.max(), p, 0.0)
        if top_k:
            p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0.0)
        p = p / p.sum()
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        p[order[before >= top_p]] = 0.0
        expected.append(float((p / p.sum())[token].log()))
    return expected


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.3}, {"min_p": 0.1, "top_k": 6, "top_p": 0.8}]
)
def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(model, tokenizer, filters):
    options = {"max_tokens": 5, "temperature": 0.8, "per_prompt": 3, **filters}
    with torch.no_grad():
        for prompt, _, sampled in sample_tokens(model, tokenizer, PROMPTS, **options):
            expected = drawn_from(model, PROMPTS[prompt], sampled.ids, temperature=0.8, **filters)
            assert sampled.logprobs == pytest.approx(expected, abs=1e-4)
            assert sampled.raw_logprobs == pytest.approx(drawn_from(model, PROMPTS[prompt], sampled.ids), abs=1e-4)
            ids = torch.tensor([PROMPTS[prompt] + sampled.ids])
            p = model(ids).logits[0, -len(sampled.ids) - 1 : -1].double().softmax(-1)
            assert sampled.entropies == pytest.approx((-(p * p.log()).sum(1)).tolist(), abs=1e-4)


def test_an_adaptive_temperature_is_the_papers_polynomial_of_the_entropy(model, tokenizer):
    """Log-probabilities are those of the sharper distribution; a row without doubt, or of 8 nats, stays as it is."""
    rows = torch.cat([torch.randn(6, 3000) * torch.tensor([[20.0], [5.0], [4.0], [3.0], [2.0], [0.1]])])
    seen = []
    for row in rows.double():
        p = row.softmax(-1)
        seen.append(float(-(p * p.log()).sum()))
    expected = [max(1.0, float(np.polyval([-0.037, 0.481, -2.3, 4.917, -1.791], h))) if h > 0.5 else 1.0 for h in seen]
    assert min(seen) < 0.5 and max(seen) > 7 and max(expected) > 2
    assert_close(sharpness(rows)[:, 0].double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    options = {"max_tokens": 4, "temperature": 0.8, "per_prompt": 2, "adaptive_temperature": True}
    with torch.no_grad():
        for prompt, _, sampled in sample_tokens(model, tokenizer, PROMPTS, **options):
            logits = model(torch.tensor([PROMPTS[prompt] + sampled.ids])).logits[0, -len(sampled.ids) - 1 : -1].double()
            log_p = (logits * sharpness(logits).double() / 0.8).log_softmax(-1)
            assert sampled.logprobs == pytest.approx(log_p[range(len(sampled.ids)), sampled.ids].tolist(), abs=1e-4)
            assert sampled.raw_logprobs == pytest.approx(drawn_from(model, PROMPTS[prompt], sampled.ids), abs=1e-4)
            assert sampled.logprobs != pytest.approx(drawn_from(model, PROMPTS[prompt], sampled.ids, temperature=0.8))


def test_a_completion_keeps_the_token_that_ended_it(model, tokenizer):
    options = {"max_tokens": 30, "temperature": 2.0, "per_prompt": 40, "stop_ids": [7]}
    found = [sampled for *_, sampled in sample_tokens(model, tokenizer, [[3]], **options)]
    ended = [sampled for sampled in found if sampled.ended]
    assert {sampled.ids[-1] for sampled in ended} == {tokenizer.eos_token_id, 7}
    assert not any({tokenizer.eos_token_id, 7} & set(sampled.ids[:-1]) for sampled in ended)
    assert all(len(sampled.ids) == 30 == len(sampled.logprobs) for sampled in found if not sampled.ended)
    assert len(ended) < len(found)


def test_a_stop_text_ends_a_completion_and_may_span_tokens(model, tokenizer):
    options = {"max_tokens": 40, "temperature": 2.0, "per_prompt": 60, "seed": 1}
    free = [sampled.ids for *_, sampled in sample_tokens(model, tokenizer, [[3]], **options)]
    found = [sampled.ids for *_, sampled in sample_tokens(model, tokenizer, [[3]], stop=["ca", "h"], **options)]

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    for whole, ids in zip(free, found, strict=True):
        lengths = [n for n in range(1, len(whole) + 1) if "ca" in text(whole[:n]) or "h" in text(whole[:n])]
        assert ids == whole[: min(lengths, default=len(whole))]
        shown = completion_text(tokenizer, [3], ids, end_ids(model, tokenizer), ["ca", "h"])
        assert shown == text(ids).split("ca")[0].split("h")[0]
    assert {text(ids)[-2:] for ids in found} > {"ca"} and any(text(ids).endswith("h") for ids in found)
