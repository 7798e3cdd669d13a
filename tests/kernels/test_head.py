"""`linear_logprobs` against the formula in float64, in every mode, dtype and code path."""

import itertools

import pytest
import torch
from torch import Tensor

from align.kernels import linear_logprobs, native
from align.kernels.head.chunked import default_chunk_rows
from align.kernels.head.op import linear_logprobs_op
from align.kernels.head.reference import linear_logits, linear_statistics

N, H, V, RANK = 11, 24, 83, 3
OPTIONS = {"logit_scale": 1.3, "temperature": 0.8}
ALL = ("logprob", "logsumexp", "entropy", "log_sum_sq_probs")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype, columns: int = 1) -> dict[str, Tensor]:
    """Inputs with ignored rows, a row with one ignored target and equal targets in one row."""
    torch.manual_seed(0)
    targets = torch.randint(0, V, (N, columns))
    targets[2], targets[5, 0], targets[7] = -1, -1, 9
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,), "lora_a": (RANK, H), "lora_b": (V, RANK)}
    return {"targets": targets} | {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def outputs_of(inputs: dict[str, Tensor], softcap: float | None, **options: object) -> list[Tensor]:
    lora = (inputs["lora_a"], inputs["lora_b"], 0.5)
    given = {k: inputs[k] for k in ("hidden", "weight", "targets", "bias")}
    out = linear_logprobs(**given, softcap=softcap, lora=lora, **OPTIONS, **options)
    values = (out.logprob, out.logsumexp, out.entropy, out.log_sum_sq_probs)
    return [value for value in values if value is not None]


def truth_of(inputs: dict[str, Tensor], softcap: float | None, count: int) -> list[Tensor]:
    lora = (inputs["lora_a"], inputs["lora_b"], 0.5)
    logits = linear_logits(
        inputs["hidden"], inputs["weight"], bias=inputs["bias"], softcap=softcap, lora=lora, **OPTIONS
    )
    return list(linear_statistics(logits, inputs["targets"]))[:count]


def gradients(values: list[Tensor], wrt: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(sum((v * torch.randn(v.shape)).sum() for v in values), wrt)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("mode", ["direction", "recompute", "store"])
def test_float64_equals_the_formula(device: str, mode: str, softcap: float | None, columns: int) -> None:
    inputs = make(torch.float64, columns)
    trained = ["hidden"] if mode == "direction" else ["hidden", "weight", "bias", "lora_a", "lora_b"]
    wrt = [inputs[name].requires_grad_() for name in trained]
    names = ALL[:2] if mode == "direction" else ALL
    got = outputs_of(inputs, softcap, outputs=names, grad=mode, chunk_rows=4)
    expected = truth_of(inputs, softcap, len(names))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, wrt), gradients(expected, wrt))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("mode", ["direction", "recompute", "store"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_exact_than_torch(isa: str, dtype: torch.dtype, mode: str, softcap: float | None) -> None:
    """Every output and gradient, against float64 of the same inputs, beside torch in float32 (then rounded)."""
    names = ("logprob",) if mode == "direction" else ALL
    trained = ["hidden"] if mode == "direction" else ["hidden", "weight", "bias", "lora_a", "lora_b"]

    def run(cast: torch.dtype, ours: bool) -> tuple[Tensor, ...]:
        inputs = {k: v.to(cast) if v.is_floating_point() else v for k, v in make(dtype).items()}
        wrt = [inputs[name].requires_grad_() for name in trained]
        if ours:
            values = outputs_of(inputs, softcap, outputs=names, grad=mode, chunk_rows=4)
        else:
            values = truth_of(inputs, softcap, len(names))
        return *values, *gradients(values, wrt)

    truth, plain, got = run(torch.float64, False), run(torch.float32, False), run(dtype, True)
    for position, (t, p, g) in enumerate(zip(truth, plain, got, strict=True)):
        eps = torch.finfo(torch.float32 if position < len(names) else dtype).eps
        resolution = 16 * eps * t.abs().max().clamp_min(1)  # logits reach 60
        assert (g.double() - t).abs().max() <= (p.double() - t).abs().max() + resolution, position


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("mode", ["none", "direction", "recompute", "store"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_mean_logits_and_the_likeliest_token(device, dtype, mode, softcap, columns):
    """Against float64 of the same inputs; they add nothing to gradients, and chunks of rows make no difference."""
    inputs = make(dtype, columns)
    hidden = inputs["hidden"].requires_grad_(mode != "none")
    lora = (inputs["lora_a"], inputs["lora_b"], 0.5)
    exact = [inputs[name].detach().double() for name in ("hidden", "weight", "bias", "lora_a", "lora_b")]
    h, w, bias, a, b = exact
    z = (h @ w.T + 0.5 * (h @ a.T) @ b.T + bias) * OPTIONS["logit_scale"]
    z = (softcap * (z / softcap).tanh() if softcap else z) / OPTIONS["temperature"]
    learnt = (inputs["targets"] >= 0).any(dim=1)
    first = inputs["targets"][:, 0].clone()
    first[9] = inputs["targets"][9, 0] = z[9].argmax()
    given = {k: inputs[k] for k in ("weight", "targets", "bias")}
    names = ("logprob", "mean_logit", "is_top")
    out = linear_logprobs(
        hidden, **given, softcap=softcap, lora=lora, **OPTIONS, outputs=names, grad=mode, chunk_rows=4
    )
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out.mean_logit.double(), z.mean(dim=1).where(learnt, 0.0), **close)
    checked = learnt & (first >= 0)
    likeliest = (z.argmax(dim=1) == first).double()
    assert likeliest[checked].sum() >= 1
    assert torch.equal(out.is_top.double()[checked], likeliest[checked]) and not out.is_top[~learnt].any()
    if mode == "none":
        return
    assert not out.mean_logit.requires_grad and not out.is_top.requires_grad
    plain = linear_logprobs(hidden, **given, softcap=softcap, lora=lora, **OPTIONS, grad=mode, chunk_rows=4)
    (with_them,), (without,) = (torch.autograd.grad(x.logprob.sum(), [hidden]) for x in (out, plain))
    assert torch.equal(with_them, without)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_within_2e5_of_float64_on_a_large_vocabulary(isa: str, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(9, 64).to(dtype), (torch.randn(20011, 64) * 0.5).to(dtype)
    targets = torch.randint(0, 20011, (9,))
    got = linear_logprobs(hidden, weight, targets).logprob
    truth = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, targets[:, None])[:, 0]
    assert (got.double() - truth).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(1, 1, 1), (3, 5, 31), (14, 64, 32), (15, 33, 65), (29, 100, 130), (64, 96, 96), (70, 130, 70)],
)
@pytest.mark.parametrize("level", [level for level in native.LEVELS if level.endswith("bf16")])
def test_bf16_product_of_any_shape(rows: int, width: int, columns: int, level: str) -> None:
    x, w = torch.randn(rows, width).bfloat16(), torch.randn(columns, width + 3).bfloat16()[:, :width]
    out = torch.full((rows, columns + 2), torch.nan)
    with native.forced(level):
        if native.instruction_set() != level:
            pytest.skip(f"this CPU has no {level}")
        assert native.linear_bf16(x, w, out[:, :columns])
    torch.testing.assert_close(out[:, :columns].double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5)
    assert out[:, columns:].isnan().all()


@pytest.mark.parametrize("mode", ["auto", "direction", "recompute", "store"])
def test_rows_without_a_target_never_matter(isa: str, mode: str) -> None:
    """NaN hidden states at ignored rows leave every value and gradient finite."""
    inputs = make(torch.float32)
    inputs["hidden"][2] = torch.nan
    hidden = inputs["hidden"].requires_grad_()
    out = linear_logprobs(hidden, inputs["weight"], inputs["targets"][:, 0], grad=mode)
    out.logprob.sum().backward()
    assert out.logprob[2] == 0 and out.logprob.isfinite().all()
    assert hidden.grad is not None and hidden.grad[2].eq(0).all() and hidden.grad.isfinite().all()


def test_nothing_to_score(device: str) -> None:
    inputs = make(torch.float32)
    hidden = inputs["hidden"].requires_grad_()
    for rows, targets in ((hidden[:0], torch.empty(0, dtype=torch.int64)), (hidden, torch.full((N,), -1))):
        out = linear_logprobs(rows, inputs["weight"], targets, outputs=ALL, grad="recompute")
        assert out.logprob.eq(0).all() and out.entropy is not None and out.entropy.eq(0).all()
        out.logprob.sum().backward()
    assert hidden.grad is not None and hidden.grad.eq(0).all()


def test_a_forbidden_token_and_huge_logits(isa: str) -> None:
    """A bias of -inf takes a token out; logits of 1e4 stay finite."""
    hidden, weight, bias = torch.randn(4, 8) * 500, torch.randn(50, 8) * 5, torch.zeros(50)
    bias[7] = -torch.inf
    hidden.requires_grad_()
    targets = torch.tensor([7, 1, 2, 3])
    out = linear_logprobs(hidden, weight, targets, bias=bias, outputs=ALL, grad="recompute")
    assert out.logprob[0] == -torch.inf and out.logprob[1:].isfinite().all()
    assert out.entropy is not None and out.entropy.isfinite().all()
    (grad,) = torch.autograd.grad(out.logprob[1:].sum() + out.entropy.sum(), hidden)
    assert grad.isfinite().all()


def test_chunks_do_not_change_the_numbers(device: str) -> None:
    inputs = make(torch.float32)
    whole, pieces = (outputs_of(inputs, None, outputs=ALL, chunk_rows=rows) for rows in (N, 1))
    torch.testing.assert_close(whole, pieces, rtol=5e-6, atol=5e-6)  # one row is another product than many


@pytest.mark.parametrize("mode", ["direction", "recompute", "store"])
def test_gradcheck(device: str, mode: str) -> None:
    inputs = make(torch.float64, 2)
    trained = ["hidden"] if mode == "direction" else ["hidden", "weight", "bias", "lora_a", "lora_b"]
    for name in trained:
        inputs[name].requires_grad_()

    def values(*tensors: Tensor) -> tuple[Tensor, ...]:
        names = ALL[:2] if mode == "direction" else ALL
        return tuple(outputs_of(inputs | dict(zip(trained, tensors, strict=True)), 5.0, outputs=names, grad=mode))

    assert torch.autograd.gradcheck(values, [inputs[name] for name in trained], fast_mode=True)


def test_auto_knows_who_needs_gradients(device: str) -> None:
    inputs = make(torch.float32)
    hidden, weight, targets = inputs["hidden"], inputs["weight"], inputs["targets"][:, 0]
    assert not linear_logprobs(hidden, weight, targets).logprob.requires_grad
    hidden.requires_grad_()
    asked = linear_logprobs(hidden, weight, targets, outputs=("logprob", "entropy"))
    assert asked.entropy is not None and asked.entropy.requires_grad
    kept = linear_logprobs(hidden, weight, targets, outputs=("logprob", "entropy"), grad="direction")
    assert kept.logprob.requires_grad and kept.entropy is not None and not kept.entropy.requires_grad
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, targets).logprob.requires_grad
    with pytest.raises(ValueError, match="needs a frozen head"):
        linear_logprobs(hidden, weight.requires_grad_(), targets, grad="direction")
    linear_logprobs(hidden, weight, targets).logprob.sum().backward()
    assert weight.grad is not None


def test_frozen_head_gets_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from align.kernels.head import chunked

    def refuse(*_: object) -> None:
        raise AssertionError("a product for the weight's gradient was computed")

    inputs = make(torch.float32)
    monkeypatch.setattr(chunked, "matmul_float32", refuse)
    hidden = inputs["hidden"].requires_grad_()
    for mode in ("direction", "recompute", "store"):
        linear_logprobs(hidden, inputs["weight"], inputs["targets"][:, 0], grad=mode).logprob.sum().backward()


@pytest.mark.parametrize("mode", ["none", "direction", "recompute", "store"])
def test_registration(device: str, mode: str) -> None:
    inputs = make(torch.float32)
    if mode != "none":
        inputs["hidden"].requires_grad_()
    tensors = (inputs[k] for k in ("hidden", "weight", "targets", "bias", "lora_a", "lora_b"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_logprobs_op, (*tensors, 0.5, 1.3, 5.0, 0.8, True, mode, 4), test_utils=tests)


@pytest.mark.parametrize("trainable", [False, True])
def test_compiles_to_one_graph(device: str, trainable: bool) -> None:
    inputs = make(torch.float32)
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_(trainable)
    wrt = [hidden, weight] if trainable else [hidden]

    def loss(hidden: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, inputs["targets"][:, 0], softcap=5.0).logprob.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), loss(hidden))
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden), wrt), torch.autograd.grad(loss(hidden), wrt))


def test_workspace_is_bounded() -> None:
    """Rows times vocabulary times four bytes stays under the stated budget, until a chunk would be too thin."""
    for vocabulary, device in itertools.product((32000, 151936, 262144), ("cpu", "cuda")):
        rows = default_chunk_rows(vocabulary, torch.device(device))
        assert 32 <= rows <= 4096 and rows * vocabulary * 4 <= (192 if device == "cpu" else 640) * 2**20
