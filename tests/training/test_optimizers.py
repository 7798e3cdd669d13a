"""Every name of every source trains, or is refused before there is a run directory; what it keeps survives a kill."""

import copy
import importlib.util
import io
import random
import re
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from equal_runs import Killed, kill_at
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from align.errors import UserError
from align.recipe.kept import KEPT
from align.recipe.optimizers import (
    AVERAGING,
    EXTRA,
    IMPOSSIBLE,
    LOW_RANK,
    OPTIMIZERS,
    PACKAGES,
    PYTORCH_OPTIMIZER,
    SOURCES,
    TORCH,
    why_not,
)
from align.recipe.settings import TrainSection
from align.training.at_steps import AfterStep
from align.training.dct import DctAdamW
from align.training.lamb import Lamb
from align.training.optimizers import (
    averaging,
    check_optimizer,
    check_parameters,
    class_and_options,
    made_with,
    make_optimizer,
    parameter_groups,
    read_back,
)
from align.training.orthogonal import across, keep_orthogonal
from align.training.train import train

NAMES = [(source, name) for source, names in SOURCES.items() for name in names]
BUILT_IN = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
INSTALLED = importlib.util.find_spec("pytorch_optimizer") is not None
needs_pytorch_optimizer = pytest.mark.skipif(not INSTALLED, reason="pytorch-optimizer is not installed")
if INSTALLED:
    import pytorch_optimizer
LATE = {"radam": 6, "schedulefreeradam": 6, "schedule_free_radam": 6}
"""Steps after which one moves: its formula waits for enough gradients."""
ON_GPUS = ("galore_adamw_8bit", "paged_")
COMPILED = ("adamw_torch_4bit", "adamw_torch_8bit")
"""Of torchao, which compiles for minutes on a CPU."""
LORA_ALONE = ("lorarite",)
"""It takes parameters by pairs of A and B."""
UNEQUAL = ("dadapt", "sara", "magma", "lorarite")
"""In these some tensors move later than others: by less than float32 resolves at first, small weights alone, those that
are drawn, or A once B is no longer 0."""
RATES = {"dadaptsgd": 100.0}
"""It finds its rate itself, from 1e-6 times this one on."""


class Tiny(nn.Module):
    """What groups are made of: a model inside a scorer, with embedding, matrix, vector, LoRA's two and head."""

    def __init__(self, *, lora: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner: nn.Module = nn.Module()
        inner.embed, inner.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        inner.proj = nn.Linear(4, 8)
        inner.lora_A, inner.lora_B = nn.Linear(8, 3, bias=False), nn.Linear(3, 8, bias=False)
        nn.init.zeros_(inner.lora_B.weight)
        inner.get_input_embeddings, inner.get_output_embeddings = lambda: inner.embed, lambda: inner.head
        for part in (inner.embed, inner.head, inner.proj) if lora else ():
            part.requires_grad_(False)
        self.model = inner

    def decayed(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if "bias" not in name]


def arguments(tmp_path: Path, section: TrainSection) -> TrainingArguments:
    own = section.optimizer
    plain = own.name if own.of == "transformers" else "adamw_torch"
    return TrainingArguments(str(tmp_path), optim=plain, learning_rate=section.learning_rate, use_cpu=True)


def made(tmp_path: Path, model: Tiny, **keys) -> torch.optim.Optimizer:
    """As AlignTrainer makes it."""
    section = TrainSection(**{"learning_rate": 0.01, "weight_decay": 0.0} | keys)
    kind, options = class_and_options(section, arguments(tmp_path, section), steps=20)
    kind, options = made_with(section.optimizer, kind, options)
    read_back()
    return make_optimizer(kind, options, parameter_groups(section, model, model.decayed()))


def step(optimizer, model: nn.Module, steps: range) -> None:
    """Steps as the trainer takes them, by gradients that follow from the step's number."""
    for number in steps:
        averaging(optimizer, train=True)
        generator = torch.Generator().manual_seed(number)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        averaging(optimizer, train=False)
        optimizer.zero_grad()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def refused(source: str, name: str) -> bool:
    return bool(why_not(name, source))


@pytest.mark.parametrize(("source", "name"), NAMES)
def test_a_name_trains_and_goes_on_from_its_state_or_is_refused(source, name, tmp_path):
    optimizer = {"name": name, "source": source}
    if refused(source, name):
        with pytest.raises(ValidationError) as told:
            TrainSection(optimizer=optimizer)
        (error,) = told.value.errors()
        sentence = str(error["ctx"]["error"])
        assert f"`{name}`" in sentence and "\n" not in sentence
        packages = [f"pip install {package};" for package, _ in PACKAGES.values()]
        assert any(own in sentence for own in (*packages, EXTRA, *IMPOSSIBLE[source].values()))
        return
    if name.startswith(ON_GPUS) and not torch.cuda.is_available():
        section = TrainSection(optimizer=optimizer)
        with pytest.raises(UserError, match=f"train.optimizer: `{name}` fails .*CUDA"):
            check_optimizer(section, arguments(tmp_path, section))
        return
    if name in COMPILED:
        pytest.skip("torchao compiles its step for minutes on a CPU")
    lora, begun, last = name in LORA_ALONE, LATE.get(name, 2), LATE.get(name, 2) + 4
    model = Tiny(lora=lora)
    keys = {"optimizer": optimizer, "learning_rate": RATES.get(name, 0.01)}
    start, own = values(model), made(tmp_path, model, **keys)
    step(own, model, range(begun))
    moved = [bool((a != b).any()) for a, b in zip(values(model), start, strict=True)]
    assert any(moved) if name.startswith(UNEQUAL) else all(moved)
    assert all(value.isfinite().all() for value in values(model))

    file, copied = io.BytesIO(), copy.deepcopy(model.state_dict())
    torch.save(own.state_dict(), file)
    torch_numbers, numbers = torch.get_rng_state(), random.getstate()
    step(own, model, range(begun, last))
    other = Tiny(lora=lora)
    other.load_state_dict(copied)
    again = made(tmp_path, other, **keys)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(torch_numbers), random.setstate(numbers)
    step(again, other, range(begun, last))
    assert_close(values(other), values(model), rtol=0, atol=1e-6)


def test_the_names_are_those_of_their_sources():
    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}
    classes = {name.lower() for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)}
    assert set(TORCH) == classes - {"optimizer"}
    if not INSTALLED:
        pytest.skip("pytorch-optimizer is not installed")
    from pytorch_optimizer import get_supported_optimizers

    assert list(PYTORCH_OPTIMIZER) == get_supported_optimizers()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_name_that_needs_a_package_is_forgotten(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert bool(why_not(name)) == (name not in BUILT_IN)
    assert all(why_not(own, "pytorch_optimizer") for own in PYTORCH_OPTIMIZER)


def test_lambs_steps_are_the_papers():
    """Algorithm 2 of arXiv:1904.00962 written out, weight decay in it; a tensor of zeros takes Adam's own step."""
    start, zero = [3.0, -4.0], [0.0, 0.0]
    weights = [nn.Parameter(torch.tensor(own, dtype=torch.float64)) for own in (start, zero)]
    lr, decay, eps, (b1, b2) = 0.1, 0.5, 1e-6, (0.9, 0.999)
    optimizer = Lamb([{"params": weights, "weight_decay": decay}], lr=lr, betas=(b1, b2), eps=eps)
    gradients = [[[0.3, 0.1], [0.2, -0.5]], [[-0.2, 0.4], [0.1, 0.3]]]  # of each step, of each tensor
    expected, m, v = [list(start), list(zero)], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]
    for t, step_gradients in enumerate(gradients, start=1):
        for tensor, g in enumerate(step_gradients):
            w = expected[tensor]
            m[tensor] = [b1 * a + (1 - b1) * b for a, b in zip(m[tensor], g, strict=True)]
            v[tensor] = [b2 * a + (1 - b2) * b * b for a, b in zip(v[tensor], g, strict=True)]
            pairs = zip(m[tensor], v[tensor], w, strict=True)
            r = [a / (1 - b1**t) / (sqrt(b / (1 - b2**t)) + eps) + decay * c for a, b, c in pairs]
            norm_w, norm_r = sqrt(sum(x * x for x in w)), sqrt(sum(x * x for x in r))
            trust = norm_w / norm_r if norm_w else 1.0
            expected[tensor] = [x - lr * trust * y for x, y in zip(w, r, strict=True)]
            weights[tensor].grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        if t == 1:
            assert_close((weights[0] - torch.tensor(start, dtype=torch.float64)).norm().item(), lr * 5.0)
        for own, known in zip(weights, expected, strict=True):
            assert_close(own.data, torch.tensor(known, dtype=torch.float64))


GRADIENTS = [
    [[0.3, -0.2, 0.9], [0.1, 0.8, -0.4], [-0.7, 0.2, 0.5], [0.6, -0.1, 0.2]],
    [[-0.5, 0.1, 0.3], [0.9, -0.2, 0.4], [0.2, 0.7, -0.6], [0.1, 0.3, 0.8]],
    [[0.2, 0.9, -0.1], [-0.3, 0.6, 0.2], [0.1, 1.4, 0.3], [0.5, -0.8, 0.1]],
    [[0.8, 0.1, 0.2], [0.4, -0.3, 0.7], [-0.2, 0.5, 0.1], [0.3, 0.2, -0.9]],
]
WEIGHTS = [[1.0, -0.5, 0.3], [0.2, 0.7, -1.1], [-0.4, 0.6, 0.9], [0.8, -0.3, 0.5]]


def steps_of(kind, *, wide: bool, group: dict, dtype=torch.float64, **options) -> list[np.ndarray]:
    """A matrix of 4 x 3, or its transpose, after each step by GRADIENTS; as a tall one."""
    turned = (lambda x: x.T.contiguous()) if wide else (lambda x: x)
    weight = nn.Parameter(turned(torch.tensor(WEIGHTS, dtype=dtype)))
    optimizer, seen = kind([{"params": [weight], **group}], **options), []
    for gradient in GRADIENTS:
        weight.grad = turned(torch.tensor(gradient, dtype=dtype))
        optimizer.step()
        seen.append(turned(weight.detach().double()).numpy().copy())
    return seen


@pytest.mark.parametrize("wide", [False, True])
def test_projected_to_cosines_steps_are_the_papers(wide):
    """arXiv:2505.17967 with scipy's transform, its places chosen anew at every second step; two of three columns."""
    lr, scale, decay, eps, (b1, b2) = 0.1, 0.5, 0.2, 1e-8, (0.8, 0.9)
    group = {"rank": 2, "update_proj_gap": 2, "scale": scale, "weight_decay": decay}
    found = steps_of(DctAdamW, wide=wide, group=group, lr=lr, betas=(b1, b2), eps=eps)
    w, chosen = np.array(WEIGHTS), []
    m, v = np.zeros((4, 3)), np.zeros((4, 3))  # of all columns; those that are not chosen are 0
    for t, gradient in enumerate(GRADIENTS, start=1):
        along = scipy.fft.dct(np.array(gradient), type=2, norm="ortho", axis=1)
        if t % 2 == 1:
            chosen.append(set(np.argsort(-(along**2).sum(0))[:2].tolist()))
            for gone in set(range(3)) - chosen[-1]:
                m[:, gone], v[:, gone] = 0, 0
        moved = np.zeros((4, 3))
        for j in chosen[-1]:
            m[:, j] = b1 * m[:, j] + (1 - b1) * along[:, j]
            v[:, j] = b2 * v[:, j] + (1 - b2) * along[:, j] ** 2
            moved[:, j] = m[:, j] / (1 - b1**t) / (np.sqrt(v[:, j] / (1 - b2**t)) + eps)
        w = (1 - lr * decay) * w - lr * scale * scipy.fft.idct(moved, type=2, norm="ortho", axis=1)
        np.testing.assert_allclose(found[t - 1], w, rtol=0, atol=1e-12)
    assert len(chosen) == 2 and len(chosen[0] & chosen[1]) == 1, "one column goes, one stays with its moments"


def test_a_vector_beside_projected_matrices_is_adamws(tmp_path):
    model, other = Tiny(), Tiny()
    ours = made(tmp_path, model, optimizer={"name": "dct_adamw", "rank": 2}, weight_decay=0.1)
    theirs = made(tmp_path, other, optimizer={"name": "adamw", "source": "torch"}, weight_decay=0.1)
    step(ours, model, range(3)), step(theirs, other, range(3))
    for (name, own), known in zip(model.named_parameters(), other.parameters(), strict=True):
        whole = own.ndim == 1 or "embed" in name or "head" in name
        assert torch.allclose(own, known, atol=1e-6) == whole, name


def test_gradients_go_across_the_weights_at_their_own_length():
    """g - (w.g / w.w) w by hand: w = (3, 4), g = (1, 2) leaves 11/25 (3, 4) out and (-8, 6)/25 over, of length 2/5."""
    w = torch.tensor([3.0, 4.0], dtype=torch.float64)
    g = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert_close(across(g, w), sqrt(5) * torch.tensor([-0.8, 0.6], dtype=torch.float64))
    assert torch.equal(across(g, 0 * w), g)
    assert torch.equal(across(2 * w, w), 0 * w)
    with pytest.raises(UserError, match="orthogonal_gradient: it looks at whole tensors, which FSDP"):
        keep_orthogonal(torch.optim.SGD([nn.Parameter(w)], lr=0.1), cut=True)


@pytest.mark.parametrize("size", [1, 7, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_a_gradient_along_its_weights_is_no_direction(size, dtype):
    for _ in range(50):
        w = torch.randn(size).to(dtype)
        assert not across(w * torch.randn(()).to(dtype), w).any()
    if size > 1:
        g = torch.randn(size)
        assert_close(across(g, torch.randn(size)).norm(), g.norm())


def test_a_run_steps_across_its_weights(make_recipe, tiny_policy):
    keys = {"optimizer": "sgd", "orthogonal_gradient": True, "steps": 1, "learning_rate": 1.0, "warmup_ratio": 0}
    run = train(make_recipe(policy={"adapter": {"name": "full"}}, train=keys, sampling={"prompts": 0}))
    (file,) = (run.path / "adapter").glob("*.safetensors")
    after, before = load_file(file), load_file(Path(tiny_policy) / "model.safetensors")
    moved = {name: (after[name].double() - before[name].double(), before[name].double()) for name in before}
    assert all(change.any() for change, _ in moved.values())
    for name, (change, weight) in moved.items():
        assert abs((change * weight).sum()) < 1e-4 * change.norm() * weight.norm(), name


def adam_of(r: np.ndarray, m: np.ndarray, v: np.ndarray, t: int, b1: float, b2: float) -> Any:
    """New moments, and Adam's direction without an eps."""
    m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
    return m, v, m / (1 - b1**t) / np.sqrt(v / (1 - b2**t))


@needs_pytorch_optimizer
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_projected_steps_are_the_papers(name, wide):
    """GaLore, arXiv:2403.03507, algorithm 2; Fira, arXiv:2410.01623, eq. 4 to 6: what lies outside of the subspace is
    scaled by column, and grows by 1 % a step at most. The library draws the basis at step 1 and at multiples of the
    gap, where the papers have 1, gap + 1, ..., and finds it in float32."""
    lr, (b1, b2), scale = 0.1, (0.9, 0.99), 0.5 if name == "galore" else 1.0
    group = {"rank": 2, "update_proj_gap": 3, "scale": scale, "projection_type": "std"}
    kind = pytorch_optimizer.load_optimizer(name)
    found = steps_of(kind, wide=wide, group=group, dtype=torch.float32, lr=lr, betas=(b1, b2), eps=0.0, foreach=False)
    w, m, v, last = np.array(WEIGHTS), np.zeros((4, 2)), np.zeros((4, 2)), None
    for t, gradient in enumerate(map(np.array, GRADIENTS), start=1):
        if t in (1, 3):
            basis = np.linalg.svd(gradient)[2][:2].T
            basis = basis * signs_like(gradient, basis, wide)
        r = gradient @ basis
        m, v, direction = adam_of(r, m, v, t, b1, b2)
        step = scale * direction @ basis.T
        if name == "fira":
            # Adam's direction by Fira's code is that without bias correction of its moments, but of the step's rate
            rate = sqrt(1 - b2**t) / (1 - b1**t)
            outside = (gradient - r @ basis.T) * np.linalg.norm(direction / rate, axis=1, keepdims=True)
            outside /= np.linalg.norm(r, axis=1, keepdims=True)
            if last is not None:
                outside /= max(np.linalg.norm(outside) / last, 1.01) / 1.01
            last = np.linalg.norm(outside)
            step = step + rate * outside
        w = w - lr * step
        np.testing.assert_allclose(found[t - 1], w, rtol=0, atol=2e-5)


def signs_like(gradient: np.ndarray, basis: np.ndarray, wide: bool) -> np.ndarray:
    """The signs that the library's own decomposition gives the basis: with moments of an older one they matter."""
    own = torch.tensor(gradient.T if wide else gradient, dtype=torch.float32)
    u, _, vh = torch.linalg.svd(own, full_matrices=False)
    theirs = (u[:, :2] if wide else vh[:2].T).double().numpy()
    return np.sign((theirs * basis).sum(0))


@needs_pytorch_optimizer
def test_adans_steps_are_the_papers():
    """arXiv:2208.06677, algorithm 1, with the bias corrections and 1 - beta of the authors' code, and their decay."""
    lr, decay, eps, (b1, b2, b3) = 0.1, 0.5, 1e-8, (0.98, 0.92, 0.99)
    kind = pytorch_optimizer.load_optimizer("adan")
    found = steps_of(kind, wide=False, group={}, lr=lr, weight_decay=decay, eps=eps, betas=(b1, b2, b3))
    w, before = np.array(WEIGHTS), np.array(GRADIENTS[0])
    m, v, n = np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    for t, g in enumerate(map(np.array, GRADIENTS), start=1):
        change, before = g - before, g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * change
        n = b3 * n + (1 - b3) * (g + b2 * change) ** 2
        rate = lr / (np.sqrt(n / (1 - b3**t)) + eps)
        w = (w - rate * (m / (1 - b1**t) + b2 * v / (1 - b2**t))) / (1 + lr * decay)
        np.testing.assert_allclose(found[t - 1], w, rtol=0, atol=1e-12)


@needs_pytorch_optimizer
def test_stable_spams_steps_are_the_papers():
    """arXiv:2502.17055: AdaClip, AdaGN, Adam, whose moments begin anew at multiples of the gap."""
    lr, gap, eps, (b1, b2), (g1, g2, theta) = 0.1, 3, 1e-8, (0.9, 0.99), (0.7, 0.9, 0.999)
    kind = pytorch_optimizer.load_optimizer("stablespam")
    found = steps_of(kind, wide=False, group={}, lr=lr, betas=(b1, b2), eps=eps, update_proj_gap=gap)
    w, m, v, of_step = np.array(WEIGHTS), np.zeros((4, 3)), np.zeros((4, 3)), 0
    largest = mean_norm = mean_square = 0.0
    for t, g in enumerate(map(np.array, GRADIENTS), start=1):
        of_step += 1
        if t % gap == 0:
            m, v, of_step = np.zeros((4, 3)), np.zeros((4, 3)), 1
        largest = theta * largest + (1 - theta) * abs(g).max()
        bound = largest / (1 - theta**t)
        g = np.where(abs(g) > bound, g / abs(g).max() * bound, g)
        norm = np.linalg.norm(g)
        mean_norm, mean_square = g1 * mean_norm + (1 - g1) * norm, g2 * mean_square + (1 - g2) * norm**2
        g = g / norm * (mean_norm / (1 - g1**t)) / (np.sqrt(mean_square / (1 - g2**t)) + eps)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * m / (1 - b1**of_step) / (np.sqrt(v / (1 - b2**of_step)) + eps)
        np.testing.assert_allclose(found[t - 1], w, rtol=0, atol=1e-12)


def test_lora_plus_is_adam_with_another_rate_for_b(tmp_path):
    """arXiv:2402.12354: B's rate is 16 times A's. Adam's first step is lr g / (|g| + eps)."""
    model = Tiny().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    keys = {"groups": {"lora_B": "16x", "embeddings": 0.003, r"head\.(weight|bias)": "0.5x"}, "learning_rate": 0.01}
    optimizer = made(tmp_path, model, **keys)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    rates = {"lora_B": 0.16, "embed": 0.003, "head": 0.005}
    for name, parameter in model.named_parameters():
        rate = next((rate for part, rate in rates.items() if part in name), 0.01)
        expected = before[name] - rate * parameter.grad / (parameter.grad.abs() + 1e-8)
        assert_close(parameter.data, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"lora_C": "16x"}, "no parameter that trains is of `lora_C`; there are bias, embed, head"),
        ({"proj": "2x", "weight": "3x"}, "model.proj.weight is of `proj` and of `weight`"),
    ],
)
def test_groups_that_are_of_nothing_or_meet_are_refused(groups, said):
    with pytest.raises(UserError, match=f"train.groups: {said}"):
        check_parameters(TrainSection(groups=groups), Tiny())


@pytest.mark.parametrize("rate", ["16", "x", "0x", -1.0, 0])
def test_a_rate_is_a_positive_number_or_a_multiple(rate):
    with pytest.raises(ValidationError):
        TrainSection(groups={"lora_B": rate})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optimizer": {"name": "lamb", "betos": [0.9, 0.99]}}, "`betos` is no option of `lamb`; did you mean `betas`"),
        ({"optimizer": {"name": "lamb", "lr": 1}}, "`lr` of `lamb` is train.learning_rate"),
        ({"optimizer": {"name": "lamb", "betas": [0.9]}}, "betas are two numbers"),
        ({"optimizer": {"name": "dct_adamw", "rank": 0}}, "train.optimizer: rank is 1 or more, got 0"),
        ({"optimizer": {"name": "dct_adamw", "betas": [0.9, 1]}}, "betas are two numbers"),
        ({"optimizer": {"name": "sgd", "momentum": "much"}}, "train.optimizer: "),
        ({"optimizer": {"name": "sgd", "nesterov": True}}, "Nesterov momentum requires a momentum"),
        ({"optimizer": {"name": "rprop", "etas": [0.5, 1.2]}, "weight_decay": 0.1}, "`rprop` has none"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_run_directory(keys, said, make_recipe, tmp_path):
    with pytest.raises(UserError, match=said) as told:
        train(make_recipe(train=keys | {"steps": 2}))
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


def test_a_name_is_looked_up_in_one_order_and_a_source_chooses():
    assert [TrainSection(optimizer=name).optimizer.of for name in ("lamb", "sgd", "muon")] == [
        "align",
        "transformers",
        "torch",
    ]
    assert TrainSection(optimizer={"name": "sgd", "source": "torch"}).optimizer.of == "torch"
    with pytest.raises(ValidationError, match="torch has no optimizer `lamb`; align, pytorch_optimizer has"):
        TrainSection(optimizer={"name": "lamb", "source": "torch"})


def test_muon_takes_hidden_matrices_and_adamw_the_rest(tmp_path):
    model = Tiny()
    before, optimizer = [p.detach().clone() for p in model.parameters()], made(tmp_path, model, optimizer="muon")
    other = Tiny()
    names = [name for name, p in other.named_parameters() if p.ndim == 2 and "embed" not in name and "head" not in name]
    muon = torch.optim.Muon(
        [p for name, p in other.named_parameters() if name in names],
        lr=0.01,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW([p for name, p in other.named_parameters() if name not in names], 0.01, weight_decay=0.0)
    step(optimizer, model, range(3))
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for parameter in other.parameters():
            parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)
        muon.step(), adamw.step()
    assert_close(list(model.parameters()), list(other.parameters()), rtol=0, atol=0)
    assert len(names) == 3 and all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


FAMILIES = {
    "muon": {"optimizer": "muon", "full": True},
    "galore": {"optimizer": {"name": "galore", "rank": 2, "update_proj_gap": 3}, "full": True},
    "dct_adamw": {"optimizer": {"name": "dct_adamw", "rank": 2, "update_proj_gap": 2}, "full": True},
    "perpGrad": {"orthogonal_gradient": True},
    "schedulefreeadamw": {"optimizer": "schedulefreeadamw", "schedule": "constant_with_warmup"},
}
"""One of each kind that is not like AdamW: matrices alone, projected or turned gradients, averaged weights."""


@pytest.mark.parametrize(
    "name", [pytest.param(own, marks=() if own == "schedulefreeadamw" else pytest.mark.long) for own in FAMILIES]
)
def test_an_interrupted_run_ends_with_the_identical_weights(name, make_recipe, monkeypatch):
    if name in ("galore", "schedulefreeadamw") and not INSTALLED:
        pytest.skip("pytorch-optimizer is not installed")
    keys = dict(FAMILIES[name])
    adapter = {"adapter": {"name": "full"}} if keys.pop("full", False) else {}
    sections = {"policy": adapter, "train": keys | {"learning_rate": 1e-3, "steps": 5}, "sampling": {"prompts": 0}}
    whole = train(make_recipe("whole", **sections | {"train": sections["train"] | {"eval_steps": 1}}))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        train(make_recipe("killed", **sections))
    resumed = train(make_recipe("killed", **sections))
    for file in (whole.path / "adapter").glob("*.safetensors"):
        assert file.read_bytes() == (resumed.path / "adapter" / file.name).read_bytes()


@needs_pytorch_optimizer
def test_what_is_evaluated_and_saved_is_the_average(make_recipe, monkeypatch):
    """With beta1 = 0.9, y = 0.9 x + 0.1 z: gradients are taken at y, what is kept is x, the mean of z over the steps
    (constant rates weigh each the same)."""
    kept: list[dict[str, torch.Tensor]] = []
    real = AfterStep.on_optimizer_step

    def told(self, *given, **more) -> None:
        optimizer = self.trainer.optimizer.optimizer
        real(self, *given, **more)
        z = {p: optimizer.state[p]["z"].double().clone() for g in optimizer.param_groups for p in g["params"]}
        kept.append({"x": {p: p.detach().double().clone() for p in z}, "z": z})

    monkeypatch.setattr(AfterStep, "on_optimizer_step", told)
    keys = {"optimizer": "schedulefreeadamw", "schedule": "constant", "steps": 4, "learning_rate": 1e-2}
    result = train(make_recipe(train=keys, sampling={"prompts": 0}))
    for parameter, x in kept[-1]["x"].items():
        assert_close(x, torch.stack([own["z"][parameter] for own in kept]).mean(0), rtol=0, atol=1e-6)
    saved = load_file(result.path / "adapter" / "adapter_model.safetensors")
    own = sorted(float(x.abs().sum()) for x in kept[-1]["x"].values())
    assert sorted(float(t.double().abs().sum()) for t in saved.values()) == pytest.approx(own, rel=1e-6)


def test_a_schedule_that_falls_is_refused_beside_an_average(make_recipe):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(UserError, match="`schedulefreeadamw` averages its weights .* train.schedule=constant_with"):
        make_recipe(train={"optimizer": "schedulefreeadamw"})


@pytest.mark.parametrize("source", ["transformers", "pytorch_optimizer"])
def test_a_missing_package_is_said_before_the_run_directory(source, make_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    name, pip = {"transformers": ("stable_adamw", "torch-optimi"), "pytorch_optimizer": ("adan", EXTRA)}[source]
    with pytest.raises(UserError, match=f"`{name}` needs a package: pip install {re.escape(pip)};"):
        train(make_recipe(train={"optimizer": name}))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(("source", "name"), NAMES)
def test_a_name_trains_two_steps_of_a_policy(source, name, make_recipe, tmp_path):
    if refused(source, name) or name in COMPILED:
        pytest.skip(f"{name} is refused, or compiles for minutes")
    schedule = {"schedule": "constant"} if name in AVERAGING else {}
    keys = {"optimizer": {"name": name, "source": source}, "steps": LATE.get(name, 2), "lists_per_step": 2} | schedule
    keys |= {"learning_rate": RATES.get(name, 0.01)}
    try:
        result = train(make_recipe(train=keys, sampling={"prompts": 0}))
    except UserError as error:
        assert name.startswith(ON_GPUS) and "CUDA" in str(error) and not (tmp_path / "run").exists()
        return
    assert result.summary["steps"] == keys["steps"]
    moved = load_file(result.path / "adapter" / "adapter_model.safetensors")
    assert any(bool((tensor != 0).any()) for place, tensor in moved.items() if "lora_B" in place)


def size(kept) -> int:
    """Bytes of all tensors in a state, in projectors too."""
    if isinstance(kept, torch.Tensor):
        return kept.numel() * kept.element_size()
    if isinstance(kept, dict):
        return sum(map(size, kept.values()))
    if isinstance(kept, list | tuple):
        return sum(map(size, kept))
    return size(vars(kept)) if hasattr(kept, "__dict__") else 0


@pytest.mark.long
@pytest.mark.parametrize(("source", "name"), KEPT)
def test_what_is_kept_of_a_matrix_is_what_the_table_says(source, name, tmp_path):
    if refused(source, name):
        pytest.skip(f"{name} needs a package that is not installed")
    shapes = [(16, 64), (64, 16)] if name in LORA_ALONE else [(64, 64)]
    model = nn.ParameterList(nn.Parameter(torch.randn(shape) / 8) for shape in shapes)
    rank = {"rank": 16} if name in LOW_RANK and name != "conda" else {}
    section = TrainSection(optimizer={"name": name, "source": source} | rank, learning_rate=1e-3)
    kind, options = made_with(section.optimizer, *class_and_options(section, arguments(tmp_path, section), steps=10))
    groups = parameter_groups(section, model, [], hidden=lambda name, parameter: True)
    optimizer = make_optimizer(kind, options, groups)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        averaging(optimizer, train=True)
        optimizer.step()
    assert round(size(optimizer.state) / 4 / sum(p.numel() for p in model.parameters()), 2) == KEPT[source, name]
