"""Sampling by its definition on every code path; contrastive logits on each device."""

import itertools
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.kernels import Sample, contrast_logits, native, sample
from align.kernels.contrast.op import contrast_logits_op
from align.kernels.sampling.op import sample_op
from align.kernels.sampling.reference import keep, uniform

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, below a vector, not multiples of one, several parts; the last two also of several levels of group maxima.
WIDTHS = [1, 7, 255, 4097, 32000]
CPU_PATHS = ["torch", *native.LEVELS]
BEST_PATHS = [*dict.fromkeys(["torch", native.instruction_set()]), pytest.param("cuda", marks=pytest.mark.gpu)]


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


def rows(count: int, width: int) -> Tensor:
    """In turn: ordinary, half masked, many ties, far from zero, neighbouring floats, masked by the least float."""
    x = torch.randn(count, width) * 3
    x[1::6, : width // 2] = -torch.inf
    x[2::6] = x[2::6].round()
    x[3::6] += 1000
    x[4::6] = 1 + torch.randint(width, x[4::6].shape) * 2.0**-23
    x[5::6, 1::3] = torch.finfo(torch.float16).min
    return x


def grid(count: int) -> list[Tensor]:
    """`count` combinations of all the settings, one a row; then seeds and positions."""
    heats, counts, nuclei, least = (
        (0.0, 1e-6, 0.7, 1.0, 1e4),
        (0, 1, 5, 300, 10**6),
        (1.0, 0.9001, 0.3003, 2e-6),
        (0.0, 0.05, 1.0),
    )
    chosen = random.Random(0).sample(list(itertools.product(heats, counts, nuclei, least)), count)
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*chosen, strict=True))
    return [temperature, top_k, top_p, min_p, torch.arange(count) - 5, torch.arange(count) ** 3]


@pytest.mark.parametrize("isa", CPU_PATHS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_definition_in_float64(isa: str, width: int, dtype: torch.dtype) -> None:
    """A draw t is right where F(t - 1) - e <= u < F(t) + e, F being the exact cumulative distribution, e = 1e-6."""
    count = 48 if width == 32000 else 240
    logits, settings = rows(count, width).to(dtype), grid(count)
    temperature, top_k, top_p, min_p, seed, position = settings
    sides = [keep(logits, temperature, top_k, (top_p + e).where(top_p < 1, 1.0), min_p) for e in (-1e-6, 1e-6)]
    assert torch.equal(*(side > -torch.inf for side in sides))  # rounding decides about no token here
    token, raw, processed, entropy, rank = sample_op(logits, *settings)
    chosen = token[:, None]
    log_p, log_raw = torch.log_softmax(sides[0], 1), torch.log_softmax(logits.double(), 1)
    p, up_to = log_p.exp().gather(1, chosen)[:, 0], log_p.exp().cumsum(1).gather(1, chosen)[:, 0]
    u = torch.where(temperature > 0, uniform(seed, position), 0.0)
    assert ((up_to - p - 1e-6 <= u) & (u < up_to + 1e-6) & (p > 0)).all()
    greedy = temperature == 0
    assert torch.equal(token[greedy], logits[greedy].argmax(1)) and processed[greedy].eq(0).all()
    close = {"rtol": 2e-7, "atol": 1e-5}
    torch.testing.assert_close(raw.double(), log_raw.gather(1, chosen)[:, 0], **close)
    torch.testing.assert_close(processed.double()[~greedy], log_p.gather(1, chosen)[~greedy, 0], **close)
    expected = -torch.special.xlogy(log_raw.exp(), log_raw.exp()).sum(1)
    torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=3e-5)
    assert torch.equal(rank, 1 + (logits > logits.gather(1, chosen)).sum(1))


def test_min_p_decides_between_neighbouring_floats(isa: str) -> None:
    """Seven floats about the bound top + T log(min p), which float64 tells apart; each weighs 5 % of the largest."""
    top, heat, least = torch.rand(300) * 20, torch.rand(300) * 3 + 0.1, torch.full((300,), 0.05)
    bound = (top.double() + heat.double() * least.double().log()).float().view(torch.int32)
    about = (bound[:, None] + torch.arange(-3, 4, dtype=torch.int32)).view(torch.float32)
    logits = torch.cat([top[:, None], about], 1)
    drawn = sample(logits, temperature=heat, min_p=least, seed=2, position=torch.arange(300))
    z = keep(logits, heat, torch.zeros(300, dtype=torch.int64), torch.ones(300), least)
    expected = torch.log_softmax(z, 1).gather(1, drawn.token[:, None])[:, 0]
    torch.testing.assert_close(drawn.processed_logprob.double(), expected, rtol=0, atol=1e-5)


def test_rows_without_a_distribution(isa: str) -> None:
    """All masked, a NaN, an infinity: refused on a CPU; on a GPU token 0 and no log-probability, as of the operator."""
    logits = torch.randn(6, 300)
    logits[:2], logits[2:4, 7], logits[4:, 9] = -torch.inf, torch.nan, torch.inf
    for options in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}):
        given = {"temperature": torch.arange(6) % 2, "seed": 1, "position": 1, **options}
        if isa != "cuda":
            for row, what in ((0, "no token but -inf"), (2, "a NaN"), (4, "an infinity")):
                rows = torch.cat([torch.randn(1, 300), logits[row : row + 2]])
                with pytest.raises(ValueError, match=f"sample: row 1 of logits has {what}"):
                    sample(rows, **given | {"temperature": torch.tensor([1, 0, 1])})  # type: ignore[arg-type]
        got = operator(logits, **given)
        assert got.token.eq(0).all() and got.raw_logprob.isnan().all() and got.entropy.isnan().all()
        assert got.processed_logprob[1::2].isnan().all() and got.processed_logprob[::2].eq(0).all()
        assert torch.equal(got.rank, 1 + (logits > logits[:, :1]).sum(1))


def operator(logits: Tensor, **options: object) -> Sample:
    """`sample` without its checks."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0} | options
    whole = ("top_k", "seed", "position")
    own = [
        torch.as_tensor(v, dtype=torch.int64 if k in whole else torch.float32).expand(len(logits))
        for k, v in settings.items()
    ]
    return Sample(*sample_op(logits, *own, True))


BEYOND = {
    "temperature": (-1.0, -1e-6, math.nan, math.inf),
    "top_k": (-1, -(2**40)),
    "top_p": (0.0, -0.5, 1.0001, 2.0, math.nan),
    "min_p": (-0.1, 1.0001, 2.0, math.nan),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, own in BEYOND.items() for value in own])
def test_a_setting_out_of_its_range_is_refused(isa: str, name: str, value: float) -> None:
    """As one number, and in a tensor among good ones, where the message names the row; never token 0 in silence."""
    logits, others = torch.randn(5, 40), {"seed": 1, "position": 2}
    with pytest.raises(ValueError, match=re.escape(f"sample: {name} is {value:g}; give")):
        sample(logits, **{name: value}, **others)  # type: ignore[arg-type]
    good = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
    own = torch.full((5,), good[name], dtype=torch.int64 if name == "top_k" else torch.float32)
    own[3] = value
    for rest in ({}, {key: other for key, other in good.items() if key != name}):
        raw = operator(logits, **{name: own}, **rest, **others).raw_logprob
        assert raw.isnan().tolist() == [False, False, False, True, False]
        if isa != "cuda":
            with pytest.raises(ValueError, match=f"sample: {name} of row 3 is "):
                sample(logits, **{name: own}, **rest, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.randn(3, 0), {}, r"sample: logits \[3, 0\] have no token"),
        (torch.randn(0, 0), {}, "have no token"),
        (torch.zeros(3, 5, dtype=torch.int64), {}, r"sample: logits are torch.int64 \[3, 5\]; give floating"),
        (torch.randn(5), {}, r"sample: logits are torch.float32 \[5\]"),
        (torch.randn(2, 3, 5), {}, "give floating numbers"),
        (torch.randn(3, 5), {"top_k": 2.5}, "sample: top_k is 2.5; give a whole number"),
        (torch.randn(3, 5), {"top_k": torch.tensor([1.0, 2.0, 3.0])}, "top_k is torch.float32; give whole numbers"),
        (torch.randn(3, 5), {"seed": torch.ones(3)}, "seed is torch.float32; give whole numbers"),
        (torch.randn(3, 5), {"top_p": torch.ones(4)}, r"sample: top_p \[4\] for 3 rows; give one number, or one for"),
        (torch.randn(3, 5), {"position": torch.ones(3, 2, dtype=torch.int64)}, r"position \[3, 2\] for 3 rows"),
    ],
)
def test_other_shapes_and_kinds_are_refused(logits: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(logits, **{"seed": 1, "position": 1} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_tau": 0.0}, "contrast_logits: mask_tau is 0; give a number above 0 and at most 1"),
        ({"mask_tau": 2.0}, "mask_tau is 2"),
        ({"mask_tau": math.nan}, "mask_tau is nan"),
        ({"alpha": math.nan}, "contrast_logits: alpha is nan; give a finite number"),
        ({"alpha": torch.ones(2)}, r"alpha \[2\] for 3 rows"),
        ({"pair": torch.tensor([0, 3, 1])}, "contrast_logits: pair of row 1 is 3; there are 3 rows"),
        ({"pair": torch.tensor([0, 1])}, r"contrast_logits: pair \[2\] for rows \[3\]; give one for each row"),
        ({"pair": torch.tensor([0.0, 1.0, 2.0])}, "contrast_logits: pair .* are torch.float32; give whole numbers"),
        ({"logits": torch.randn(3, 0)}, r"contrast_logits: logits \[3, 0\] have no token"),
        ({"logits": torch.ones(3, 5, dtype=torch.int32)}, "contrast_logits: logits are torch.int32"),
    ],
)
def test_contrast_refuses_by_name(options: dict, message: str) -> None:
    given = {"logits": torch.randn(3, 5), "pair": torch.tensor([1, -1, 0]), "alpha": 0.5} | options
    with pytest.raises(ValueError, match=message):
        contrast_logits(**given)


def test_views_of_rows(isa: str) -> None:
    x, position = torch.randn(6, 50), torch.arange(6)
    for view in (x[::2], x[:, 3:40], x.T, x[:1].expand(4, -1)):
        given = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "position": position[:1]}
        got, expected = sample(view, **given), sample(view.clone(memory_format=torch.contiguous_format), **given)
        assert torch.equal(got.token, expected.token) and torch.equal(got.rank, expected.rank)
        torch.testing.assert_close(got.processed_logprob, expected.processed_logprob)


def test_rank_is_counted_where_it_is_asked_for(isa: str) -> None:
    logits = torch.randn(3, 300)
    for options in ({}, {"top_k": 9}):
        ranked, bare = (sample(logits, seed=1, position=2, rank=wanted, **options) for wanted in (True, False))
        assert bare.rank is None and torch.equal(bare.token, ranked.token)
        assert torch.equal(bare.processed_logprob, ranked.processed_logprob)


def test_no_rows_to_draw_from(isa: str) -> None:
    drawn = sample(torch.empty(0, 11), seed=1, position=1)
    assert drawn.token.shape == drawn.entropy.shape == (0,)


def test_threads_do_not_change_the_draws() -> None:
    logits, before = rows(60, 20011), torch.get_num_threads()
    settings = grid(60)
    drawn = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            drawn.append(sample_op(logits, *settings))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*drawn, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("isa", BEST_PATHS, indirect=True)
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(pytest.param(own, marks=pytest.mark.long) for own in ({"temperature": 0.6}, {"temperature": 1.7})),
        *(pytest.param(own, marks=pytest.mark.long) for own in ({"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1})),
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_chi_square_against_the_exact_distribution(isa: str, options: dict[str, float]) -> None:
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


def test_greedy_is_argmax_whatever_the_filters(isa: str) -> None:
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


def test_a_row_does_not_depend_on_its_batch(isa: str) -> None:
    logits = torch.randn(8, 50)
    together = sample(logits, top_p=0.9, seed=torch.arange(8), position=4)
    for row in range(8):
        alone = sample(logits[row : row + 1], top_p=0.9, seed=row, position=4)
        assert alone.token.item() == together.token[row].item()


def test_greedy_takes_the_first_of_the_largest(isa: str) -> None:
    out = sample(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), temperature=0.0, seed=1, position=1)
    assert out.token.item() == 1 and out.rank.item() == 1 and out.processed_logprob.item() == 0


def test_contrast_by_hand(device: str) -> None:
    z = torch.tensor([[2.0, 1.0, -4.0], [0.0, 3.0, 1.0]])
    out = contrast_logits(z, torch.tensor([1, -1]), 0.5, mask_tau=0.2)
    assert math.log(0.2) < 1 - 2 and math.log(0.2) > -4 - 2  # the second token is plausible, the third is not
    assert out.tolist() == [[1.5 * 2 - 0.5 * 0, 1.5 * 1 - 0.5 * 3, -math.inf], [0.0, 3.0, 1.0]]


def test_registration(device: str) -> None:
    logits, row, one = torch.randn(3, 20), torch.arange(3), torch.ones(3)
    for rank in (True, False):
        torch.library.opcheck(sample_op, (logits, one, row, one * 0.8, one * 0, row, row, rank))
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
