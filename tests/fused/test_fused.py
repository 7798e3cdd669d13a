"""Fused layers against the plain operations that they stand for, in float64."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from align.fused import ACTIVATIONS, Projection, asked_rows, gated_mlp, lora_linear, on_asked_rows, rms_norm

PLAIN = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


def projection(inputs, outputs, *, bias=False, lora=True, frozen=False):
    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    weight = tensor(outputs, inputs).requires_grad_(not frozen)
    factors = (tensor(3, inputs), tensor(outputs, 3)) if lora else (None, None)
    return Projection(weight, tensor(outputs) if bias else None, *factors, 0.7)


def plain_projection(x, p):
    y = x @ p.weight.T
    if p.bias is not None:
        y = y + p.bias
    return y if p.a is None else y + p.scale * (x @ p.a.T) @ p.b.T


def plain_mlp(x, gate, up, down, activation):
    return plain_projection(activation(plain_projection(x, gate)) * plain_projection(x, up), down)


def trained(*projections):
    tensors = [t for p in projections for t in p[:4] if t is not None]
    return [t for t in tensors if t.requires_grad]


def assert_same(ours, expected, tensors):
    assert_close(ours, expected)
    weights = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((weights * y).sum(), tensors) for y in (ours, expected))
    assert_close(found, wanted)
    assert all(gradient.any() for gradient in wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_projection_and_its_gradients(bias, lora, frozen):
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    p = projection(5, 6, bias=bias, lora=lora, frozen=frozen)
    assert_same(lora_linear(x, p), plain_projection(x, p), [x, *trained(p)])


def test_an_input_without_gradient_leaves_the_adapters():
    x, p = torch.randn(7, 5, dtype=torch.float64), projection(5, 6, frozen=True)
    assert_same(lora_linear(x, p), plain_projection(x, p), trained(p))


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("lora", [(True, True, True), (True, False, True), (False, False, False)])
def test_a_gated_block_and_its_gradients(activation, lora):
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    gate, up = projection(5, 6, lora=lora[0]), projection(5, 6, lora=lora[1])
    down = projection(6, 5, lora=lora[2])
    ours = gated_mlp(x, gate, up, down, ACTIVATIONS[activation])
    expected = plain_mlp(x, gate, up, down, PLAIN[activation])
    assert_same(ours, expected, [x, *trained(gate, up, down)])


def test_a_norm_and_its_gradient():
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    assert_same(rms_norm(x, weight, 0.1), expected, [x])


def kept_bytes(function, own):
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = function()
    owned = {t.untyped_storage().data_ptr() for t in own}
    assert result.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in owned)


def test_a_gated_block_keeps_its_inner_tensors_and_ranks_alone():
    rows, width, inner, rank = 50, 8, 24, 3
    x = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    parts = [projection(width, inner), projection(width, inner), projection(inner, width)]
    own = [x, *trained(*parts)]
    ours = kept_bytes(lambda: gated_mlp(x, *parts, ACTIVATIONS["silu"]), own)
    plain = kept_bytes(lambda: plain_mlp(x, *parts, F.silu), own)
    assert ours == 8 * rows * (2 * inner + 3 * rank)
    assert plain >= 8 * rows * 4 * inner


def test_half_precision_is_no_further_from_the_truth_than_plain_operations():
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    p = Projection(*(t if t is None else t.detach().float() for t in projection(32, 48)[:4]), 0.7)
    exact = plain_projection(x.double(), Projection(*(t if t is None else t.double() for t in p[:4]), 0.7))
    half = Projection(*(t if t is None else t.bfloat16() for t in p[:4]), 0.7)
    ours = lora_linear(x, p)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.2 * (plain_projection(x, half) - exact).norm()


def test_rows_that_were_asked_for_are_computed_and_others_are_zero():
    layer = torch.nn.Linear(5, 3).double()
    seen = []

    def forward(module, x):
        seen.append(x.shape)
        return type(module).forward(module, x)

    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    everywhere, rows = on_asked_rows(forward), torch.tensor([1, 6])
    with asked_rows(rows):
        some = everywhere(layer, x)
    whole = everywhere(layer, x)
    assert seen == [(1, 2, 5), (2, 4, 5)]
    asked = torch.zeros(8, dtype=torch.bool)
    asked[rows] = True
    assert_close(some.flatten(0, 1), whole.flatten(0, 1) * asked[:, None])
    (gradient,) = torch.autograd.grad(some.sum(), x)
    assert_close(gradient.flatten(0, 1), (layer.weight.sum(0) * asked[:, None]))
