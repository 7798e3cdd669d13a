"""Sampling and contrastive logits by their definitions, on each device."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.kernels import contrast_logits, sample
from align.kernels.contrast.op import contrast_logits_op
from align.kernels.sampling.op import sample_op
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


def exact(
    logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """The distribution to draw from, token by token from the most likely one; logits differ."""
    weights = {v: math.exp((z - max(logits)) / temperature) for v, z in enumerate(logits)}
    order = [v for v in sorted(weights, key=weights.__getitem__, reverse=True) if weights[v] >= min_p]
    order = order[:top_k] if top_k else order
    total, before, kept = sum(weights[v] for v in order), 0.0, []
    for v in order:
        if before / total < top_p:
            kept.append(v)
        before += weights[v]
    total = sum(weights[v] for v in kept)
    return [weights[v] / total if v in kept else 0.0 for v in range(len(logits))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_chi_square_against_the_exact_distribution(device: str, options: dict[str, float]) -> None:
    """Pearson's test at 0.1 %, rare tokens (expected less than 5 times) as one."""
    draws = 1_000_000
    logits = torch.randn(30) * 1.5
    drawn = sample(logits.expand(draws, 30), seed=11, position=torch.arange(draws), **options)  # type: ignore[arg-type]
    p = torch.tensor(exact(logits.tolist(), **options), dtype=torch.float64)  # type: ignore[arg-type]
    expected, observed = p * draws, torch.bincount(drawn.token, minlength=30).double()
    assert observed[p == 0].eq(0).all()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum().clamp_min(1e-9)[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    squares = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 2) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, squares / 2) > 1e-3
    torch.testing.assert_close(drawn.processed_logprob.double(), p.log()[drawn.token], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.raw_logprob, torch.log_softmax(logits, 0)[drawn.token])


def test_greedy_is_argmax_whatever_the_filters(device: str) -> None:
    logits = torch.randn(64, 1000)
    for options in ({}, {"top_k": 5}, {"top_p": 0.1}, {"min_p": 0.5}):
        drawn = sample(logits, temperature=0.0, seed=3, position=torch.arange(64), **options)  # type: ignore[arg-type]
        assert torch.equal(drawn.token, logits.argmax(1)) and drawn.rank.eq(1).all()


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


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    logits = torch.randn(8, 50)
    together = sample(logits, top_p=0.9, seed=torch.arange(8), position=4)
    for row in range(8):
        alone = sample(logits[row : row + 1], top_p=0.9, seed=row, position=4)
        assert alone.token.item() == together.token[row].item()


def test_greedy_takes_the_first_of_the_largest(device: str) -> None:
    out = sample(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), temperature=0.0, seed=1, position=1)
    assert out.token.item() == 1 and out.rank.item() == 1 and out.processed_logprob.item() == 0


def test_contrast_by_hand(device: str) -> None:
    z = torch.tensor([[2.0, 1.0, -4.0], [0.0, 3.0, 1.0]])
    out = contrast_logits(z, torch.tensor([1, -1]), 0.5, mask_tau=0.2)
    assert math.log(0.2) < 1 - 2 and math.log(0.2) > -4 - 2  # the second token is plausible, the third is not
    assert out.tolist() == [[1.5 * 2 - 0.5 * 0, 1.5 * 1 - 0.5 * 3, -math.inf], [0.0, 3.0, 1.0]]


def test_registration(device: str) -> None:
    logits, row, one = torch.randn(3, 20), torch.arange(3), torch.ones(3)
    torch.library.opcheck(sample_op, (logits, one, row, one * 0.8, one * 0, row, row))
    torch.library.opcheck(contrast_logits_op, (logits, torch.tensor([1, -1, 0]), one, -2.0))


def test_compiles_to_one_graph(device: str) -> None:
    logits, row = torch.randn(3, 20), torch.arange(3)

    def decode(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = sample(contrast_logits(logits, row - 1, 0.5), top_p=0.9, seed=7, position=row)
        return drawn.token, drawn.raw_logprob

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), decode(logits))


def test_contrast_refuses_a_gradient() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="align::contrast_logits has no gradient"):
        contrast_logits(logits, torch.tensor([1, 0]), 0.5).sum().backward()


def test_eager_code_does_not_load_the_compiler() -> None:
    """In a process of its own: a forward and a backward pass, a softmax and a draw."""
    code = """
import sys, torch
from align.kernels import linear_logprobs, sample, softmax
hidden = torch.randn(3, 4, requires_grad=True)
linear_logprobs(hidden, torch.randn(9, 4), torch.tensor([1, 2, 3])).logprob.sum().backward()
sample(softmax(hidden.detach()), seed=1, position=1)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
