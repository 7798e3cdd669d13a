"""Forty random tries over every architecture that is packed, against separate rows; minutes, so on demand alone."""

import random

import pytest
import small_configs
import torch
import transformers as t
from torch.testing import assert_close

from align.model.forward import score_tokens
from align.model.packing import enable_packing
from align.packing import packed_collate
from align.packing.batch import ListBatch, collate

pytestmark = pytest.mark.long
SHAPES = 40
CONFIGS = small_configs.CONFIGS | small_configs.WITH_STATE
WITHOUT_SDPA = ("gemma2",)
"""Models whose soft-capped attention sdpa would compute without its soft-cap."""
DELTA = ("qwen3 next", "qwen3.5", "qwen3.5 moe", "olmo hybrid")
"""Models of a gated delta rule, whose gradients float32 rounds to 1e-4 at worst; in float64 they agree to 2e-8."""


def some_lists(chance: random.Random) -> list[dict]:
    """Up to four lists of up to six completions, most of which begin like one before, as their prompts do."""

    def ids(longest: int) -> list[int]:
        return [chance.randrange(3, 40) for _ in range(chance.randint(1, longest))]

    def begun(earlier: list[list[int]], longest: int) -> list[int]:
        if not earlier or chance.random() < 0.3:
            return ids(longest)
        one = chance.choice(earlier)
        return [*one[: chance.randint(1, len(one))], *ids(longest // 2)]

    lists: list[dict] = []
    for _ in range(chance.randint(1, 4)):
        prompt, own = begun([one["prompt_ids"] for one in lists], 12), []
        for _ in range(chance.randint(2, 6)):
            own.append(begun(own, 20))
        lists.append({"prompt_ids": prompt, "completion_ids": own, "grades": [float(len(one)) for one in own]})
    return lists


def build(name: str) -> torch.nn.Module:
    """With weights so large that what is not the sequence's own shows."""
    torch.manual_seed(5)
    attention = "eager" if name in WITHOUT_SDPA else None
    model = t.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def batches(seed: int) -> tuple[ListBatch, ListBatch]:
    chance = random.Random(seed)
    lists = some_lists(chance)
    return collate(lists, pad_id=0), packed_collate(lists, pays=chance.choice((1, 4, 16)))


@pytest.mark.parametrize("name", CONFIGS)
def test_random_tries_give_values_and_gradients_of_separate_rows(name):
    separate, model = build(name), build(name)
    assert enable_packing(model, name=name)
    saved, near = 0, 1e-4 if name in DELTA else 1e-5
    for seed in range(SHAPES):
        padded, packed = batches(seed)
        saved += int((padded.input_ids != 0).sum()) - packed.input_ids.numel()
        weights, results = torch.randn(padded.targets.shape), []
        for one, batch in ((separate, padded), (model, packed)):
            one.zero_grad()
            values = score_tokens(one, batch).logprobs
            (weights * values).sum().backward()
            results.append((values.detach(), [p.grad for p in one.parameters()]))
        (expected, wanted), (ours, found) = results
        assert_close(ours, expected, atol=1e-5, rtol=1e-5, msg=lambda told, seed=seed: f"shape {seed}: {told}")
        whole = torch.cat([want.flatten() for want in wanted if want is not None]).norm()
        for gradient, want in zip(found, wanted, strict=True):
            if want is not None:  # a decay's gradient is a small difference of sums, rounded as the sums are
                assert (gradient - want).norm() <= near * want.norm() + 1e-6 * whole, seed
    assert saved > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_twenty_steps_lead_to_the_same_weights(name):
    ends = []
    for packing in (True, False):
        model = build(name)
        assert not packing or enable_packing(model, name=name)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), []
        for step in range(20):
            batch = batches(step)[packing]
            scores = batch.to_lists(score_tokens(model, batch).logprobs.sum(-1)).where(batch.list_mask, -torch.inf)
            loss = torch.nn.functional.cross_entropy(scores, batch.grades.where(batch.list_mask, -1.0).argmax(-1))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        ends.append((torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])))
    (losses, weights), (wanted, start) = ends
    assert_close(losses, wanted, atol=1e-4, rtol=1e-4)
    assert (weights - start).norm() <= 1e-5 * start.norm()
