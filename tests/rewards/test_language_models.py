"""Log-ratio scorers and judges against transformers' own logits, one text at a time, added up in float64."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import LANGUAGE_MODELS, TEMPLATE, WORDS, letters, lists, saved
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from align.kernels import linear_logprobs
from rewards import RowError, ScorerError, load_scorer


@torch.no_grad()
def tokens_by_hand(path: str, before: str, after: str, adapter: str | None = None) -> list[float]:
    """log p of each token of `after` behind `before`, each text alone."""
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager"
    )  # sdpa leaves out Gemma 2's soft-cap
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).double().eval()
    words = PreTrainedTokenizerFast.from_pretrained(path)
    prompt, own = (words(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    logits = model(torch.tensor([prompt + own])).logits[0].log_softmax(-1)
    places = range(len(prompt), len(prompt) + len(own))
    return [logits[p - 1, token].item() for p, token in zip(places, own, strict=True)]


def by_hand(path: str, before: str, after: str, adapter: str | None = None) -> tuple[float, int]:
    """Sum of `tokens_by_hand`, and how many they are."""
    found = tokens_by_hand(path, before, after, adapter)
    return sum(found), len(found)


def with_adapter(path: str, folder, seed: int) -> str:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=2, target_modules="all-linear", lora_alpha=4)
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_an_implicit_reward_is_beta_times_the_log_ratio(tmp_path, architecture):
    policy = saved(tmp_path / "policy", LANGUAGE_MODELS[architecture]())
    reference = saved(tmp_path / "reference", LANGUAGE_MODELS[architecture](), seed=1)
    prompts, completions = lists(n=3, k=3)
    spec = {"name": "implicit", "model": policy, "reference": reference, "beta": 0.3}
    ratios = [
        (by_hand(policy, f"<s> {p}", f"{c} </s>"), by_hand(reference, f"<s> {p}", f"{c} </s>"))
        for p, c in zip(prompts, completions, strict=True)
    ]
    expected = [0.3 * (own - other) for (own, _), (other, _) in ratios]
    assert load_scorer(spec).score(prompts, completions) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    mean = [0.3 * (own - other) / size for (own, size), (other, _) in ratios]
    per_token = load_scorer({**spec, "per_token": True})
    assert per_token.score(prompts, completions) == pytest.approx(mean, rel=1e-4, abs=1e-4)
    assert per_token.tally.completions == 9


def test_an_adapter_pair_shares_one_base(tmp_path):
    base = saved(tmp_path / "base", LANGUAGE_MODELS["llama"]())
    policy, start = (with_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("policy", "start")))
    prompts, completions = lists(n=2, k=2)
    for reference in (None, start):
        spec = {"name": "implicit", "model": base, "adapter": policy, "reference_adapter": reference}
        expected = [
            by_hand(base, f"<s> {p}", f"{c} </s>", policy)[0] - by_hand(base, f"<s> {p}", f"{c} </s>", reference)[0]
            for p, c in zip(prompts, completions, strict=True)
        ]
        assert load_scorer(spec).score(prompts, completions) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert max(map(abs, expected)) > 0.1


@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_a_likelihood_is_of_the_tokens_probabilities(tmp_path, architecture):
    path = saved(tmp_path / "model", LANGUAGE_MODELS[architecture]())
    prompts, completions = lists(n=2, k=3)
    found = [tokens_by_hand(path, f"<s> {p}", f"{c} </s>") for p, c in zip(prompts, completions, strict=True)]
    probabilities = [[math.exp(value) for value in own] for own in found]
    expected = {
        "product": [math.prod(own) for own in probabilities],
        "mean": [sum(own) / len(own) for own in probabilities],
        "min": [min(own) for own in probabilities],
    }
    for of, values in expected.items():
        scorer = load_scorer({"name": "likelihood", "model": path, "of": of})
        assert scorer.score(prompts, completions) == pytest.approx([math.log(p) for p in values], rel=1e-4, abs=1e-4)
        assert scorer.tally.completions == 6


def test_a_likelihood_under_an_adapter_and_of_nothing(tmp_path):
    base = saved(tmp_path / "base", LANGUAGE_MODELS["llama"]())
    adapter = with_adapter(base, tmp_path / "adapter", seed=0)
    scorer = load_scorer({"name": "likelihood", "model": base, "adapter": adapter, "append_eos": False, "of": "min"})
    own, plain = (tokens_by_hand(base, "<s> a b ", "c d", on) for on in (adapter, None))
    assert scorer.score(["a b "], ["c d"]) == pytest.approx([min(own)], rel=1e-4)
    assert abs(min(own) - min(plain)) > 0.05
    with pytest.raises(RowError, match="without tokens has no likelihood"):
        scorer.score(["a b"] * 2, ["c", ""])


def test_messages_are_scored_behind_the_generation_prompt(tmp_path):
    policy, reference = (
        saved(tmp_path / name, LANGUAGE_MODELS["llama"](), letters(template=TEMPLATE), seed)
        for seed, name in enumerate(("policy", "reference"))
    )
    scorer = load_scorer({"name": "implicit", "model": policy, "reference": reference})
    prompt, completion = [{"role": "user", "content": "b c"}], [{"role": "assistant", "content": "d e"}]
    before, after = "<s> u b c a", "d e </s>"
    expected = by_hand(policy, before, after)[0] - by_hand(reference, before, after)[0]
    assert scorer.score([prompt], [completion]) == pytest.approx([expected], rel=1e-4)


def test_a_density_ratio_tells_both_models_the_instruction(tmp_path):
    strong, weak = (
        saved(tmp_path / name, LANGUAGE_MODELS["llama"](), seed=seed) for seed, name in enumerate(("strong", "weak"))
    )
    prompts, completions = lists(n=2, k=2)
    spec = {"name": "density_ratio", "strong": strong, "weak": weak, "instruction": "k k"}
    sums = [
        (by_hand(strong, f"<s> k k {p}", f"{c} </s>"), by_hand(weak, f"<s> k k {p}", f"{c} </s>"))
        for p, c in zip(prompts, completions, strict=True)
    ]
    expected = [own - other for (own, _), (other, _) in sums]
    assert load_scorer(spec).score(prompts, completions) == pytest.approx(expected, rel=1e-4)
    expected = [(own - other) / size for (own, size), (other, _) in sums]
    per_token = load_scorer({**spec, "per_token": True})
    assert per_token.score(prompts, completions) == pytest.approx(expected, rel=1e-4)


def test_a_judge_gives_the_probability_of_yes_against_no(tmp_path):
    path = saved(tmp_path / "judge", LANGUAGE_MODELS["llama"]())
    spec = {"name": "judge", "model": path, "question": "{prompt} q {completion}"}
    before = "<s> a b q c {prompt} Verdict:"  # braces in a text are the text's own
    yes, no = (by_hand(path, before, word)[0] for word in ("Yes", "No"))
    odds = load_scorer({**spec, "log_odds": True}).score(["a b"], ["c {prompt}"])
    assert odds == pytest.approx([yes - no], rel=1e-4)
    expected = math.exp(yes) / (math.exp(yes) + math.exp(no))
    assert load_scorer(spec).score(["a b"], ["c {prompt}"]) == pytest.approx([expected], rel=1e-4)


def test_a_pairwise_judge_hears_both_orders(tmp_path):
    path = saved(tmp_path / "judge", LANGUAGE_MODELS["llama"](), letters(template=TEMPLATE))
    spec = {"name": "judge", "mode": "pairwise", "model": path, "question": "{prompt} q {first} q {second}"}
    completions = ["a", "b c", "d"]

    def first_wins(a: str, b: str) -> float:
        one, two = (math.exp(by_hand(path, f"<s> u p q {a} q {b} a", word)[0]) for word in ("A", "B"))
        return one / (one + two)

    expected = [
        sum((first_wins(own, other) + 1 - first_wins(other, own)) / 2 for other in completions if other != own) / 2
        for own in completions
    ]
    scorer = load_scorer(spec)
    assert scorer.score(["p"] * 3 + ["k"], [*completions, "z"]) == pytest.approx([*expected, 0.5], rel=1e-4)
    assert sum(expected) == pytest.approx(1.5)


def test_what_cannot_be_compared_is_refused(tmp_path):
    base = saved(tmp_path / "base", LANGUAGE_MODELS["llama"]())
    cases = [
        ({"name": "implicit", "model": base}, "the same"),
        ({"name": "implicit", "model": base, "adapter": base}, "no adapter in PEFT's format"),
        ({"name": "density_ratio", "strong": base, "weak": str(tmp_path / "absent")}, "absent"),
        ({"name": "judge", "model": base, "question": "{prompt}"}, "{completion}"),
        ({"name": "judge", "mode": "pairwise", "model": base, "log_odds": True}, "log_odds"),
    ]
    for spec, message in cases:
        with pytest.raises(ScorerError, match=message):
            load_scorer(spec)
    with pytest.raises(RowError, match="chat template"):
        load_scorer({"name": "judge", "model": base}).voice.model.logprobs([[{"role": "user", "content": "a"}]], ["b"])


def test_scoring_leaves_the_kernels_fit_for_training(tmp_path):
    """What the kernels keep between calls must not be bound to scoring without gradients."""
    policy, reference = (
        saved(tmp_path / name, LANGUAGE_MODELS["llama"](), seed=seed) for seed, name in enumerate(("a", "b"))
    )
    load_scorer({"name": "implicit", "model": policy, "reference": reference}).score(["a "], ["b c"])
    hidden = torch.randn(4, 32, requires_grad=True)
    weight = torch.randn(len(WORDS), 32)
    linear_logprobs(hidden, weight, targets=torch.tensor([1, 2, 3, 4])).logprob.sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_a_completion_that_others_wrote_a_part_of_has_no_log_ratio(tmp_path):
    policy = saved(tmp_path / "policy", LANGUAGE_MODELS["llama"]())
    other = saved(tmp_path / "other", LANGUAGE_MODELS["llama"](), seed=1)
    scorer = load_scorer({"name": "implicit", "model": policy, "reference": other})
    said = [{"role": role, "content": "a"} for role in ("assistant", "tool", "assistant")]
    with pytest.raises(RowError, match="a tool or a user speaks too has no log-probability of the assistant's alone"):
        scorer.score([[{"role": "user", "content": "a"}]], [said])
