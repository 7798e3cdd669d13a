"""Our sampler and decodings inside vLLM: against the formulas on transformers' logits, and beside its own sampler."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.errors import UserError
from align.evaluate.sampling import row_seed
from align.kernels import sample
from align.rollout import vllm_arguments, vllm_engine
from align.rollout.agreement import check_agreement
from align.rollout.engine import Sampling, Weights
from align.rollout.inside_vllm.transfer_q import VllmBaseline
from align.rollout.vllm_arguments import VllmArguments, takes_our_sampler
from align.rollout.vllm_engine import VllmEngine
from align.rollout.weights import write_zeros

pytestmark = pytest.mark.vllm

STRENGTH, PLAUSIBLE = 0.7, 0.05
CONTRAST = {"name": "contrast", "strength": STRENGTH, "plausible": PLAUSIBLE}
RULED = {"name": "transfer_q", "reward": {"name": "regex", "pattern": "w3"}, "candidates": 4, "continuation": 3}
SAMPLING = Sampling(completions=3, max_tokens=12, seed=5, temperature=0.8, stop_ids=(2,))
FILTERS = {"min_p": 0.02, "top_k": 20, "top_p": 0.9}
PROMPTS = [[5, 6, 7], [9], [8, 3, 4, 4], [11, 12]]
WORSE = [[11, 30, *ids] for ids in PROMPTS]


@pytest.fixture(scope="module")
def ours(untied):
    """Draws with our kernel, and can contrast prompts."""
    engine = VllmEngine(VllmArguments(str(untied), "float32", 256, cache_bytes=16 << 20, decoding=CONTRAST))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def native(untied):
    """Draws with vLLM's own sampler."""
    engine = VllmEngine(VllmArguments(str(untied), "float32", 256, cache_bytes=16 << 20, sampler="vllm"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def adapting(untied):
    """Can contrast adapters."""
    arguments = VllmArguments(str(untied), "float32", 256, lora_rank=4, cache_bytes=16 << 20, decoding=CONTRAST)
    engine = VllmEngine(arguments)
    yield engine
    engine.close()


class SmallNumbers:
    """The smaller the words' numbers, the better."""

    def score(self, prompts, completions):
        assert set(prompts) == {"the prompt"}
        return [-sum(int(word[1:]) for word in text.split()) / 20 for text in completions]


@pytest.fixture(scope="module")
def guided(untied):
    """Weighs four candidates by the reward of up to five tokens more."""
    section = {"name": "transfer_q", "reward": {"name": "length", "min": 1}, "candidates": 4, "continuation": 5}
    section["baseline"] = str(untied)
    arguments = VllmArguments(str(untied), "float32", 256, cache_bytes=16 << 20, decoding=section)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.rollout.inside_vllm.transfer_q.load_scorer", lambda config: SmallNumbers())
        engine = VllmEngine(arguments)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ruled(untied):
    """The same with a reward that every process has."""
    engine = VllmEngine(
        VllmArguments(str(untied), "float32", 256, cache_bytes=16 << 20, decoding=RULED | {"baseline": str(untied)})
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(untied):
    return AutoModelForCausalLM.from_pretrained(untied)


def drawn(engine, sampling=SAMPLING, contexts=None):
    return dict(engine.sample(PROMPTS, sampling, contexts))


def logits_at(model, prompt, ids):
    """Of the distribution of each of the tokens, in float64."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + ids])).logits[0, -len(ids) - 1 : -1].double()


def filtered(logits, temperature=0.8, min_p=0.02, top_k=20, top_p=0.9):
    """Probabilities of one row, filter by filter."""
    p = (logits / temperature).softmax(-1)
    p = torch.where(p >= min_p * p.max(), p, 0.0)
    p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0.0)
    p = p / p.sum()
    order = p.argsort(descending=True)
    p[order[p[order].cumsum(0) - p[order] >= top_p]] = 0.0
    return p / p.sum()


def contrasted(logits, worse):
    """The formula of contrastive decoding for one row."""
    allowed = logits >= logits.max() + torch.tensor(PLAUSIBLE, dtype=torch.float64).log()
    return torch.where(allowed, (1 + STRENGTH) * logits - STRENGTH * worse, -torch.inf)


def check_figures(sampled, logits, probabilities):
    """A completion's log-probabilities and entropies, from the model's logits and what was drawn from."""
    policy = logits.log_softmax(-1)
    tokens = torch.tensor(sampled.ids)[:, None]
    assert sampled.raw_logprobs == pytest.approx(policy.gather(1, tokens).squeeze(1).tolist(), abs=1e-4)
    assert sampled.entropies == pytest.approx((-(policy.exp() * policy).sum(1)).tolist(), abs=1e-4)
    assert sampled.logprobs == pytest.approx(probabilities.gather(1, tokens).squeeze(1).log().tolist(), abs=1e-4)


def test_every_token_has_both_log_probabilities_and_the_entropy(ours, model):
    for place, completions in drawn(ours, replace(SAMPLING, **FILTERS)).items():
        for one in completions:
            logits = logits_at(model, PROMPTS[place], one.ids)
            check_figures(one, logits, torch.stack([filtered(row) for row in logits]))


def test_vllms_own_sampler_says_how_likely_its_tokens_were(native, model):
    for place, completions in drawn(native, replace(SAMPLING, **FILTERS)).items():
        for one in completions:
            rows = torch.stack([filtered(row) for row in logits_at(model, PROMPTS[place], one.ids)])
            expected = rows.gather(1, torch.tensor(one.ids)[:, None]).squeeze(1).log().tolist()
            assert one.logprobs == pytest.approx(expected, abs=1e-4) and one.raw_logprobs is None


def test_seed_and_place_in_the_completion_decide_the_draw(ours, model):
    for place, completions in drawn(ours, replace(SAMPLING, **FILTERS)).items():
        for k, one in enumerate(completions):
            logits = logits_at(model, PROMPTS[place], one.ids).float()
            seed = row_seed(SAMPLING.seed, PROMPTS[place], 0) + k
            expected = sample(logits, temperature=0.8, **FILTERS, seed=seed, position=torch.arange(len(one.ids)))
            assert one.ids == expected.token.tolist()


def test_without_temperature_it_takes_the_same_tokens_as_vllm(ours, native):
    greedy = replace(SAMPLING, completions=1, temperature=0.0)
    own, theirs = drawn(ours, greedy), drawn(native, greedy)
    for place in own:
        assert own[place][0].ids == theirs[place][0].ids
        assert own[place][0].logprobs == pytest.approx(theirs[place][0].logprobs, abs=1e-5)
        assert theirs[place][0].raw_logprobs is None


@pytest.mark.parametrize("name", ["ours", "native"])
def test_the_tokens_are_distributed_as_they_should_be(name, request, model):
    """Chi-square of 3000 first tokens against the exact probabilities; 99.9 % of right samplers pass."""
    sampling = replace(SAMPLING, **FILTERS, completions=1000, max_tokens=1)
    engine = request.getfixturevalue(name)
    found = Counter(
        one.ids[0] for seed in range(3) for one in next(engine.sample([[5]], replace(sampling, seed=seed)))[1]
    )
    expected = 3000 * filtered(logits_at(model, [5], [0])[0])
    assert set(found) <= set(expected.nonzero().flatten().tolist())
    statistic = sum((found[token] - mean) ** 2 / mean for token, mean in enumerate(expected.tolist()) if mean)
    free = int((expected > 0).sum()) - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3  # Wilson and Hilferty


def test_a_contrast_is_drawn_from_the_formula(ours, model):
    for sampling in (replace(SAMPLING, **FILTERS), replace(SAMPLING, completions=1, temperature=0.0)):
        for place, completions in drawn(ours, sampling, WORSE).items():
            for one in completions:
                logits, worse = (logits_at(model, prompt, one.ids) for prompt in (PROMPTS[place], WORSE[place]))
                rows = torch.stack([contrasted(*pair) for pair in zip(logits, worse, strict=True)])
                if sampling.temperature:
                    check_figures(one, logits, torch.stack([filtered(row) for row in rows]))
                else:
                    assert one.ids == rows.argmax(1).tolist()
    assert drawn(ours, SAMPLING, WORSE) != drawn(ours)


def test_contrasts_do_not_depend_on_what_runs_beside_them(ours, monkeypatch):
    together = drawn(ours, SAMPLING, WORSE)
    monkeypatch.setattr(vllm_engine.Room, "of", lambda config: vllm_engine.Room(4, 64, 100, 32))  # two pairs at a time
    assert together == drawn(ours, SAMPLING, WORSE)
    assert {place: together[place] for place in (1, 3)} == dict(ours.sample(PROMPTS, SAMPLING, WORSE, {0, 2}))


def test_a_stop_text_ends_both_sides_of_a_contrast(ours):
    sampling = replace(SAMPLING, stop=("w2",), max_tokens=60)
    completions = [one for own in drawn(ours, sampling, WORSE).values() for one in own]
    assert any(one.ended and 20 <= one.ids[-1] < 30 for one in completions)
    assert not ours.llm.llm_engine.has_unfinished_requests()


def test_policies_are_contrasted_with_their_base(adapting, untied, model, trained, tmp_path):
    for version in (1, 2):
        policy = trained(untied, tmp_path / f"own{version}", version)
        zeros = write_zeros(tmp_path / f"own{version}", tmp_path / f"zeros{version}")
        weights = Weights("adapter", str(tmp_path / f"own{version}"), version, f"own{version}", against=str(zeros))
        with pytest.raises(Exception, match="nowhere"):  # what was loaded of the pair must not be taken for the next
            adapting.load(replace(weights, folder=str(zeros), name=f"bad{version}", against=str(tmp_path / "nowhere")))
        adapting.load(weights)
        next(iter(adapting.sample(PROMPTS, SAMPLING, PROMPTS)))  # and no one waits for the rest
        assert not adapting.llm.llm_engine.has_unfinished_requests()
        for place, completions in drawn(adapting, replace(SAMPLING, **FILTERS), PROMPTS).items():
            for one in completions:
                logits, base = (logits_at(own, PROMPTS[place], one.ids) for own in (policy.model, model))
                rows = [filtered(contrasted(*pair)) for pair in zip(logits, base, strict=True)]
                check_figures(one, logits, torch.stack(rows))
        assert check_agreement(adapting, policy, PROMPTS, SAMPLING, bound=None).max < 1e-4


def test_transfer_q_takes_the_token_after_which_the_best_text_follows(guided, model):
    sampling = replace(SAMPLING, completions=1, temperature=0.0, max_tokens=6)
    found = drawn(guided, sampling, ["the prompt"] * len(PROMPTS))
    for prompt, completions in zip(PROMPTS, (found[place] for place in range(len(PROMPTS))), strict=True):
        written = []
        for _ in completions[0].ids:
            logits = logits_at(model, prompt, [*written, 0])[-1]
            values = {}
            for token in logits.topk(4).indices.tolist():
                text = [*written, token]
                while text[-1] != 2 and len(text) < len(written) + 6:
                    text.append(int(logits_at(model, prompt, [*text, 0])[-1].argmax()))
                values[token] = float(logits[token]) - sum(token for token in text if token > 2) / 20
            written.append(max(values, key=values.get))
        assert completions[0].ids == written
    assert found != drawn(guided, sampling)


def test_the_baseline_goes_on_greedily_as_far_as_there_is_room(guided, untied, model):
    arguments = VllmArguments(str(untied), "float32", 256, cache_bytes=16 << 20, sampler="vllm")
    baseline = VllmBaseline(asdict(arguments), 5)
    texts = [(5, 6, 7), tuple(range(3, 56)) * 5, (3,) * 254, (4,) * 255, (4,) * 256]
    texts[1] = texts[1][:253]
    found = baseline(texts, [2])
    for text in texts[:4]:
        expected = []
        while len(expected) < min(5, 256 - len(text)) and 2 not in expected:
            expected.append(int(logits_at(model, list(text), [*expected, 0])[-1].argmax()))
        assert found[text] == expected
    assert texts[4] not in found


def test_versions_that_it_was_not_tried_with_draw_with_their_own(monkeypatch, caplog):
    assert takes_our_sampler("auto") and takes_our_sampler("align") and not takes_our_sampler("vllm")
    monkeypatch.setattr(vllm_arguments, "FIRST_RUNNER", ("0.1", "0.2"))
    assert not takes_our_sampler("auto")
    assert "draws the tokens with its own sampler" in caplog.text
    with pytest.raises(UserError, match=r"ours fits vLLM 0.1, 0.2, not "):
        takes_our_sampler("align")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoding", "contexts"), [(CONTRAST, None), (CONTRAST, WORSE), (RULED, ["a prompt"] * len(PROMPTS))]
)
def test_the_second_model_runner_draws_the_same(ours, ruled, untied, decoding, contexts):
    """Where a real Triton is installed: its interpreter runs that runner's kernels on a CPU."""
    if not any(Path(folder, "triton", "language").is_dir() for folder in sys.path):  # vLLM puts a stand-in into place
        pytest.skip("Triton is not installed; vLLM's second model runner needs it")
    sampling = replace(SAMPLING, **FILTERS, max_tokens=6)
    given = [json.dumps(one) for one in (decoding, asdict(sampling), PROMPTS, contexts)]
    command = [sys.executable, str(Path(__file__).with_name("second_runner.py")), str(untied), *given]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    for place, completions in drawn(ruled if decoding is RULED else ours, sampling, contexts).items():
        for own, theirs in zip(map(asdict, completions), found["completions"][str(place)], strict=True):
            assert own["ids"] == theirs["ids"]
            for figure in ("logprobs", "raw_logprobs", "entropies"):
                assert own[figure] == pytest.approx(theirs[figure], abs=1e-4)
