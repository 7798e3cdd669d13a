"""Rollouts: our worker beside plain vLLM, transformers and TRL, 20 changes of weights, and an online run by stage."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align.bench.measure import machine
from align.bench.trl_generation import TrlFailed, TrlProcess
from align.evaluate.sampling import row_seed
from align.model.config import PolicySection
from align.model.policy import Policy, load_policy
from align.recipe import Recipe, load_recipe
from align.rollout.agreement import check_agreement
from align.rollout.engine import Sampling
from align.rollout.journal import Journal
from align.rollout.process import EngineProcess
from align.rollout.prompts import PromptSet, read_prompts
from align.rollout.sample import sampled_line
from align.rollout.transformers_engine import TransformersEngine
from align.rollout.vllm_arguments import VllmArguments
from align.rollout.vllm_engine import VllmEngine
from align.rollout.weights import Kind, write_weights
from align.training.train import train

RECIPE = "recipes/online_lipo.yaml"
ROUNDS = 3
PROMPTS = 30
SYNCS = 20
LOOP = ("online.iterations=2", "online.prompts=30", "sampling.prompts=20")


def run() -> dict[str, Any]:
    """Measure everything; run it in the project's root, where vLLM is installed."""
    recipe = load_recipe(RECIPE, [f"data.limit={PROMPTS}"])
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "machine": machine(device) | {"vllm": version("vllm")},
            "date": time.strftime("%Y-%m-%d"),
            "speed": speed(recipe, folder),
            "syncs": {f"{kind}, {dtype}": syncs(recipe, folder, kind, dtype) for kind, dtype in VARIANTS},
            "loop": train(load_recipe(RECIPE, [*LOOP, f"output={folder / 'loop'}"])).summary["iterations"],
        }
    Console(width=120).print(_table(result))
    return result


VARIANTS: tuple[tuple[Kind, str], ...] = (
    ("merged", "float32"),
    ("adapter", "float32"),
    ("merged", "bfloat16"),
    ("adapter", "bfloat16"),
)


def speed(recipe: Recipe, folder: Path) -> dict[str, dict[str, Any]]:
    """Tokens per second of the same number of completions, in turn, after one warm-up each.

    Returns:
        Per engine: median, least and most; or `not_run`, the reason.
    """
    prompts = read_prompts(recipe)
    sampling = _sampling(recipe, prompts)
    found, peers = _peers(recipe, prompts, sampling, folder)  # before vLLM turns compilation off in this process
    own = {
        f"worker{name}": EngineProcess(
            replace(_arguments(recipe, prompts), dtype=dtype), timeout=600, log_file=folder / "engine.log"
        )
        for name, dtype in (("", "float32"), (", bfloat16", "bfloat16"))
    }
    plain = VllmEngine(replace(_arguments(recipe, prompts), sampler="vllm"))
    slow = TransformersEngine(
        Path(recipe.policy.model), prompts.tokenizer, dtype="float32", tokens_per_batch=8192, trusted=False
    )
    files = (folder / f"rows{i}.jsonl" for i in range(100))

    nucleus = replace(sampling, top_p=0.9)

    def worker(engine: EngineProcess, sampling: Sampling = sampling) -> int:
        """As `align rollout` does it: rows with texts, each on disk once it is there."""
        journal = Journal(next(files))
        tokens = 0
        for place, drawn in engine.sample(prompts.ids, sampling):
            row = prompts.rows[place]
            journal.append([sampled_line(row, prompts, prompts.ids[place], drawn, sampling, 0)])
            tokens += sum(len(one.ids) for one in drawn)
        return tokens

    tasks: dict[str, Callable[[], int]] = {
        "plain vLLM": lambda: _plain(plain, prompts, sampling),
        **{name: partial(worker, engine) for name, engine in own.items()},
        "plain vLLM, top_p 0.9": lambda: _plain(plain, prompts, nucleus),
        "worker, top_p 0.9": lambda: worker(own["worker"], nucleus),
        "transformers": lambda: sum(len(one.ids) for _, drawn in slow.sample(prompts.ids, sampling) for one in drawn),
        **{name: peer.tokens for name, peer in peers.items()},
    }
    rates = _rates(tasks)
    engines: list[Any] = [*own.values(), plain, *peers.values()]
    for engine in engines:
        engine.close()
    return {name: found.get(name, {}) | rates.get(name, {}) for name in (*tasks, *found)}


def _peers(
    recipe: Recipe, prompts: PromptSet, sampling: Sampling, folder: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, TrlProcess]]:
    """TRL's two paths: what each says of itself, or why it does not run, and those that run."""
    found, peers = {}, {}
    for name, vllm in (("TRL with vLLM", True), ("TRL with transformers", False)):
        try:
            peer = TrlProcess(recipe.policy.model, prompts.ids, sampling, vllm=vllm, log_file=folder / "trl.log")
            peer.tokens()
            found[name], peers[name] = peer.figures, peer
        except TrlFailed as error:
            found[name] = {"not_run": str(error)}
    return found, peers


def _rates(tasks: dict[str, Callable[[], int]]) -> dict[str, dict[str, float]]:
    rates: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(ROUNDS + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            tokens = task()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - began))
    return {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in rates.items()
    }


def syncs(recipe: Recipe, folder: Path, kind: Kind, dtype: str) -> dict[str, Any]:
    """Agreement after each of many changes of weights, and the memory of engine and trainer from first to last."""
    prompts = read_prompts(recipe)
    arguments = replace(_arguments(recipe, prompts), dtype=dtype, lora_rank=16 if kind == "adapter" else 0)
    engine = EngineProcess(arguments, timeout=600, log_file=folder / "engine.log")
    section = PolicySection.model_validate({"model": recipe.policy.model, "dtype": dtype})
    policy = load_policy(section, keep_reference=False)
    found = []
    for number in range(1, SYNCS + 1):
        trained = folder / f"{kind}-{dtype}" / str(number)
        _move(policy, number)
        policy.save_adapter(trained)
        policy.tokenizer.save_pretrained(trained)
        began = time.perf_counter()
        weights = write_weights(trained, trained.parent / "weights", kind=kind, version=number, dtype=dtype)
        engine.load(weights)
        seconds = time.perf_counter() - began
        agreement = check_agreement(engine, policy, prompts.ids[:4], _sampling(recipe, prompts), bound=None)
        memory = {"engine": _rss(engine.pid), "trainer": _rss("self")}
        found.append({"seconds": seconds, "rss_bytes": memory, **asdict(agreement)})
    engine.close()
    return {
        "max": max(one["max"] for one in found),
        "mean": statistics.mean(one["mean"] for one in found),
        "median_seconds": statistics.median(one["seconds"] for one in found[1:]),  # the first one starts the engine
        "engine_rss_mib": [one["rss_bytes"]["engine"] / 2**20 for one in found],
        "trainer_rss_mib": [one["rss_bytes"]["trainer"] / 2**20 for one in found],
        "max_of_each": [one["max"] for one in found],
    }


def _plain(engine: VllmEngine, prompts: PromptSet, sampling: Sampling) -> int:
    """vLLM's own `generate` on the same settings."""
    from vllm import SamplingParams

    shared = {"n": sampling.completions, "max_tokens": sampling.max_tokens, "top_p": sampling.top_p}
    shared |= {"logprobs": 0, "detokenize": False}
    stop = list(sampling.stop_ids)
    params = [
        SamplingParams(seed=row_seed(sampling.seed, ids, 0), stop_token_ids=stop, **shared) for ids in prompts.ids
    ]
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts.ids], params, use_tqdm=False)
    return sum(len(one.token_ids) for output in outputs for one in output.outputs)


def _arguments(recipe: Recipe, prompts: PromptSet) -> VllmArguments:
    return VllmArguments(recipe.policy.model, "float32", recipe.data.max_length, cache_bytes=256 << 20)


def _sampling(recipe: Recipe, prompts: PromptSet) -> Sampling:
    section = recipe.rollout
    return Sampling(section.completions, section.max_tokens, seed=0, stop_ids=prompts.ends)


def _move(policy: Policy, seed: int) -> None:
    """A step as training would take it, in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in _trained(policy):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)


def _trained(policy: Policy) -> Iterator[torch.Tensor]:
    return (parameter for parameter in policy.model.parameters() if parameter.requires_grad)


def _rss(pid: int | str | None) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _speed_text(rates: dict[str, Any]) -> str:
    if "not_run" in rates:
        return f"does not run: {rates['not_run']}"
    text = f"{rates['median']:.0f} ({rates['least']:.0f} to {rates['most']:.0f})"
    more = [rates["dtype"]] if rates.get("dtype", "float32") != "float32" else []
    return ", ".join([text, *more, *(["compiled"] if rates.get("compiled") else [])])


def _table(result: dict[str, Any]) -> Table:
    table = Table("", "", title="rollouts", title_justify="left")
    for name, rates in result["speed"].items():
        table.add_row(f"{name}, tokens/s", _speed_text(rates))
    for name, one in result["syncs"].items():
        rss = one["engine_rss_mib"]
        table.add_row(
            f"{SYNCS} syncs, {name}",
            f"difference max {one['max']:.2g}, mean {one['mean']:.2g} nats; {one['median_seconds']:.2f} s each; "
            f"engine {rss[0]:.0f} -> {rss[-1]:.0f} MiB",
        )
    for one in result["loop"]:
        stages = ", ".join(f"{stage} {value:.1f}" for stage, value in one["seconds"].items())
        table.add_row(f"iteration {one['iteration']}, seconds", stages)
    return table
