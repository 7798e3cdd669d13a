"""The CPU twins of sampling and contrast, by their definitions."""

import math

import pytest
import torch

from align.kernels import contrast_logits, sample
from align.kernels.sampling.reference import keep, uniform


def splitmix64(x: int) -> int:
    """Steele, Lea and Flood's generator in plain integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_uniform_numbers_are_splitmix64_of_seed_and_position() -> None:
    pairs = [(0, 0), (1, 0), (-5, 7), (2**62, 123456789)]
    expected = [(splitmix64(seed % 2**64 ^ splitmix64(position)) >> 11) / 2**53 for seed, position in pairs]
    assert uniform(*torch.tensor(pairs).T).tolist() == expected


def test_frequencies_are_the_processed_distribution() -> None:
    logits = torch.randn(1, 12).expand(20000, 12)
    drawn = sample(logits, temperature=0.8, top_k=6, seed=3, position=torch.arange(20000))
    kept = logits[0].masked_fill(logits[0] < logits[0].topk(6).values[-1], -torch.inf)
    p = torch.softmax(kept / 0.8, 0)
    share = torch.bincount(drawn.token, minlength=12) / 20000
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20000).sqrt() + 1e-9).all()
    torch.testing.assert_close(drawn.processed_logprob, p.log()[drawn.token])
    torch.testing.assert_close(drawn.raw_logprob, torch.log_softmax(logits[0], 0)[drawn.token])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2}, [0, 1, 2]),  # 1 and 2 are equal: both stay
        ({"top_p": 0.5}, [0]),  # p = .6, .15, .15, .1
        ({"top_p": 0.7}, [0, 1, 2]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"top_p": 0.85, "top_k": 3}, [0, 1, 2]),
        ({"temperature": 0.0}, [0]),
    ],
)
def test_filters_keep(options: dict[str, float], expected: list[int]) -> None:
    logits = torch.tensor([[0.6, 0.15, 0.15, 0.1]]).log()
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    tensors = {k: torch.tensor([v], dtype=torch.int64 if k == "top_k" else torch.float32) for k, v in given.items()}
    assert (keep(logits, **tensors)[0] > -torch.inf).nonzero()[:, 0].tolist() == expected


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(8, 50)
    together = sample(logits, top_p=0.9, seed=torch.arange(8), position=4)
    for row in range(8):
        alone = sample(logits[row : row + 1], top_p=0.9, seed=row, position=4)
        assert alone.token.item() == together.token[row].item()


def test_greedy_takes_the_first_of_the_largest() -> None:
    out = sample(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), temperature=0.0, seed=1, position=1)
    assert out.token.item() == 1 and out.rank.item() == 1 and out.processed_logprob.item() == 0


def test_contrast_by_hand() -> None:
    z = torch.tensor([[2.0, 1.0, -4.0], [0.0, 3.0, 1.0]])
    out = contrast_logits(z, torch.tensor([1, -1]), 0.5, mask_tau=0.2)
    assert math.log(0.2) < 1 - 2 and math.log(0.2) > -4 - 2  # the second token is plausible, the third is not
    assert out.tolist() == [[1.5 * 2 - 0.5 * 0, 1.5 * 1 - 0.5 * 3, -math.inf], [0.0, 3.0, 1.0]]
