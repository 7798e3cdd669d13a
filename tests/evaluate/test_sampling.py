"""Sampling against the model's own next-token probabilities, and its independence of whatever surrounds a prompt."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.evaluate.sampling import GumbelNoise, _batches, sample_completions

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
