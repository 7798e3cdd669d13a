"""Our kernels against plain torch, TRL and, where installed, Liger and cut-cross-entropy on the same inputs."""

import importlib.util
import itertools
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import selective_log_softmax

from align.bench.measure import Task, alternate, machine, peak_bytes
from align.kernels import linear_logprobs, sample, selective_logprobs, softmax
from align.kernels.rows.op import softmax_into
from align.kernels.sampling.reference import keep

ROUNDS = 5


def run() -> dict[str, object]:
    """Every case on the GPU if there is one, else on one CPU thread; prints a line per implementation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine(device))
    cases = [*_selective_cases(device), *_softmax_cases(device), *_sample_cases(device), *_head_cases(device)]
    about = {"date": time.strftime("%Y-%m-%d"), "trl": version("trl"), "rounds": ROUNDS, "load": os.getloadavg()[0]}
    return {"machine": machine(device), **about, "cases": cases}


def _selective_cases(device: torch.device) -> list[dict[str, object]]:
    """log p of one target per row of existing logits; read once, nothing written."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(1024, 151936, device=device) * 3).to(dtype)
        targets = torch.randint(0, 151936, (1024,), device=device)
        truth = _selective_truth(logits[:8], targets[:8])
        methods: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "ours": selective_logprobs,
            "torch": _torch_selective,
            "trl": selective_log_softmax,
        }
        errors = {n: _error(f(logits[:8], targets[:8]), truth) for n, f in methods.items()}
        tasks: dict[str, Task] = {n: partial(f, logits, targets) for n, f in methods.items()}
        name = f"selective_logprobs {list(logits.shape)} {dtype}"
        cases.append(_case(name, tasks, device, errors, read=logits))
    return cases


def _torch_selective(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.float()
    return wide.gather(1, targets[:, None])[:, 0] - wide.logsumexp(1)


def _selective_truth(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])[:, 0]


def _softmax_cases(device: torch.device) -> list[dict[str, object]]:
    """softmax(out=) in float32: ours, the same code in three passes, torch; counted as two reads and a write."""
    cases = []
    for shape in ((1024, 32000), (256, 151936), (1, 2**25)):
        x = torch.randn(shape, device=device) * 3
        out = torch.empty_like(x)
        tasks: dict[str, Task] = {
            "ours": partial(softmax, x, out=out),
            "torch": partial(torch.softmax, x, -1, out=out),
        }
        if device.type == "cpu":
            tasks["three_pass"] = partial(softmax_into, x, "three_pass", 0, out)
        truth = torch.softmax(x[:4].double(), -1)
        errors = {}
        for name, task in tasks.items():
            task()
            errors[name] = _error(out[:4], truth)
        cases.append(_case(f"softmax {list(shape)} float32", tasks, device, errors, read=x, passes=3))
    return cases


def _sample_cases(device: torch.device) -> list[dict[str, object]]:
    """A token per row and its processed log-prob, read once; ours gives the raw one, entropy and rank as well."""
    cases = []
    filters = ((0, 1.0), (0, 0.9), (50, 1.0))
    for width, dtype, (top_k, top_p) in itertools.product((32000, 151936), (torch.float32, torch.bfloat16), filters):
        logits = (torch.randn(64, width, device=device) * 3).to(dtype)
        methods = {"ours": _our_sample, "torch": _torch_sample}
        errors = {n: _sample_error(logits[:8], f(logits[:8], top_k, top_p), top_k, top_p) for n, f in methods.items()}
        tasks: dict[str, Task] = {n: partial(f, logits, top_k, top_p) for n, f in methods.items()}
        name = f"sample {list(logits.shape)} {dtype} top_k {top_k} top_p {top_p}"
        cases.append(_case(name, tasks, device, errors, read=logits))
    return cases


def _our_sample(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    drawn = sample(logits, top_k=top_k, top_p=top_p, seed=0, position=torch.arange(len(logits)))
    return drawn.token, drawn.processed_logprob


def _torch_sample(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Its top-p may keep some of equal logits and not others, which bfloat16 has many of and its error shows."""
    z = logits.float()
    if top_k:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = z.sort(descending=True)
        p = torch.softmax(ordered, -1)
        z = z.scatter(1, order, ordered.masked_fill(p.cumsum(1) - p >= top_p, -torch.inf))
    token = torch.multinomial(torch.softmax(z, -1), 1)
    return token[:, 0], torch.log_softmax(z, -1).gather(1, token)[:, 0]


def _sample_error(logits: Tensor, drawn: tuple[Tensor, Tensor], top_k: int, top_p: float) -> float:
    token, logprob = drawn
    one = torch.ones(len(logits), device=logits.device)
    z = keep(logits, one, torch.full_like(token, top_k), one * top_p, one * 0)
    return _error(logprob, _selective_truth(z, token))


def _head_cases(device: torch.device) -> list[dict[str, object]]:
    """Forward and backward of per-token log-probs with a frozen head."""
    if device.type == "cuda":
        shapes = [(8192, 4096, 151936, torch.bfloat16), (8192, 2048, 151936, torch.bfloat16)]
    else:
        shapes = [(256, 1024, 151936, torch.bfloat16), (256, 256, 32000, torch.float32)]
    return [_head_case(device, *shape) for shape in shapes]


def _head_case(device: torch.device, rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> dict[str, object]:
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5 * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    weights = torch.randn(rows, device=device)
    methods = _head_methods(weight, targets, device)
    truth = _selective_truth(hidden[:8].double() @ weight.double().T, targets[:8])
    errors = {name: _error(method(hidden)[:8], truth) for name, method in methods.items()}

    def step(method: Callable[[Tensor], Tensor]) -> None:
        hidden.grad = None
        method(hidden).backward(weights)

    tasks: dict[str, Task] = {name: partial(step, method) for name, method in methods.items()}
    name = f"linear_logprobs forward+backward {[rows, width, vocabulary]} {dtype}"
    return _case(name, tasks, device, errors, flops=4 * rows * width * vocabulary)


def _head_methods(weight: Tensor, targets: Tensor, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    def naive(hidden: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]

    def trl(hidden: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]

    def ours(hidden: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, targets).logprob

    methods: dict[str, Callable[[Tensor], Tensor]] = {"ours": ours, "torch": naive, "trl": trl}
    if device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        methods["cce_exact"] = lambda h: -linear_cross_entropy(h, weight, targets, reduction="none", impl="cce_exact")
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        methods["liger"] = lambda h: -liger_fused_linear_cross_entropy(h, weight, targets, reduction="none")
    return methods


def _case(
    name: str,
    tasks: dict[str, Task],
    device: torch.device,
    errors: dict[str, float],
    read: Tensor | None = None,
    passes: int = 1,
    flops: int = 0,
) -> dict[str, object]:
    """Time, memory and error of every implementation, and how many times slower than ours each is.

    With `read`, a kernel must move `passes` times this tensor; a plain sum over it, timed in the same rounds, says how
    fast memory is read.
    """
    if read is not None:
        tasks = tasks | {"read": read.view(torch.float32).sum}
    results = alternate(tasks, ROUNDS, device)
    clock = "cpu_median_ms" if device.type == "cpu" else "median_ms"
    print(name)
    for implementation, figures in results.items():
        figures["peak_bytes"] = peak_bytes(tasks[implementation], device)
        if implementation in errors:
            figures["max_error"] = errors[implementation]
        figures["times_ours"] = figures[clock] / results["ours"][clock]
        if read is not None:
            moved = 1 if implementation == "read" else passes
            figures["gb_per_s"] = moved * read.numel() * read.element_size() / figures[clock] / 1e6
            figures["of_read_bandwidth"] = moved * results["read"][clock] / figures[clock]
        if flops:
            figures["tflop_per_s"] = flops / figures[clock] / 1e9
        print("  " + implementation.ljust(12) + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return {"name": name, "implementations": results}


def _error(value: Tensor, truth: Tensor) -> float:
    return (value.detach().double() - truth).abs().max().item()
